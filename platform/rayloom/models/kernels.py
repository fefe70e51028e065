"""Fused GPU kernels of other packages: refused where they cannot run, else left to their package."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from rayloom.errors import RequestError
from rayloom.models.config import ModelConfig

_PACKAGES = {"liger": "liger_kernel", "unsloth": "unsloth"}
_PIP = {"liger": "liger-kernel", "unsloth": "unsloth"}


def check_kernels(model: ModelConfig, *, device: str | None, zero3: bool) -> None:
    """Refuse kernels that cannot run.

    Args:
        device: "cpu" or "gpu"; None: not known yet.

    Raises:
        RequestError: no GPU, the package is not installed, or it does not work with ZeRO-3.
    """
    name = model.kernels
    if name == "none":
        return
    if device == "cpu":
        raise RequestError(f"model.kernels: {name}: its kernels run on a GPU, and the job runs on CPU")
    if find_spec(_PACKAGES[name]) is None:
        raise RequestError(f"model.kernels: {name}: the Python package {_PIP[name]} is not installed")
    if name == "unsloth" and zero3:
        raise RequestError("model.kernels: unsloth loads whole models and does not work with train.deepspeed zero3")


def apply_liger(model: Any) -> None:
    """Liger's norms, rotary positions, activations and loss in a loaded model.

    Not its fused output layer: the logits of trained positions only (`rayloom.train.batch`) save more.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False, cross_entropy=True)


def load_unsloth(source: str, *, length: int | None, dtype: Any, four_bits: bool, trust_remote_code: bool) -> Any:
    """A model as Unsloth loads it, with its kernels."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        model_name=source,
        max_seq_length=length,
        dtype=dtype,
        load_in_4bit=four_bits,
        full_finetuning=not four_bits,
        trust_remote_code=trust_remote_code,
    )
    return model
