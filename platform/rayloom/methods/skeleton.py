"""A model without weights, made from its `config.json`: names, shapes and kinds of all its modules, and no memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayloom.errors import RequestError
from rayloom.methods.wrap import first_line
from rayloom.models.load import model_folder


def skeleton(path: str) -> Any:
    """The causal language model of `model.path` on torch's `meta` device; a second or two for the largest.

    Raises:
        RequestError: transformers knows no causal language model of this kind.
    """
    try:
        config = AutoConfig.from_pretrained(model_folder(path))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise RequestError(f"model.path: no model can be made from {path}: {first_line(error)}") from None
    model.name_or_path = model_folder(path)
    return model
