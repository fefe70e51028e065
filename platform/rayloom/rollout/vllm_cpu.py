"""Functions of vLLM's for CPU that others stand in for: products of one adapter, draws, norms, gated layers.

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

_KERNELS = "vllm_c_cpu"
"""What vLLM is to call its own compiled norms by."""
_VECTOR = 16
"""Numbers that these take at a time, or a multiple of it."""


def use_cpu_functions() -> dict[str, Any]:
    """Put them in the place of vLLM's, in this process, once. Before a model is loaded.

    Returns:
        What an engine must be told to take the norms.
    """
    from vllm import ir
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.v1.sample.ops import topk_topp_sampler

    def draws(theirs: Callable[..., Any]) -> Callable[..., Any]:
        return _draws_or_theirs(theirs, topk_topp_sampler.apply_top_k_top_p)

    for owner, name, ours in (
        (PunicaWrapperCPU, "add_lora_linear", _linear_or_theirs),
        (PunicaWrapperCPU, "add_lora_logits", _logits_or_theirs),
        (topk_topp_sampler.TopKTopPSampler, "forward_cpu", draws),
        (SiluAndMul, "forward_cpu", _gated),
    ):
        theirs = getattr(owner, name)
        if not getattr(theirs, "is_ours", False):
            setattr(owner, name, ours(theirs))
    for name, norm, fits in (("rms_norm", _norm, _norm_fits), ("fused_add_rms_norm", _norm_of_sum, _norm_of_sum_fits)):
        operation = getattr(ir.ops, name)
        if _KERNELS not in operation.impls:
            operation.register_impl(_KERNELS, supports_args=fits, inplace=norm is _norm_of_sum)(norm)
    return {"ir_op_priority": {"rms_norm": [_KERNELS, "native"], "fused_add_rms_norm": [_KERNELS, "native"]}}


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


def _gated(_: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward_cpu(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return gated(x)

    forward_cpu.is_ours = True  # type: ignore[attr-defined]
    return forward_cpu


def gated(x: torch.Tensor) -> torch.Tensor:
    """(..., 2 width) -> (..., width): SiLU of the first half times the second (SwiGLU, arXiv 2002.05202), without a
    third tensor."""
    first, second = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(first).mul_(second)


# vLLM's package has compiled norms for CPU, which it takes in compiled models only; one does the work of eight of the
# operations that it has for them otherwise. (Its compiled gated layer is slower than the plain one.)


def _norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def _norm_of_sum(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _norm_fits(x: Any, weight: Any, epsilon: Any, variance_size: Any = None) -> bool:
    """Whether the compiled norm takes it: contiguous, of one type, all of a row's numbers, in whole vectors of them."""
    if variance_size is not None or weight is None or x.shape[-1] % _VECTOR:
        return False
    return bool(weight.dtype == x.dtype and x.is_contiguous())


def _norm_of_sum_fits(x: Any, x_residual: Any, weight: Any, epsilon: Any, variance_size: Any = None) -> bool:
    return _norm_fits(x, weight, epsilon, variance_size) and x_residual.dtype == x.dtype and x_residual.is_contiguous()
