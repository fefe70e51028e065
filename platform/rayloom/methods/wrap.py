"""PEFT's way from a configuration to a wrapped model, with its refusals as ours."""

from __future__ import annotations

from typing import Any

import peft

from rayloom.errors import RequestError, first_line
from rayloom.methods.names import modules_named


def wrap(model: Any, config: peft.PeftConfig, key: str, empty: bool) -> Any:
    """`peft.get_peft_model`: only what the configuration adds trains, in fp32.

    Args:
        key: of the job file, whose value PEFT judges here.
        empty: make the new parameters without memory.

    Raises:
        RequestError: PEFT cannot apply the configuration to this model.
    """
    try:
        return peft.get_peft_model(model, config, low_cpu_mem_usage=empty)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError) as error:
        raise RequestError(f"{key}: {first_line(error)}") from None


def extra_modules(model: Any, names: list[str]) -> list[str] | None:
    """`extra_modules` of a job as PEFT's `modules_to_save`: whole names, for PEFT would take `norm` for the end of
    `input_layernorm` too."""
    return modules_named(model, names, "method.extra_modules") or None
