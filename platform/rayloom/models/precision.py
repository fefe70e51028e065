"""Which number format a model computes in."""

from __future__ import annotations

from typing import Literal

from rayloom.errors import RequestError

Precision = Literal["bf16", "fp16", "fp32"]


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
    if requested == "bf16" and not bf16:
        other = "fp16 or fp32" if device == "gpu" else "fp32"
        raise RequestError(f"train.precision: bf16: this {device.upper()} has no bf16 arithmetic; use {other}, or auto")
    if requested == "fp16" and device == "cpu":
        raise RequestError("train.precision: fp16 needs a GPU; on CPU use bf16, fp32 or auto")
    if requested not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"unknown precision {requested!r}")
    return requested  # type: ignore[return-value]
