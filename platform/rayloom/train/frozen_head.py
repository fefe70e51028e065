"""Losses of tokens behind a frozen output layer, some positions at a time.

Of a small model the logits are the largest tensor, and there are several of them: in 16 bits, in float32, their
softmax, its gradient. Where the output layer is not trained, what a position's loss does to its hidden state can be
computed with the loss itself, so that the logits of some positions are gone before the next are made (as Liger does
on GPUs, https://arxiv.org/abs/2410.10989). No product is computed twice. Plain cross-entropy asks for log-probabilities
only, and has them without any logits (`rayloom.train.head_scores`).
"""

from __future__ import annotations

from typing import Any, cast

import torch

from rayloom.losses.token import TokenLoss, cross_entropy
from rayloom.models.wide_products import FrozenLinear
from rayloom.train.head_scores import as_computed, head_scores

_CHUNK = 256
"""Positions whose logits stand at a time."""


def frozen_head(model: Any) -> torch.nn.Linear | None:
    """The output layer, where it is frozen and whole, and gives the model's logits as they are: no cap, no scale."""
    head = model.get_output_embeddings()
    if type(head) not in (torch.nn.Linear, FrozenLinear) or not is_frozen(head):
        return None
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        return None  # the model adds a loss of its own
    given: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: given.append(output))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[0, 1]], device=head.weight.device), use_cache=False).logits
    finally:
        hook.remove()
        model.train(was_training)
    is_whole: bool = len(given) == 1 and torch.equal(given[0], logits)
    return head if is_whole else None


def is_frozen(head: torch.nn.Module) -> bool:
    """Whether a layer's weights are not trained, and whole: ZeRO-3 shards them when it wraps the model."""
    return not any(one.requires_grad or hasattr(one, "ds_id") for one in head.parameters())


class FrozenHeadLoss:
    """A `compute_loss_func` for transformers' Trainer, as `rayloom.stages.step_loss` is one; `take` comes before."""

    def __init__(self, head: torch.nn.Linear, loss: TokenLoss) -> None:
        self._head, self._loss = head, loss
        self._hidden: torch.Tensor | None = None
        self._autocast: dict[str, Any] = {}

    def take(self, hidden: torch.Tensor) -> None:
        """The hidden states (kept, size) of the forward pass that goes on."""
        device = hidden.device.type
        self._hidden = hidden
        self._autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }

    def __call__(self, outputs: Any, labels: torch.Tensor, *, num_items_in_batch: torch.Tensor) -> torch.Tensor:
        if "summed" in outputs:  # by `rayloom.train.row_threads`
            return cast(torch.Tensor, outputs["summed"]) / num_items_in_batch
        assert self._hidden is not None
        hidden, self._hidden = self._hidden, None
        with torch.autocast(**self._autocast):
            return self.summed(hidden, labels[0]) / num_items_in_batch

    def summed(self, hidden: torch.Tensor, labels: torch.Tensor, threads: int = 1) -> torch.Tensor:
        """The losses of hidden states (kept, size) with labels (kept,), added up.

        Args:
            threads: that do so at a time: each has a share of the positions whose logits stand.
        """
        if self._loss is cross_entropy:
            return -head_scores(self._head, as_computed(hidden), labels)[0].sum()
        summed: Any = _Summed.apply
        total: torch.Tensor = summed(hidden, labels, self._sum, max(1, _CHUNK // threads))
        return total

    def _sum(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._loss(self._head(hidden), labels).sum()


class _Summed(torch.autograd.Function):
    """The sum of a function over chunks of rows; its gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, of_chunk: Any, size: int) -> torch.Tensor:
        gradient = torch.empty_like(hidden)
        sums = []
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            with torch.enable_grad():
                chunk = hidden[part].detach().requires_grad_()
                value = of_chunk(chunk, labels[part])
            (gradient[part],) = torch.autograd.grad(value, chunk)
            sums.append(value.detach())
        ctx.save_for_backward(gradient)
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None
