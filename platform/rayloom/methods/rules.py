"""What of a method does not go together with the rest of the job: told from the job file alone, without any library."""

from __future__ import annotations

from collections.abc import Callable

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.config import FreezeConfig, LoraConfig, PeftConfig

VIRTUAL_TOKENS = ("prompt", "p_tuning", "prefix")
# Tuners of PEFT that were seen to learn under ZeRO-3 what they learn without, and to be saved whole.
_ON_SHARDS = frozenset(
    "BEFT BOFT C3A FOURIERFT GLORA GRALORA HIRA HRA IA3 LILY LOKR LORA MISS OFT PEANUT PSOFT PVERA ROAD SHIRA UNILORA "
    "VBLORA VERA WAVEFT".split()
)


def check_combination(job: JobConfig) -> None:
    """Refuse what the job file alone tells.

    Raises:
        RequestError: parts of the job that do not go together.
    """
    faults = [text for rule in _RULES if (text := rule(job))]
    if faults:
        raise RequestError(*faults)


def _packed_prompts(job: JobConfig) -> str | None:
    if job.method.type in VIRTUAL_TOKENS and job.packs:
        return (
            f"data.packing: virtual tokens (method.type: {job.method.type}) stand before a row, and in a packed row "
            "only its first example would see them; set data.packing: false"
        )
    return None


def _checkpointed_prefix(job: JobConfig) -> str | None:
    if job.method.type == "prefix" and job.train.activation_checkpointing:
        return (
            "train.activation_checkpointing: a prefix (method.type: prefix) is in the cache of keys and values, which "
            "is off when activations are recomputed; set it to false, or use method.type: prompt"
        )
    return None


def _sharded_weights(job: JobConfig) -> str | None:
    """What must read or change whole weights when the method is attached."""
    if job.train.deepspeed != "zero3":
        return None
    method = job.method
    why = None
    if isinstance(method, LoraConfig) and method.changes_base:
        why = f"method.init: {method.init} takes a part out of whole weights"
    elif isinstance(method, LoraConfig) and method.merged:
        why = "method.adapters are merged into whole weights"
    elif isinstance(method, FreezeConfig) and method.expand:
        why = "method.expand copies whole layers"
    elif isinstance(method, PeftConfig) and method.peft_type.upper() not in _ON_SHARDS:
        why = f"method.peft_type: {method.peft_type.upper()} is not known to train on them"
    return f"train.deepspeed: zero3 has shards of weights only, and {why}; use zero2" if why else None


def _new_tokens(job: JobConfig) -> str | None:
    """Rows that nobody trains would stay the noise that they begin as."""
    model, method = job.model, job.method
    key = "add_tokens" if model.add_tokens else "add_special_tokens"
    if not (model.add_tokens or model.add_special_tokens) or method.type == "full":
        return None
    if not isinstance(method, LoraConfig):
        return f"model.{key}: rows of new tokens train with method.type lora or full; {method.type} leaves them be"
    if method.continues:
        return f"model.{key}: the adapter that goes on knows no new tokens; say method.new_adapter: true"
    return None


_RULES: tuple[Callable[[JobConfig], str | None], ...] = (
    _packed_prompts,
    _checkpointed_prefix,
    _sharded_weights,
    _new_tokens,
)
