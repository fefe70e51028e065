"""What a frozen output layer says of some tokens, without their logits.

Of a small model the logits are the largest tensor, and the softmax and its gradient go over them a dozen times. But a
token's log-probability is a function of its hidden state alone: its gradient is one row of that state's size, whatever
a loss does with it later. Both are added up over parts of the vocabulary, as FlashAttention adds up over parts of the
keys (Dao et al. 2022, https://arxiv.org/abs/2205.14135): a part's logits stay in the cache, and no product is computed
twice.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from rayloom.models.wide_products import is_wide

Entropy = Literal["none", "measured", "trained"]
"""What is wanted of entropies: nothing, their values, or their gradient too."""
_ROWS = 1024
"""Positions at a time."""
_TILE = 2**19
"""Numbers of the output layer's weight at a time on CPU: they and their logits stay in the cache."""
_TOKENS = 2**15
"""Tokens of the vocabulary at a time elsewhere, where many small operations take longer than a few large ones."""


def head_scores(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    *,
    entropy: Entropy = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rayloom.train.token_scores.logit_scores` says of the layer's logits, which are rounded here as they are
    there; in float64 where `hidden` is.

    Args:
        head: the output layer, taken in the type of `hidden`. Nothing of it gets a gradient.
        hidden: (kept, size).
        labels: (kept,)
    """
    scores: Any = _Scores.apply
    with torch.autocast(hidden.device.type, enabled=False):
        log_probs, entropies = scores(hidden, head.weight, head.bias, labels, temperature, entropy)
    return log_probs, entropies


def _wide(hidden: torch.Tensor) -> torch.dtype:
    """What sums are in."""
    return torch.promote_types(hidden.dtype, torch.float32)


def as_computed(states: torch.Tensor) -> torch.Tensor:
    """Hidden states as the output layer takes them: in autocast's type, within it."""
    device = states.device.type
    return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: float,
        entropy: Entropy,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, entropies = (hidden.new_zeros(len(labels), dtype=_wide(hidden)) for _ in range(2))
        slopes = []
        for start in range(0, len(labels), _ROWS):
            part = slice(start, start + _ROWS)
            rows = _Rows(hidden[part], labels[part], temperature, entropy, ctx.needs_input_grad[0])
            rows.go_through(weight, bias)
            log_probs[part], entropies[part] = rows.scores()
            if ctx.needs_input_grad[0]:
                slopes.append(rows.slopes(weight))
        if slopes:
            ctx.save_for_backward(torch.cat(slopes, 1))
        ctx.dtype = hidden.dtype
        if entropy != "trained":
            ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        by_hidden = gradients[0].unsqueeze(1) * slopes[0]
        if len(slopes) > 1:
            by_hidden.addcmul_(gradients[1].unsqueeze(1), slopes[1])
        return by_hidden.to(ctx.dtype), None, None, None, None, None


class _Rows:
    """Sums over the vocabulary for some positions. With l a logit less the largest one so far, and w the layer's row:
    of e^l, of e^l l, of e^l w and of e^l l w, as far as they are wanted."""

    def __init__(
        self, hidden: torch.Tensor, labels: torch.Tensor, temperature: float, entropy: Entropy, slopes: bool
    ) -> None:
        self._hidden, self._labels, self._temperature = hidden, labels, temperature
        self._entropy = entropy
        self._type = _wide(hidden)
        column = hidden.new_zeros(len(hidden), 1, dtype=self._type)
        self._most, self._said = column - torch.inf, column.clone()
        self._exp, self._exp_l = column.clone(), column.clone()
        rows = 0 if not slopes else 2 if entropy == "trained" else 1
        self._exp_w = hidden.new_zeros(rows, *hidden.shape, dtype=self._type)

    def go_through(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Add every part of the vocabulary."""
        size = max(1, _TILE // weight.shape[1]) if weight.device.type == "cpu" else _TOKENS
        hidden = self._hidden.to(self._type) if is_wide(self._hidden) else self._hidden
        for start in range(0, len(weight), size):
            tile = weight[start : start + size].to(self._hidden.dtype).to(hidden.dtype)
            logits = hidden @ tile.T
            if bias is not None:
                logits += bias[start : start + size]
            logits = logits.to(self._hidden.dtype).to(self._type)
            self._add(logits if self._temperature == 1 else logits.div_(self._temperature), tile, start)

    def _add(self, logits: torch.Tensor, tile: torch.Tensor, start: int) -> None:
        here = (self._labels - start).unsqueeze(-1)
        is_here = (here >= 0) & (here < len(tile))
        self._said += logits.gather(1, here.clamp(0, len(tile) - 1)) * is_here
        most = torch.maximum(self._most, logits.amax(1, keepdim=True))
        if start:  # what was added before was counted from a logit that is smaller by `rise`
            rise = most - self._most
            if self._entropy != "none":
                self._exp_l -= self._exp * rise
            if len(self._exp_w) > 1:
                self._exp_w[1].addcmul_(self._exp_w[0], rise, value=-1)
            for total in (self._exp, self._exp_l, *self._exp_w):
                total *= (-rise).exp_()
        self._most = most
        logits -= most
        exp = logits.exp() if self._entropy != "none" else logits.exp_()
        self._exp += exp.sum(1, keepdim=True)
        if len(self._exp_w):
            self._exp_w[0] += exp.to(tile.dtype) @ tile
        if self._entropy != "none":
            exp_l = exp.mul_(logits)
            self._exp_l += exp_l.sum(1, keepdim=True)
            if len(self._exp_w) > 1:
                self._exp_w[1] += exp_l.to(tile.dtype) @ tile

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies, (rows,) both."""
        log_exp = self._exp.log()
        log_probs = self._said - self._most - log_exp
        entropies = log_exp - self._exp_l / self._exp if self._entropy != "none" else torch.zeros_like(log_probs)
        is_label = self._labels >= 0
        return log_probs.squeeze(-1) * is_label, entropies.squeeze(-1) * is_label

    def slopes(self, weight: torch.Tensor) -> torch.Tensor:
        """How a row's log-probability rises with its hidden state, (1, rows, size); behind it the same of its entropy,
        where that is trained."""
        mean = self._exp_w[0] / self._exp
        slopes = [weight[self._labels.clamp(min=0)].to(self._type) - mean]
        if len(self._exp_w) > 1:
            slopes.append((self._exp_l * mean - self._exp_w[1]) / self._exp)
        return torch.stack(slopes) * ((self._labels >= 0).unsqueeze(-1) / self._temperature)
