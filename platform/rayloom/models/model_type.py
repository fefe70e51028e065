"""What a model's `config.json` says of a job, before any of its weights are read."""

from __future__ import annotations

from rayloom.errors import RequestError
from rayloom.models.causal import why_not_causal
from rayloom.models.config import ModelConfig
from rayloom.models.packing import why_not_packed
from rayloom.models.source import raw_config


def check_model_type(model: ModelConfig, *, packing: bool) -> None:
    """Refuse a job whose model would train on something else than it is told to.

    Raises:
        RequestError: the model is no causal language model, or rows are packed and it would mix their examples.
    """
    config, path = raw_config(model), model.path
    refusal = why_not_causal(config)
    if refusal is not None:
        raise RequestError(f"model.path: {path} {refusal}")
    leak = why_not_packed(str(config.get("model_type")))
    if packing and leak is not None:
        raise RequestError(
            f"data.packing: true: the examples of a row would not be kept apart, for {path} "
            f"(type {config['model_type']}) {leak}; say data.packing: false"
        )
