"""From a job to its stream: the plan of the data and the encoder of the stage. No Ray, no weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from rayloom.config.job import JobConfig
from rayloom.data.index import check_rows, make_plan
from rayloom.data.plan import Plan
from rayloom.data.segment import Encoder, SegmentOptions
from rayloom.data.store import find_store
from rayloom.data.template_choice import check_template_name, resolve_template
from rayloom.models.model_type import check_model_type
from rayloom.models.source import check_model_path
from rayloom.models.text_tokenizer import TokenizerState
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer
from rayloom.stages.kto import JudgementEncoder
from rayloom.stages.ppo import PromptEncoder
from rayloom.stages.preference import PreferenceEncoder
from rayloom.stages.pretrain import PretrainEncoder
from rayloom.stages.sft import SftEncoder


def prepare_data(job: JobConfig) -> tuple[Plan, Encoder]:
    """Locate and check the data, load the tokenizer, settle the template.

    Raises:
        RequestError: no such model, one that cannot train so, data that cannot be read or understood, no usable
            template.
    """
    return plan_data(job), make_encoder(job)


def plan_data(job: JobConfig) -> Plan:
    """Locate and check the data; light of libraries, so that what is wrong is told at once.

    Raises:
        RequestError: no such model or template, data that cannot be read or understood.
    """
    check_model_path(job.model)
    plan = make_plan(job.data, seed=job.train.seed, epochs=None if job.train.max_steps else job.train.epochs)
    check_rows(plan, segment_options(job))
    check_model_type(job.model, packing=job.packs)
    if job.stage.rows != "texts":
        check_template_name(job.data.template)
    return plan


def make_encoder(job: JobConfig) -> Encoder:
    """Load the tokenizer, settle the template.

    Raises:
        RequestError: no tokenizer that can be used, no usable template.
    """
    tokenizer = load_tokenizer(TokenizerSource.of(job.model))
    data, state = job.data, TokenizerState.of(tokenizer)
    if job.stage.rows == "texts":
        return PretrainEncoder(state)
    template = resolve_template(data.template, tokenizer, job.model.path)
    if job.stage.rows == "pairs":
        return PreferenceEncoder(state, template, data.enable_thinking)
    if job.stage.rows == "prompts":
        return PromptEncoder(state, template, data.enable_thinking)
    if job.stage.rows == "judgements":
        return JudgementEncoder(state, template, data.enable_thinking)
    return SftEncoder(state, template, data.train_on_prompt, data.mask_history, data.enable_thinking)


def prepare_eval(job: JobConfig) -> Plan | None:
    """The stream that the job evaluates on: each row once, the same rows whatever the seed; None: there is none.

    Raises:
        RequestError: data that cannot be read or understood.
    """
    data = job.data
    if not (data.eval or data.held_out):
        return None
    sets = data.eval or [item.model_copy(update={"weight": None}) for item in data.train]
    plan = make_plan(data.model_copy(update={"train": sets, "mix": "concat"}), seed=0, epochs=1)
    if data.eval:
        check_rows(plan, segment_options(job))
    return plan


def store_root(job: JobConfig) -> Path | None:
    """The folder of prepared data; None where `output_dir` is an address and `data.store` names none."""
    if job.data.store:
        return Path(job.data.store).expanduser().absolute()
    return job.output_folder / "prepared" if job.output_folder is not None else None


def with_stores(job: JobConfig, plan: Plan, encoder: Encoder, options: SegmentOptions) -> SegmentOptions:
    """The options with the prepared tokens of every set that has been prepared in just this way."""
    key, root = encoder.key(), store_root(job)
    found = (find_store(root, data_set, key, options.cutoff) if root else None for data_set in plan.sets)
    return replace(options, stores=tuple(found))


def segment_options(job: JobConfig) -> SegmentOptions:
    """How the job's examples become token rows."""
    data = job.data
    return SegmentOptions(
        cutoff=data.cutoff,
        packing=job.packs,
        by_length=job.groups_by_length,
        mismatched=job.stage.rows == "judgements",
        on_bad_row=data.on_bad_row,
        held_out=data.held_out,
        converters=data.converters,
    )


def eval_options(job: JobConfig) -> SegmentOptions:
    """The same for evaluation: one example a row, so that each counts for its own set; their order says nothing."""
    part: Literal["train", "held out"] = "held out" if job.data.held_out else "train"
    return replace(segment_options(job), packing=False, by_length=True, part=part)
