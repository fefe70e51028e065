"""What a step takes from those before it: the model that it begins at, and the reward models that judge its answers.

    from, after full or freeze      model.path is that step's model/
    from, after lora                the same model, and method.adapters is that step's model/; what else the step does
                                    not say of model and method is as that step had it. With new_adapter: true the
                                    adapter of before is merged on load, and the step's own model/base/ is what a
                                    further step begins at
    rewards.sources[N].from         path is that step's model/

Before a step has run there is nothing in its folder. So every step has a stand-in too: the same job on the model that
the pipeline begins at, without what earlier steps will have made. It can be checked before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.config import MERGED_BASE, LoraConfig
from rayloom.models.config import ModelConfig
from rayloom.pipeline.read import Step

_WHOLE = ("full", "freeze")
# What a saved model has in it, and is not done to it once more.
_DONE = (
    "revision", "allow_pickle", "allow_extra_tensors", "train_from_scratch", "rope_scaling", "add_tokens",
    "add_special_tokens", "token_descriptions",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedStep:
    """A step that knows its place: its job as it will run."""

    name: str
    begins: str | None
    job: JobConfig
    stand_in: JobConfig
    key: str
    """Changes with everything that changes what the step leaves (`rayloom.pipeline.key`)."""

    @property
    def model(self) -> str:
        """The folder of what it trains."""
        return str(self.job.run_dir / "model")

    @property
    def base(self) -> str:
        """The model below the adapter that it leaves."""
        merges = isinstance(self.job.method, LoraConfig) and self.job.method.merged
        return f"{self.model}/{MERGED_BASE}" if merges else self.job.model.path


def wire(step: Step, done: dict[str, PlannedStep]) -> Document:
    """The step's job with the folders of the steps that it refers to.

    Raises:
        RequestError: what they leave is nothing that it can take.
    """
    data = dict(step.document.data)
    places = dict(step.document.places)
    faults: list[str] = []
    try:
        if step.begins is not None:
            data |= _begin(step, done[step.begins])
    except RequestError as error:
        faults += error.messages
    judges = dict(step.judges())
    if judges:
        sources = [dict(source) if isinstance(source, dict) else source for source in data["rewards"]["sources"]]
        for number in judges:
            place = step.place("rewards", "sources", number, "from")
            fault = _judge(sources[number], done[sources[number].pop("from")])
            faults += [f"{place}: {fault}"] if fault else []
        data["rewards"] = {**data["rewards"], "sources": sources}
    if faults:
        raise RequestError(*faults)
    return Document(step.document.name, data, places)


def stand_in(step: Step, job: JobConfig, done: dict[str, PlannedStep]) -> JobConfig:
    """The step's job without what does not exist yet."""
    changes: dict[str, Any] = {}
    if step.begins is not None:
        own = step.own.get("model") or {}
        origin = done[step.begins].stand_in.model
        changes["model"] = origin.model_copy(update={key: getattr(job.model, key) for key in own})
        if isinstance(job.method, LoraConfig):
            changes["method"] = job.method.model_copy(update={"adapters": [], "new_adapter": False})
    if job.rewards is not None and (judges := dict(step.judges())):
        known = [source for number, source in enumerate(job.rewards.sources) if number not in judges]
        changes["rewards"] = job.rewards.model_copy(update={"sources": known})
    return job.model_copy(update=changes)


def check_base(step: Step, job: JobConfig, done: dict[str, PlannedStep]) -> None:
    """Refuse reward adapters on another model than the policy's.

    Raises:
        RequestError: naming both models.
    """
    faults = []
    for number, source in step.judges():
        judge = done[source["from"]]
        if source.get("type") == "adapter" and judge.base != job.model.path:
            faults.append(
                f"{step.place('rewards', 'sources', number, 'from')}: the adapter of step {judge.name} is one of "
                f"{judge.base}, and this step's model is {job.model.path}; let both begin at one model "
                f"(from), or say type: model, and method.type: full in step {judge.name}"
            )
    if faults:
        raise RequestError(*faults)


def _begin(step: Step, before: PlannedStep) -> dict[str, Any]:
    """`model`, and where an adapter goes on `method`, of a step that begins at another."""
    method = before.job.method
    if before.job.stage.type == "reward":
        raise RequestError(
            f"{step.place('from')}: step {before.name} trains a reward model, which judges answers; begin at another "
            f"step, and let it judge in stage ppo by rewards.sources: [{{type: adapter, from: {before.name}}}]"
        )
    own: dict[str, dict[str, Any]] = {}
    for part in ("model", "method"):
        said = step.own.get(part)
        own[part] = said if isinstance(said, dict) else {}
    for part, key in (("model", "path"), ("model", "revision"), ("method", "adapters")):
        if key in own[part]:
            raise RequestError(
                f"{step.place(part, key)}: is that of step {before.name}, as `from` says; leave one of the two out"
            )
    if method.type in _WHOLE:
        return {"model": {**_saved_model(before.job.model, before.model), **own["model"]}}
    if not isinstance(method, LoraConfig):
        raise RequestError(
            f"{step.place('from')}: step {before.name} trains with method.type: {method.type}, and a further step can "
            "begin only at what lora, full or freeze have trained"
        )
    if own["method"].get("type", "lora") != "lora":
        raise RequestError(
            f"{step.place('method', 'type')}: {own['method']['type']}: step {before.name} leaves a LoRA adapter beside "
            "the model's own weights, which only lora can take up (with new_adapter: true for a new one above it); or "
            f"say method.type: full in step {before.name}"
        )
    model = before.job.model.model_dump(mode="json")
    if method.merged:
        model = _saved_model(before.job.model, before.base)
    return {"model": {**model, **own["model"]}, "method": _going_on(step, before, method, own["method"])}


def _saved_model(model: ModelConfig, path: str) -> dict[str, Any]:
    """How a model is loaded that a step has saved."""
    return {**model.model_dump(mode="json", exclude=set(_DONE)), "path": path}


def _going_on(step: Step, before: PlannedStep, method: LoraConfig, own: dict[str, Any]) -> dict[str, Any]:
    """The method of a step after one with LoRA: its adapter goes on, or is merged under a new one."""
    kept = method.model_dump(mode="json", exclude={"adapters", "new_adapter", "init"})
    if method.changes_base:  # PEFT saves it as plain LoRA of twice the rank
        kept |= {"rank": 2 * method.rank, "alpha": None}
    if not own.get("new_adapter"):
        has = {**kept, "alpha": method.alpha or 2 * method.rank}
        if method.changes_base:
            del has["alpha"]  # the adapter itself says it, when it is there
        for key, value in own.items():
            if key in has and value is not None and value != has[key]:
                raise RequestError(
                    f"{step.place('method', key)}: {value}, but the adapter of step {before.name} goes on, and has "
                    f"{has[key]}; leave it out, or say new_adapter: true"
                )
    return {**kept, **own, "adapters": [before.model]}


def _judge(source: dict[str, Any], judge: PlannedStep) -> str | None:
    """Make a source of rewards one of that step's model; why it cannot be one."""
    if "path" in source:
        return f"`path` is that of step {judge.name}, as `from` says; leave one of the two out"
    if source.get("type") not in ("adapter", "model"):
        return f"only sources of type adapter and model are a step's, not {source.get('type')}"
    if judge.job.stage.type != "reward":
        return f"step {judge.name} is of stage {judge.job.stage.type}; one of stage reward trains a reward model"
    if source["type"] == "adapter" and not isinstance(judge.job.method, LoraConfig):
        return f"step {judge.name} trains with method.type: {judge.job.method.type}; say type: model, or lora there"
    if source["type"] == "model" and judge.job.method.type not in _WHOLE:
        return f"step {judge.name} leaves an adapter, no whole model; say type: adapter, or method.type: full there"
    source["path"] = judge.model
    return None
