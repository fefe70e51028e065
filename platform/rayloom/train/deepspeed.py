"""The DeepSpeed configuration of a job."""

from __future__ import annotations

from typing import Any

from rayloom.models.precision import Precision
from rayloom.train.config import TrainConfig

_STAGE = {"zero1": 1, "zero2": 2, "zero3": 3}


def deepspeed_config(train: TrainConfig, precision: Precision) -> dict[str, Any] | None:
    """What `deepspeed.initialize` gets; None when the job does without DeepSpeed."""
    if train.deepspeed == "none":
        return None
    zero: dict[str, Any] = {"stage": _STAGE[train.deepspeed]}
    if train.deepspeed == "zero3":
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.max_grad_norm or 0.0,  # 0: none
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": zero,
        # Keep the job's optimizer: DeepSpeed's own CPU Adam would be compiled, and is for offloading only. Which ones
        # work is in `methods/optimizers/support.py`; DeepSpeed has tested but a few.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def engine_of(model: Any) -> dict[str, Any]:
    """What really wraps a model: the class of the wrapper and its ZeRO stage (0 without DeepSpeed)."""
    stage = getattr(model, "zero_optimization_stage", None)
    return {"class": type(model).__name__, "zero_stage": int(stage()) if callable(stage) else 0}
