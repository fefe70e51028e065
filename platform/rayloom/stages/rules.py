"""What of a stage does not go together with the rest of the job: told from the job file alone, without any library."""

from __future__ import annotations

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.config import LoraConfig
from rayloom.stages.config import DpoConfig


def check_stage(job: JobConfig) -> None:
    """Refuse what the job file alone tells.

    Raises:
        RequestError: parts of the job that do not go together with its stage.
    """
    faults = [text for rule in (_reference, _router_loss, _mask) if (text := rule(job))]
    if faults:
        raise RequestError(*faults)


def _reference(job: JobConfig) -> str | None:
    """The reference is the model with its adapter off, so what was trained before must be beneath the adapter."""
    stage, method = job.stage, job.method
    if not isinstance(stage, DpoConfig) or not stage.has_reference:
        return None
    why = None
    if method.type in ("full", "freeze"):
        why = "compares with the model with its adapter off; use method.type: lora"
    elif isinstance(method, LoraConfig) and method.changes_base:
        why = f"compares with weights of which method.init: {method.init} takes a part; leave it out"
    elif isinstance(method, LoraConfig) and method.continues:
        why = "would compare with the model as it was before method.adapters; say method.new_adapter: true"
    free = "or take a loss without a reference (cpo, simpo, orpo)"
    return f"stage.loss: {stage.loss} {why}, {free}" if why else None


def _router_loss(job: JobConfig) -> str | None:
    if isinstance(job.stage, DpoConfig) and job.model.moe_aux_loss:
        return "model.moe_aux_loss: preference training adds no router's loss; leave it out"
    return None


def _mask(job: JobConfig) -> str | None:
    key = "train_on_prompt" if job.data.train_on_prompt else "mask_history" if job.data.mask_history else None
    if isinstance(job.stage, DpoConfig) and key:
        return f"data.{key}: preference training compares the answers behind one prompt, nothing else; leave it out"
    return None
