"""A model without weights, made from its `config.json`: names, shapes and kinds of all its modules, and no memory."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from rayloom.errors import RequestError, first_line
from rayloom.models.architecture import read_architecture
from rayloom.models.config import ModelConfig
from rayloom.models.source import model_folder


def skeleton(model: ModelConfig) -> Any:
    """The job's model on torch's `meta` device; a second or two for the largest.

    Raises:
        RequestError: transformers knows no causal language model of this kind.
    """
    architecture = read_architecture(model)
    auto = getattr(transformers, architecture.auto_class)
    try:
        with torch.device("meta"):
            empty = auto.from_config(architecture.config, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise RequestError(f"model.path: no model can be made from {model.path}: {first_line(error)}") from None
    empty.name_or_path = model_folder(model.path)
    return empty
