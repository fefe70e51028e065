"""What a model's `config.json` says of a job, before any of its weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayloom.errors import RequestError
from rayloom.models.causal import why_not_causal
from rayloom.models.config import ModelConfig
from rayloom.models.packing import why_not_packed
from rayloom.models.source import model_folder


def _read_config(model: ModelConfig) -> Mapping[str, Any]:
    """The `config.json` of `model.path`; of a hub model it is fetched, and nothing else.

    Raises:
        RequestError: there is none that can be read.
    """
    source = model_folder(model.path)
    try:
        if Path(source).is_dir():
            return dict(json.loads((Path(source) / "config.json").read_text(encoding="utf-8")))
        from transformers import PreTrainedConfig

        return PreTrainedConfig.get_config_dict(source, revision=model.revision or "main")[0]
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RequestError(f"model.path: {model.path} has no config.json that can be read: {reason}") from None


def check_model_type(model: ModelConfig, *, packing: bool) -> None:
    """Refuse a job whose model would train on something else than it is told to.

    Raises:
        RequestError: the model is no causal language model, or rows are packed and it would mix their examples.
    """
    config, path = _read_config(model), model.path
    refusal = why_not_causal(config)
    if refusal is not None:
        raise RequestError(f"model.path: {path} {refusal}")
    leak = why_not_packed(str(config.get("model_type")))
    if packing and leak is not None:
        raise RequestError(
            f"data.packing: true: the examples of a row would not be kept apart, for {path} "
            f"(type {config['model_type']}) {leak}; say data.packing: false"
        )
