"""S²-attention of LongLoRA (Chen et al. 2023, https://arxiv.org/abs/2309.12307), through transformers' registries.

A row is cut into groups of `group` tokens and a token attends within its group only. The second half of the heads works
on the row rolled left by half a group, so that its groups overlap the borders of the others: information flows on from
group to group, layer by layer. What was computed is put together to whole rows again and only then rolled back.

- Rolling brings the row's beginning behind its end, into one group. The two halves of that group do not see each other
  (as in LongLoRA's flash-attention code; the paper calls the leak "easy to be prevented").
- Which keys a query may see is the model's own rule besides: causal, its window, the examples of a packed row (told by
  positions that restart), padding. So a packed row equals its examples, each at its place in the groups.
- A row that is no whole number of groups is filled up behind its end, with keys that nobody sees.
- Only while training: in evaluation the same model sees the whole length, as it will when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rayloom.errors import RequestError
from rayloom.models.attention import check_shifted_attention

_UNSUPPORTED = {"softcap": "soft-capped scores", "s_aux": "attention sinks", "position_bias": "a bias of positions"}


def use_shifted_attention(model: Any, group: int) -> None:
    """Let a loaded model attend in shifted groups while it trains.

    Args:
        group: tokens of a group; even.

    Raises:
        RequestError: the model's attention does not go through transformers' registry.
    """
    check_shifted_attention(type(model), model.config)
    name = f"shifted_sdpa_{group}"
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, partial(shifted_attention, group=group))
    AttentionMaskInterface.register(name, partial(shifted_mask, group=group))
    plain = model.config._attn_implementation

    def choose(decoder: Any, inputs: Any) -> None:
        decoder.config._attn_implementation = name if decoder.training else plain

    # Not on `model` itself, whose `forward` PEFT calls directly, past its hooks.
    model.get_decoder().register_forward_pre_hook(choose)


def shifted_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    group: int,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls.

    Args:
        query: (batch, heads, length, head size).
        key, value: (batch, heads or a divisor of it, length, head size).
        attention_mask: what `shifted_mask` returned.

    Returns:
        (batch, length, heads, head size), and no weights.
    """
    used = [text for name, text in _UNSUPPORTED.items() if kwargs.get(name) is not None]
    if used:
        raise RequestError(f"model.shifted_attention: the model's attention has {used[0]}, which it does not compute")
    if attention_mask is None or attention_mask.dim() != 5:
        raise RequestError("model.shifted_attention: the model makes its attention mask itself, past the registry")
    heads, length = query.shape[1:3]
    key, value = (one.repeat_interleave(heads // one.shape[1], dim=1) for one in (key, value))
    filled = attention_mask.shape[2] * group
    query, key, value = (torch.nn.functional.pad(one, (0, 0, 0, filled - length)) for one in (query, key, value))
    halves = []
    for shifted, (first, last) in enumerate(((0, heads // 2), (heads // 2, heads))):
        places = -(group // 2) if shifted else 0
        q, k, v = (_group(one[:, first:last].roll(places, dims=2), group) for one in (query, key, value))
        mask = attention_mask[:, shifted].flatten(0, 1).unsqueeze(1)
        grouped = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
        halves.append(_ungroup(grouped, len(query)).roll(-places, dims=2))
    return torch.cat(halves, dim=1)[:, :, :length].transpose(1, 2).contiguous(), None


def _group(states: torch.Tensor, group: int) -> torch.Tensor:
    """(batch, heads, groups * group, size) -> (batch * groups, heads, group, size)."""
    batch, heads, length, size = states.shape
    return states.view(batch, heads, length // group, group, size).transpose(1, 2).reshape(-1, heads, group, size)


def _ungroup(states: torch.Tensor, batch: int) -> torch.Tensor:
    """The other way round."""
    groups, heads, group, size = states.shape
    return states.view(batch, groups // batch, heads, group, size).transpose(1, 2).reshape(batch, heads, -1, size)


def shifted_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    group: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """The mask function that transformers calls: which keys each query may see, within its group.

    Args:
        mask_function: the model's rule, of (batch, head, query, key) index tensors that broadcast.
        attention_mask: (batch, length), true where there is no padding; None: none is.

    Returns:
        Booleans (batch, 2, groups, group, group), a row for each query: for heads as they are and for shifted ones.
        It grows with the length, not with its square.
    """
    if q_length != kv_length:
        raise ValueError("S²-attention is for training: it has no key-value cache")
    from transformers.masking_utils import and_masks, padding_mask_function, prepare_padding_mask

    padding = prepare_padding_mask(attention_mask, kv_length, 0)
    if padding is not None:
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    filled = -(-q_length // group) * group
    places = torch.arange(filled, device=device)
    batch = torch.arange(batch_size, device=device).view(-1, 1, 1, 1)
    head = torch.zeros_like(batch)
    masks = []
    for shift in (0, group // 2):
        here = places.roll(-shift).view(1, -1, group)
        query, key = here.unsqueeze(3), here.unsqueeze(2)
        inside = (query < q_length) & (key < q_length)
        allowed = mask_function(batch, head, query.clamp(max=q_length - 1), key.clamp(max=q_length - 1))
        same_block = (query + shift) // group == (key + shift) // group
        # What fills a row up sees itself: a query without any key would give no number.
        masks.append(((allowed & inside & same_block) | (~inside & (query == key))).expand(batch_size, -1, -1, -1))
    return torch.stack(masks, dim=1)
