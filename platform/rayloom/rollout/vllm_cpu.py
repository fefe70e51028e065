"""Functions of vLLM's for CPU that others stand in for: products of one adapter, an output layer without one, draws.

Beside `vllm_engine` the only file that knows vLLM, and its insides: `VERSION` there is the one that it was written for.
Each of these gives what vLLM's own gives (a draw: with the same probabilities), and hands on to it whatever else it may
be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rayloom.rollout.inverse_sampling import draw_tokens, uniform_numbers
from rayloom.rollout.one_adapter import Factors, add_products


def use_cpu_functions() -> None:
    """Put them in the place of vLLM's, in this process, once. Before a model is loaded."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.v1.sample.ops import topk_topp_sampler

    def draws(theirs: Callable[..., Any]) -> Callable[..., Any]:
        return _draws_or_theirs(theirs, topk_topp_sampler.apply_top_k_top_p)

    for owner, name, ours in (
        (PunicaWrapperCPU, "add_lora_linear", _linear_or_theirs),
        (PunicaWrapperCPU, "add_lora_logits", _logits_or_theirs),
        (topk_topp_sampler.TopKTopPSampler, "forward_cpu", draws),
    ):
        theirs = getattr(owner, name)
        if not getattr(theirs, "is_ours", False):
            setattr(owner, name, ours(theirs))


def _linear_or_theirs(theirs: Callable[..., None]) -> Callable[..., None]:
    def add_lora_linear(
        wrapper: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Factors,
        lora_b_stacked: Factors,
        scale: float,
        output_slices: tuple[int, ...],
        **options: Any,
    ) -> None:
        if len(lora_a_stacked[0]) > 1 or scale != 1 or options or not wrapper.is_prefill:
            theirs(wrapper, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **options)
        elif not wrapper.no_lora:  # the batch is of the base model itself
            add_products(y, x, lora_a_stacked, lora_b_stacked)

    add_lora_linear.is_ours = True  # type: ignore[attr-defined]
    return add_lora_linear


def _logits_or_theirs(theirs: Callable[..., None]) -> Callable[..., None]:
    def add_lora_logits(
        wrapper: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **options: Any,
    ) -> None:
        if len(lora_a_stacked) > 1 or scale != 1 or options:
            theirs(wrapper, y, x, lora_a_stacked, lora_b_stacked, scale, **options)
        elif not wrapper.no_lora and lora_a_stacked.any():
            add_products(y, x, (lora_a_stacked,), (lora_b_stacked,))

    add_lora_logits.is_ours = True  # type: ignore[attr-defined]
    return add_lora_logits


def _draws_or_theirs(theirs: Callable[..., Any], restrict: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def forward_cpu(
        sampler: Any,
        logits: torch.Tensor,
        generators: Mapping[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if sampler.use_fp64_gumbel or sampler.logprobs_mode != "processed_logprobs":
            drawn: tuple[torch.Tensor, torch.Tensor | None] = theirs(sampler, logits, generators, k, p)
            return drawn
        log_probs = restrict(logits, k, p).log_softmax(-1, dtype=torch.float32)
        return draw_tokens(log_probs.exp(), uniform_numbers(len(logits), generators)), log_probs

    forward_cpu.is_ours = True  # type: ignore[attr-defined]
    return forward_cpu
