"""The DeepSpeed configuration of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rayloom.errors import RequestError
from rayloom.models.precision import Precision
from rayloom.train.config import TrainConfig

_STAGE = {"zero1": 1, "zero2": 2, "zero3": 3}
_ELSEWHERE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "optimizer": "optimizer.type",
    "scheduler": "train.scheduler",
}
"""What a job says itself; a DeepSpeed JSON may leave it to the job with `auto`."""


def deepspeed_config(
    train: TrainConfig, precision: Precision, own: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """What `deepspeed.initialize` gets; None when the job does without DeepSpeed.

    Args:
        own: the user's, as `read_deepspeed_json` returns it; it has the last word.
    """
    if train.deepspeed == "none":
        return None
    zero: dict[str, Any] = {"stage": _STAGE[train.deepspeed]}
    if train.deepspeed == "zero3":
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    settled = {
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
    return _merged(settled, own or {})


def inference_config(train: TrainConfig, precision: Precision) -> dict[str, Any] | None:
    """The same for a model that only computes; None where its weights are not sharded."""
    if train.deepspeed != "zero3":
        return None
    zero: dict[str, Any] = {"stage": 3} | ({"offload_param": {"device": "cpu"}} if train.offload == "all" else {})
    return {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": zero,
    }


def read_deepspeed_json(train: TrainConfig) -> dict[str, Any]:
    """What the user's DeepSpeed JSON adds to the job's own; empty where the job names none.

    Raises:
        RequestError: no such file, no JSON, another stage than the job's, or a key that the job says elsewhere.
    """
    if train.deepspeed_json is None:
        return {}
    path = Path(train.deepspeed_json).expanduser()
    key = f"train.deepspeed_json: {path}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{key}: {error.strerror or error}") from None
    except ValueError as error:
        raise RequestError(f"{key}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise RequestError(f"{key}: must be an object, such as {{'zero_optimization': {{...}}}}")
    own = _without_auto(found)
    faults = [
        f"{key}: `{name}` is for the job file: {_ELSEWHERE[name]}; leave it out" for name in own.keys() & _ELSEWHERE
    ]
    stage = own.get("zero_optimization", {}).get("stage", _STAGE[train.deepspeed])
    if stage != _STAGE[train.deepspeed]:
        faults.append(
            f"{key}: zero_optimization.stage is {stage}, and train.deepspeed is {train.deepspeed}; say the same"
        )
    if faults:
        raise RequestError(*sorted(faults))
    return own


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what transformers' users leave to others as `auto`."""
    kept = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in kept.items() if value not in ("auto", {})}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, part by part."""
    both = {
        name: _merged(base[name], value) if isinstance(value, dict) and isinstance(base.get(name), dict) else value
        for name, value in over.items()
    }
    return base | both


def engine_of(model: Any) -> dict[str, Any]:
    """What really wraps a model: the class of the wrapper and its ZeRO stage (0 without DeepSpeed)."""
    stage = getattr(model, "zero_optimization_stage", None)
    return {"class": type(model).__name__, "zero_stage": int(stage()) if callable(stage) else 0}
