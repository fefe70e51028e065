"""What of a stage does not go together with the rest of the job: told from the job file alone, without any library."""

from __future__ import annotations

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.config import LoraConfig
from rayloom.methods.optimizers.config import LibraryConfig
from rayloom.stages.config import CHOOSING, FREE, DpoConfig, KtoConfig
from rayloom.stages.ppo_config import PpoConfig


def check_stage(job: JobConfig) -> None:
    """Refuse what the job file alone tells.

    Raises:
        RequestError: parts of the job that do not go together with its stage.
    """
    rules = (_prompts, _reference, _router_loss, _mask, _head_rate, _evaluation)
    faults = [text for rule in rules if (text := rule(job))]
    if faults:
        raise RequestError(*faults)


def _reference(job: JobConfig) -> str | None:
    """With its adapter off a model must be what it was before the training; a copy is that with any method, and so is
    what has been computed before."""
    stage, method = job.stage, job.method
    if not isinstance(stage, DpoConfig | KtoConfig | PpoConfig) or not stage.has_reference:
        return None
    if stage.reference == "cached":
        if job.output_folder is not None:
            return None
        return (
            f"stage.reference: cached: its files must be in a folder that all workers read, and output_dir is an "
            f"address ({job.output_dir}); say copy, or adapter_off"
        )
    if stage.reference == "copy":
        is_sharded = job.train.deepspeed == "zero3"
        other = "adapter_off" if isinstance(stage, PpoConfig) else "cached"
        return f"stage.reference: copy: zero3 would not shard the copy; use zero2, or {other}" if is_sharded else None
    why = None
    if method.type in ("full", "freeze"):
        why = "compares with the model with its adapter off, and there is none"
    elif isinstance(method, LoraConfig) and method.changes_base:
        why = f"compares with weights of which method.init: {method.init} takes a part"
    elif isinstance(method, LoraConfig) and method.continues:
        why = "would compare with the model as it was before method.adapters, unless method.new_adapter is true"
    if why is None:
        return None
    if isinstance(stage, PpoConfig):
        copy = "say stage.reference: copy, a second copy of the weights, or stage.kl.coefficient: 0"
        return f"stage.reference: adapter_off: stage ppo {why}; {copy}"
    more = "say stage.reference: cached, log-probabilities computed before, or copy, a second copy of the weights"
    if isinstance(stage, KtoConfig):
        return f"stage.type: kto {why}; {more}"
    names = " and ".join(name for name in stage.weights if name not in FREE)
    return f"stage.loss: {names} {why}; {more}; or take a loss without a reference ({', '.join(FREE)})"


def _prompts(job: JobConfig) -> str | None:
    sets = [f"data.train[{number}]" for number, item in enumerate(job.data.train) if item.prompts_only]
    sets += [f"data.eval[{number}]" for number, item in enumerate(job.data.eval) if item.prompts_only]
    if not sets or job.stage.rows == "prompts":
        return None
    return f"{sets[0]}.prompts_only: stage {job.stage.type} learns from the answers of the data; only ppo makes its own"


def _router_loss(job: JobConfig) -> str | None:
    if job.stage.rows not in ("texts", "conversations") and job.model.moe_aux_loss:
        return f"model.moe_aux_loss: stage {job.stage.type} adds no router's loss; leave it out"
    return None


def _evaluation(job: JobConfig) -> str | None:
    """Without data there is none, and what it does not say cannot be the best."""
    metric = job.train.best_metric
    if not (job.data.eval or job.data.held_out):
        key = "best_metric" if metric else "eval_steps" if job.train.eval_steps else None
        return f"train.{key}: nothing is evaluated; say data.held_out or data.eval" if key else None
    if metric is None:
        return None
    own = job.stage.measures if job.stage.rows == "prompts" else ("loss", *job.stage.measures)
    possible = [f"eval_{name}" for name in CHOOSING if name in own]
    sets = [item.name for item in job.data.eval or job.data.train]
    of_sets = [f"{name}/{of_set}" for name in possible for of_set in sets] if len(sets) > 1 else []
    if metric not in possible + of_sets:
        more = f", each also of one set, such as {of_sets[0]}" if of_sets else ""
        return f"train.best_metric: {metric} is not told in stage {job.stage.type}; known: {', '.join(possible)}{more}"
    return None


def _mask(job: JobConfig) -> str | None:
    key = "train_on_prompt" if job.data.train_on_prompt else "mask_history" if job.data.mask_history else None
    if job.stage.rows not in ("texts", "conversations") and key:
        return f"data.{key}: stage {job.stage.type} learns from the last answer, nothing else; leave it out"
    return None


def _head_rate(job: JobConfig) -> str | None:
    """The head's parameters need a group of their own, which our own optimizers arrange otherwise."""
    rate = getattr(job.stage, "head_learning_rate", None)
    if rate is not None and not isinstance(job.optimizer, LibraryConfig):
        return f"stage.head_learning_rate: optimizer {job.optimizer.type} has one rate for all; leave it out"
    return None
