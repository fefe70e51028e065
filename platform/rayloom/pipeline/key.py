"""A step's key: a hash of everything that changes what the step leaves. It is a part of the name of its run directory,
so a run that does not fit is never found, and none is ever overwritten.

Its settled job, the keys of the steps that it refers to (which are in the paths of their folders), and what the files
are that it names. Not: how many rows are logged, where checkpoints are kept, what waits for what. The versions of
libraries do not count either: an update does not train a model anew; `result.json` has them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.data.index import make_plan
from rayloom.data.plan import Plan
from rayloom.methods.config import LoraConfig
from rayloom.models.fingerprint import folder_fingerprint, model_fingerprint
from rayloom.models.source import check_model_path
from rayloom.rollout.rewards.config import AdapterReward, FunctionReward, ModelReward
from rayloom.rollout.rewards.function import split_path
from rayloom.stages.prepare import prepare_eval

LAYOUT = 1
"""Raised when what the key is made of changes."""
_OF_PLACE = ("name", "output_dir", "resume", "overwrite", "search")  # `rayloom train` leaves a search aside
_OF_DATA = ("store", "manifest")
_OF_TRAIN = (
    "min_workers", "cpus_per_worker", "collective_timeout", "track", "logging_steps", "save_steps", "keep_checkpoints",
    "max_failures", "wait_for_resources",
)  # fmt: skip

_LATER: dict[str, dict[str, Any]] = {
    "train": {"max_loss": None}, "rollout": {"share_gpus": False}, "rewards": {"whiten": False}
}  # fmt: skip
"""Keys that came later, with the values under which everything is as it was before."""


def step_key(job: JobConfig, folder: Path) -> str:
    """The key, 10 hexadecimal digits.

    Args:
        job: wired to the steps before it.
        folder: the pipeline's; where it lies does not count.

    Raises:
        RequestError: data, a model or a file that the job names is not there.
    """
    facts = job.model_dump(mode="json", exclude=set(_OF_PLACE))
    for name in _OF_DATA:
        del facts["data"][name]
    for name in (*_OF_TRAIN, *(["workers"] if job.train.global_batch_size is not None else [])):
        del facts["train"][name]
    for part, keys in _LATER.items():
        for name, before in keys.items():
            if facts[part] and facts[part][name] == before:
                del facts[part][name]
    what = [LAYOUT, _without(facts, f"{folder}/"), _data(job), _files(job, folder)]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]


def _without(value: Any, prefix: str) -> Any:
    """The same with paths below the pipeline's folder taken from there."""
    if isinstance(value, dict):
        return {key: _without(item, prefix) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, prefix) for item in value]
    return value.removeprefix(prefix) if isinstance(value, str) else value


def _data(job: JobConfig) -> list[Any]:
    """What the files of the data are. Where they are does not count: a Ray job finds them in another folder each
    time."""
    plan = make_plan(job.data, seed=job.train.seed, epochs=None)
    evaluated = prepare_eval(job) if job.data.eval else None
    return [_sets(plan), _sets(evaluated) if evaluated else None]


def _sets(plan: Plan) -> list[Any]:
    return [
        [
            one.name,
            one.description.model_dump(mode="json"),
            one.chosen,
            one.last_rows,
            [f.fingerprint for f in one.files],
        ]
        for one in plan.sets
    ]


def _files(job: JobConfig, folder: Path) -> list[str]:
    """Of the model, adapters and other files that the job names and no step makes: what is in them, wherever they are
    and whenever they were copied there."""

    def is_made(path: str) -> bool:
        return Path(path).is_relative_to(folder)

    found = []
    if not is_made(job.model.path):
        check_model_path(job.model)
        found.append(model_fingerprint(job.model, times=False))
    folders = list(job.method.adapters) if isinstance(job.method, LoraConfig) else []
    texts = [job.data.converters, job.train.deepspeed_json]
    if job.data.template.endswith(".jinja"):
        texts.append(job.data.template)
    for number, source in enumerate(job.rewards.sources if job.rewards else ()):
        if isinstance(source, AdapterReward | ModelReward):
            folders.append(source.path)
        elif isinstance(source, FunctionReward):
            texts.append(str(split_path(source.path, f"rewards.sources[{number}].path")[0]))
    found += [folder_fingerprint(Path(path).expanduser(), times=False) for path in folders if not is_made(path)]
    return [*found, *(_digest(path) for path in texts if path)]


def _digest(path: str) -> str:
    """Of a file's content; of one that is not there nothing: the checks say it."""
    file = Path(path).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
