"""From a job to its stream: the plan of the data and the encoder of the stage. No Ray, no weights."""

from __future__ import annotations

from rayloom.config.job import JobConfig
from rayloom.data.index import check_rows, make_plan
from rayloom.data.plan import Plan
from rayloom.data.template import resolve_template
from rayloom.models.load import check_model_path, load_tokenizer
from rayloom.stages.sft import SftEncoder


def prepare_data(job: JobConfig) -> tuple[Plan, SftEncoder]:
    """Locate and check the data, load the tokenizer, settle the template.

    Raises:
        RequestError: no such model, data that cannot be read or understood, no usable template.
    """
    check_model_path(job.model.path)
    plan = make_plan(job.data, seed=job.train.seed, epochs=None if job.train.max_steps else job.train.epochs)
    check_rows(plan)
    tokenizer = load_tokenizer(job.model.path)
    return plan, SftEncoder(job.model.path, resolve_template(job.data.template, tokenizer, job.model.path))
