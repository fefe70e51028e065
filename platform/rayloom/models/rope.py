"""RoPE scaling: stretch rotary positions so that longer rows fit.

The factor is the least whole number that makes the cutoff fit, `ceil(cutoff / length)`, as LongLoRA and LlamaFactory
have it. transformers computes the frequencies (`modeling_rope_utils.py`) from `rope_parameters`.
"""

from __future__ import annotations

from typing import Any

from rayloom.errors import RequestError
from rayloom.models.architecture import Architecture

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope_factor(cutoff: int, length: int) -> int:
    """The least whole factor by which `length` positions hold `cutoff` tokens; 1: they do already."""
    return max(1, -(-cutoff // length))


def scaled_parameters(parameters: dict[str, Any], kind: str, factor: int, length: int) -> dict[str, Any]:
    """`rope_parameters` stretched by `factor`.

    Args:
        parameters: the model's own, unscaled; by layer type (`{"full_attention": {...}, ...}`) only layers that see the
            whole row are stretched: those of a sliding window never look further than they were made for.
        length: positions that the model was made for.
    """
    if all(isinstance(value, dict) for value in parameters.values()):
        wide = [name for name in parameters if name == "full_attention"] or list(parameters)
        return {
            name: scaled_parameters(value, kind, factor, length) if name in wide else value
            for name, value in parameters.items()
        }
    scaled = {**parameters, "rope_type": kind, "factor": float(factor)}
    if kind in ("dynamic", "yarn", "llama3"):
        scaled["original_max_position_embeddings"] = length
    return {**scaled, **_LLAMA3} if kind == "llama3" else scaled


def needed_factor(architecture: Architecture, kind: str, cutoff: int) -> int:
    """By how much the model's positions must be stretched for rows of `cutoff` tokens; 1: not at all.

    Raises:
        RequestError: the model has no rotary positions, does not say its length, or is stretched already and still too
            short.
    """
    if not architecture.has_rope:
        raise RequestError(
            f"model.rope_scaling: {kind}: a model of type {architecture.model_type} has no rotary positions that could "
            "be scaled; leave it out and keep data.cutoff within the model's length"
        )
    if architecture.length is None:
        raise RequestError(
            f"model.rope_scaling: {kind}: the model's config.json has no max_position_embeddings, so it cannot be told "
            "by how much to scale"
        )
    factor = rope_factor(cutoff, architecture.length)
    own = _own_types(architecture.text.rope_parameters) - {"default"}
    if factor > 1 and own:
        raise RequestError(
            f"model.rope_scaling: {kind}: the model's positions are scaled already ({', '.join(sorted(own))}, to "
            f"{architecture.length} tokens); keep data.cutoff within that"
        )
    return factor


def scale_rope(architecture: Architecture, kind: str, cutoff: int) -> int:
    """Stretch the positions in the model's configuration, which this changes. Returns the factor; 1: nothing changed.

    Raises:
        RequestError: as `needed_factor`.
    """
    factor = needed_factor(architecture, kind, cutoff)
    if factor > 1:
        text, length = architecture.text, architecture.length
        assert length is not None  # else `needed_factor` raises
        text.rope_parameters = scaled_parameters(text.rope_parameters, kind, factor, length)
        if kind != "dynamic":  # dynamic takes max_position_embeddings for the length before scaling
            text.max_position_embeddings = factor * length
    return factor


def _own_types(parameters: dict[str, Any]) -> set[str]:
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(one.get("rope_type", "default")) for one in nested or [parameters]}
