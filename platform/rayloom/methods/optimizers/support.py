"""Where each optimizer works: with which DeepSpeed stages, on several workers, on which device, with which package.

`SUPPORT` is the one table; `refusals` and `check_environment` read it, each fault in one sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from rayloom.errors import RequestError

ZERO_STAGES = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Support:
    """What one optimizer needs and allows."""

    deepspeed: tuple[str, ...] = ZERO_STAGES
    """Stages of DeepSpeed that it works with."""
    deepspeed_reason: str = ""
    """Why not with the others."""
    one_worker: str = ""
    """Why it refuses several workers; empty: it does not."""
    in_backward: bool = False
    """It steps within the backward pass, so there is no moment at which all gradients are there."""
    base_weights: bool = False
    """It is made for the model's own weights (methods `full` and `freeze`), not for adapters."""
    scheduler: str = ""
    """The only `train.scheduler` that it works with; empty: any."""
    package: tuple[str, str] | None = None
    """(module to import, name to install) of a package that Rayloom does not depend on."""
    device: str = ""
    """The device without which it does not run; empty: any."""
    broken: str = ""
    """Why it can never be used."""

    @property
    def refuses(self) -> tuple[str, ...]:
        """Stages of DeepSpeed that it does not work with."""
        return tuple(stage for stage in ZERO_STAGES if stage not in self.deepspeed)


_FLAT = "ZeRO hands an optimizer flat pieces of the weights, and this one needs whole matrices"
_ANYWHERE = Support()
_MATRICES = Support(deepspeed=(), deepspeed_reason=_FLAT)
_LOW_RANK = replace(_MATRICES, base_weights=True)
_IN_BACKWARD = Support(
    deepspeed=(),
    deepspeed_reason="it steps within the backward pass, before DeepSpeed has summed the gradients",
    one_worker="it steps within the backward pass, before the workers' gradients are averaged",
    in_backward=True,
    base_weights=True,
)
_BITSANDBYTES = Support(package=("bitsandbytes", "bitsandbytes"))
_PAGED = replace(_BITSANDBYTES, device="a CUDA GPU")
_TORCHAO = Support(
    deepspeed=(),
    deepspeed_reason="ZeRO's flat pieces do not divide into its blocks, so its state would be in 32 bits",
    package=("torchao", "torchao"),
)
_SCHEDULE_FREE = Support(
    deepspeed=(),
    deepspeed_reason="ZeRO hides its switch between trained and averaged weights",
    scheduler="constant",
    package=("schedulefree", "schedulefree"),
)
_LOMO = replace(_IN_BACKWARD, package=("lomo_optim", "lomo-optim"))
_LAYERWISE_8BIT = replace(_IN_BACKWARD, package=("bitsandbytes", "bitsandbytes"))

SUPPORT: dict[str, Support] = {
    "adamw_torch_fused": _ANYWHERE,
    "adamw_torch": _ANYWHERE,
    "adamw_8bit": _BITSANDBYTES,
    "adamw_bnb_8bit": _BITSANDBYTES,
    "paged_adamw_32bit": _PAGED,
    "paged_adamw_8bit": _PAGED,
    "adamw_torch_xla": Support(package=("torch_xla", "torch_xla"), device="a TPU"),
    "adamw_torch_npu_fused": Support(package=("torch_npu", "torch_npu"), device="an Ascend NPU"),
    "adamw_torch_8bit": _TORCHAO,
    "adamw_torch_4bit": _TORCHAO,
    "adamw_anyprecision": Support(package=("torchdistx", "torchdistx")),
    "adafactor": _MATRICES,
    "lion_32bit": _BITSANDBYTES,
    "lion_8bit": _BITSANDBYTES,
    "paged_lion_32bit": _PAGED,
    "paged_lion_8bit": _PAGED,
    "ademamix": _BITSANDBYTES,
    "ademamix_8bit": _BITSANDBYTES,
    "paged_ademamix_32bit": _PAGED,
    "paged_ademamix_8bit": _PAGED,
    "sgd": _ANYWHERE,
    "adagrad": Support(
        deepspeed=(),
        deepspeed_reason="DeepSpeed makes it anew with one group of weights for what decays and what does not",
    ),
    "rmsprop": _ANYWHERE,
    "rmsprop_bnb": _BITSANDBYTES,
    "rmsprop_bnb_8bit": _BITSANDBYTES,
    "rmsprop_bnb_32bit": _BITSANDBYTES,
    "lomo": _LOMO,
    "adalomo": _LOMO,
    "grokadamw": Support(
        deepspeed=(), broken="its package keeps the state outside of its state_dict, so no checkpoint has it"
    ),
    "schedule_free_adamw": _SCHEDULE_FREE,
    "schedule_free_radam": _SCHEDULE_FREE,
    "schedule_free_sgd": _SCHEDULE_FREE,
    "stable_adamw": Support(
        deepspeed=(),
        deepspeed_reason="it clips the step of each weight by itself, and ZeRO hands it flat pieces of many weights",
        package=("optimi", "torch-optimi"),
    ),
    "galore_adamw": _LOW_RANK,
    "galore_adamw_8bit": replace(_LOW_RANK, package=("bitsandbytes", "bitsandbytes")),
    "galore_adafactor": _LOW_RANK,
    "galore_adamw_layerwise": _IN_BACKWARD,
    "galore_adamw_8bit_layerwise": _LAYERWISE_8BIT,
    "galore_adafactor_layerwise": _IN_BACKWARD,
    "apollo_adamw": _LOW_RANK,
    "apollo_adamw_layerwise": _IN_BACKWARD,
    "badam": Support(
        deepspeed=(),
        deepspeed_reason="DeepSpeed lays out its pieces once for all weights that train, and here these change",
        base_weights=True,
    ),
    "muon": _MATRICES,
    "adam_mini": _MATRICES,
}


def refusals(optimizer: Any, train: Any, method: Any) -> list[str]:
    """Why the job's optimizer cannot be had with the rest of the job; empty: it can.

    Args:
        optimizer: the job's `optimizer` part.
        train: its `train` part.
        method: its `method` part; of these two only fields are read, for their rooms are above or beside this one.
    """
    kind, support = optimizer.type, SUPPORT[optimizer.type]
    faults = []
    if support.broken:
        faults.append(f"{kind} cannot be used: {support.broken}")
    if train.deepspeed != "none" and train.deepspeed not in support.deepspeed:
        works = f"none or {', '.join(support.deepspeed)}" if support.deepspeed else "none"
        faults.append(
            f"{kind} does not work with train.deepspeed: {train.deepspeed}: {support.deepspeed_reason}; use {works}"
        )
    if train.workers > 1 and support.one_worker:
        faults.append(f"{kind} needs train.workers: 1, not {train.workers}: {support.one_worker}")
    if support.in_backward:
        backward = f"{kind} steps within the backward pass, so it needs"
        if train.accumulation > 1:
            faults.append(f"{backward} train.gradient_accumulation: 1, not {train.accumulation}")
        if train.max_grad_norm is not None:
            faults.append(f"{backward} train.max_grad_norm: null (no clipping), not {train.max_grad_norm:g}")
        if train.precision == "fp16":
            faults.append(f"{backward} train.precision: bf16 or fp32; the loss scale of fp16 is undone later")
        if train.on_bad_step == "skip":
            faults.append(f"{backward} train.on_bad_step: stop; where a gradient is seen, it has been used")
    if support.base_weights and method.type not in ("full", "freeze"):
        faults.append(
            f"{kind} trains the model's own weights, not those of method {method.type}; use method full or freeze, "
            "or another optimizer"
        )
    if support.scheduler and train.scheduler != support.scheduler:
        faults.append(f"{kind} needs train.scheduler: {support.scheduler}, not {train.scheduler}")
    if getattr(optimizer, "lora_plus_ratio", None) is not None and method.type != "lora":
        faults.append(f"lora_plus_ratio needs method lora, whose factors it tells apart, not method {method.type}")
    return faults


def check_precision(optimizer: Any, precision: str) -> None:
    """Refuse what `train.precision: auto` has come to, where the optimizer cannot have it.

    Raises:
        RequestError: fp16, whose loss scale is undone only after the backward pass.
    """
    if precision == "fp16" and SUPPORT[optimizer.type].in_backward:
        raise RequestError(f"optimizer.type: {optimizer.type} cannot train in fp16; set train.precision: fp32")


def check_environment(optimizer: Any, device: str) -> None:
    """Refuse an optimizer whose package or device is not here. Asked where the job runs, before anything loads.

    Args:
        device: "cpu", "gpu", or "auto" while that is not known.

    Raises:
        RequestError: names the package or the device.
    """
    kind, support = optimizer.type, SUPPORT[optimizer.type]
    if support.device and (device == "cpu" or "CUDA" not in support.device):
        raise RequestError(f"optimizer.type: {kind} needs {support.device}; this job trains on {device.upper()}")
    if support.package:
        module, name = support.package
        if find_spec(module) is None:
            raise RequestError(f"optimizer.type: {kind} needs the package {name}, which is not installed")
