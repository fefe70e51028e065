"""Which attention a model computes, and which it cannot. The shifted one itself is in `shifted_attention.py`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from rayloom.errors import RequestError
from rayloom.models.config import ModelConfig


def attention_implementation(model: ModelConfig) -> str | None:
    """`model.attention` in transformers' words; None: what it takes by itself."""
    return {"auto": None, "flex": "flex_attention"}.get(model.attention, model.attention)


def check_attention(model: ModelConfig, device: str | None) -> None:
    """Refuse an attention that cannot train here: PyTorch's flex attention has no backward pass on CPU.

    Args:
        device: "cpu" or "gpu"; None: not known yet.

    Raises:
        RequestError: no GPU, or the package is not installed.
    """
    if model.attention not in ("flash_attention_2", "flex"):
        return
    if device == "cpu":
        raise RequestError(
            f"model.attention: {model.attention} needs a GPU, and the job runs on CPU; use sdpa, or auto"
        )
    if model.attention == "flash_attention_2" and find_spec("flash_attn") is None:
        raise RequestError("model.attention: flash_attention_2: the Python package flash-attn is not installed")


def group_size(cutoff: int) -> int:
    """Tokens of a group: a quarter of the cutoff.

    Raises:
        RequestError: the cutoff does not divide into four groups that can be halved.
    """
    if cutoff % 8:
        near = max(8, cutoff // 8 * 8)
        raise RequestError(
            f"model.shifted_attention: data.cutoff {cutoff} does not divide into four groups of an even length; "
            f"take a multiple of 8, such as {near}"
        )
    return cutoff // 4


def check_shifted_attention(model_class: Any, config: Any) -> None:
    """Refuse a model that cannot attend in shifted groups.

    Raises:
        RequestError: it has an attention of its own, or does more with its scores than softmax.
    """
    kind = config.model_type
    if config.get_text_config(decoder=True) is not config:
        raise RequestError(
            f"model.shifted_attention: {kind} has parts beside its language model; it is for text models"
        )
    if not model_class._supports_attention_backend:
        raise RequestError(
            f"model.shifted_attention: models of type {kind} do not take their attention from transformers' registry"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise RequestError(f"model.shifted_attention: {kind} caps its attention scores, which sdpa does not compute")
