"""Which number format a model computes in, and which one its weights stand in.

Mixed precision: the forward pass computes in 16 bits, weights that train stand in fp32 (under DeepSpeed its engine
holds these), weights that do not train stand in 16 bits. `pure_bf16`: weights, gradients and optimizer states in bf16.
"""

from __future__ import annotations

from typing import Any, Literal

from rayloom.errors import RequestError

Precision = Literal["bf16", "fp16", "fp32", "pure_bf16"]


def computes_bf16(device: str) -> bool:
    """Whether `device` ("cpu" or "gpu") has instructions for bf16, not just an emulation.

    On CPU: AVX512-BF16 or AMX on x86, bf16 dot products on ARM, as torch reports them.
    """
    import torch

    if device == "gpu":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "arm_bf16", "bf16"))


def choose_precision(requested: str, device: str, *, bf16: bool) -> Precision:
    """`auto` is bf16 where the device computes it, else fp16 on a GPU, else fp32.

    Raises:
        RequestError: a precision that the device has not.
    """
    if requested == "auto":
        if bf16:
            return "bf16"
        return "fp16" if device == "gpu" else "fp32"
    if requested in ("bf16", "pure_bf16") and not bf16:
        other = "fp16 or fp32" if device == "gpu" else "fp32"
        raise RequestError(
            f"train.precision: {requested}: this {device.upper()} has no bf16 arithmetic; use {other}, or auto"
        )
    if requested == "fp16" and device == "cpu":
        raise RequestError("train.precision: fp16 needs a GPU; on CPU use bf16, fp32 or auto")
    if requested not in ("bf16", "fp16", "fp32", "pure_bf16"):
        raise ValueError(f"unknown precision {requested!r}")
    return requested  # type: ignore[return-value]


def engine_precision(requested: str, trained: Precision, device: str) -> Precision:
    """What engines compute in that answer for a trainer. `auto`: what it computes in; in fp32, with twice the memory
    for the weights, on a CPU that is faster so, as the trainer's own products are there (`models/wide_products.py`).

    Args:
        device: "cpu" or "gpu", of the engines; which CPU is told from this machine's.
    """
    if requested != "auto":
        return requested  # type: ignore[return-value]
    if device == "cpu":
        from rayloom.models.wide_products import float32_is_faster  # imports torch

        if float32_is_faster():
            return "fp32"
    return "bf16" if trained == "pure_bf16" else trained


def computing_dtype(precision: Precision) -> Any:
    """The `torch.dtype` that matrix products are computed in."""
    import torch

    return {"bf16": torch.bfloat16, "pure_bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
        precision
    ]


def cast_trained(model: Any, precision: Precision) -> None:
    """Put the weights that train into the format that they are updated in: bf16 under `pure_bf16`, else fp32.

    Not under DeepSpeed, which keeps its own fp32 copy of what trains.
    """
    import torch

    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
