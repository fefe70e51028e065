"""Attach a method to a loaded model."""

from __future__ import annotations

from typing import Any

from rayloom.errors import RequestError
from rayloom.methods.config import FullConfig, LoraConfig
from rayloom.methods.targets import linear_layers, peft_targets


def attach_method(model: Any, method: LoraConfig | FullConfig) -> Any:
    """The model as the method trains it: `full` as it is, `lora` wrapped by PEFT with only adapters trainable.

    Raises:
        RequestError: a target that names no module of the model.
    """
    if isinstance(method, FullConfig):
        return model
    import peft

    modules, parameters = peft_targets(model, linear_layers(model)) if method.target == "all" else (method.target, [])
    alpha: Any = 2 * method.rank if method.alpha is None else method.alpha
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=method.rank,
        lora_alpha=alpha,
        lora_dropout=method.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise RequestError(f"method.target: {str(error).strip().splitlines()[0]}") from None
