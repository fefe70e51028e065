"""Attention of packed rows, one example after the other, through transformers' registries.

PyTorch's CPU attention with a mask computes every pair of a row's tokens and throws most of them away: of a row with
five examples of one length nine tenths. Without a mask, example by example, that work is not done. What each query may
see is still told by the model's own mask. It is read once a batch; where it says anything else than "causal within each
example" (a sliding window, say), the usual function computes with it. In bf16 `rayloom.models.block_attention` computes
all examples of a batch, also where it needs no mask.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from rayloom.models.block_attention import Sizes, causal_attention
from rayloom.models.packing import packing_is_exact

NAME = "packed_sdpa"


def use_packed_attention(model: Any) -> None:
    """Let a loaded model that takes sdpa from transformers' registry compute packed rows example by example on CPU."""
    config = model.config
    if not model._supports_attention_backend or config._attn_implementation != "sdpa":
        return
    if config.get_text_config(decoder=True) is not config:
        return  # its parts that see or hear have no such rows
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = NAME


def packs_cheaply(model: Any, device: torch.device) -> bool:
    """Whether a model on this device keeps the examples of a packed row apart, and computes nothing between them.

    Layers whose window is narrower than an example are exact too, but on CPU they compute the whole row's mask.
    """
    cheap_on = {NAME: ("cpu",), "flash_attention_2": ("cuda",)}.get(model.config._attn_implementation, ())
    return device.type in cheap_on and packing_is_exact(model.config.model_type) is True


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls.

    Args:
        query: (batch, heads, length, head size).
        key, value: (batch, heads or a divisor of it, length, head size).
        attention_mask: booleans (batch, 1, length, length), true where a query sees a key; None: causal.

    Returns:
        (batch, length, heads, head size), and no weights. What padding sees is 0.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = query.device.type == "cpu" and kwargs.get("position_bias") is None and kwargs.get("cache") is None
    dropout = kwargs.get("dropout", 0.0)
    by_blocks = query.dtype == torch.bfloat16 and not dropout
    sizes = None
    if plain and attention_mask is not None:
        sizes = _LAST.sizes(attention_mask)
    elif plain and by_blocks and query.shape[2] == key.shape[2] and _is_causal(module, kwargs.get("is_causal")):
        sizes = ((query.shape[2], True),) * query.shape[0]
    if sizes is None:
        whole: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return whole
    scale = kwargs.get("scaling")
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    if by_blocks:
        attended = causal_attention(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, sizes)
    else:
        attended = _one_by_one((q, k, v), sizes, dropout_p=dropout, scale=scale)
    return attended.unflatten(0, (query.shape[0], query.shape[2])), None


def _one_by_one(flat: tuple[torch.Tensor, ...], sizes: Sizes, **options: Any) -> torch.Tensor:
    """PyTorch's attention of each example by itself; arguments and value as `causal_attention` has them."""
    groups = flat[0].shape[1] // flat[1].shape[1]
    # `split`, whose backward pass puts the parts together: that of a slice would make a tensor of the whole for each.
    lengths = [length for length, _ in sizes]
    done = []
    for (_, is_example), *parts in zip(sizes, *(one.split(lengths) for one in flat), strict=True):
        query, key, value = (one.transpose(0, 1) for one in parts)
        if is_example:
            key, value = (one.repeat_interleave(groups, 0).unsqueeze(0) for one in (key, value))
            attended = torch.nn.functional.scaled_dot_product_attention(
                query.unsqueeze(0), key, value, is_causal=True, **options
            )[0]
        else:
            attended = query.new_zeros(*query.shape[:2], value.shape[-1])
        done.append(attended.transpose(0, 1))
    return torch.cat(done)


def _is_causal(module: Any, said: bool | None) -> bool:
    return bool(getattr(module, "is_causal", True) if said is None else said)


class _LastMask(threading.local):
    """What was read of the mask that came last to this thread: every layer of a forward pass gets the same."""

    def __init__(self) -> None:
        self._mask: weakref.ref[torch.Tensor] | None = None
        self._sizes: Sizes | None = None

    def sizes(self, mask: torch.Tensor) -> Sizes | None:
        if self._mask is None or self._mask() is not mask:
            self._mask, self._sizes = weakref.ref(mask), example_sizes(mask)
        return self._sizes


_LAST = _LastMask()


def example_sizes(mask: torch.Tensor) -> Sizes | None:
    """The examples of a batch, in order, with the padding between them.

    Args:
        mask: booleans (batch, 1, length, length).

    Returns:
        None: some token sees anything else than its own example up to itself.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    sees = mask[:, 0]
    real = sees.diagonal(dim1=1, dim2=2)  # padding is a key that nobody sees, itself neither
    begins = real & (sees.sum(2) == 1)
    number = begins.cumsum(1)
    same = number.unsqueeze(2) == number.unsqueeze(1)
    expected = (same & real.unsqueeze(1)).tril()
    if not torch.equal(sees & real.unsqueeze(2), expected & real.unsqueeze(2)):
        return None
    # A run ends where an example begins, or where padding begins or ends; and with each row.
    ends = begins.clone()
    ends[:, 1:] |= real[:, 1:] != real[:, :-1]
    ends[:, 0] = True
    starts = ends.flatten().nonzero().flatten().tolist()
    is_example = real.flatten()[starts].tolist()
    if any(example and not begin for example, begin in zip(is_example, begins.flatten()[starts].tolist(), strict=True)):
        return None  # padding within an example
    edges = [*starts, real.numel()]
    return tuple((after - before, one) for before, after, one in zip(edges, edges[1:], is_example, strict=False))
