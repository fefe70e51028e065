"""Whether a model predicts each token of a text from those before it, told from its `config.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml


@lru_cache(maxsize=1)
def _types() -> dict[str, dict[str, str]]:
    text = resources.files("rayloom.models").joinpath("causal.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def why_not_causal(config: Mapping[str, Any]) -> str | None:
    """Why a model with this `config.json` cannot be trained on texts, as the rest of "MODEL ..."; None if it can.

    A model type that is not known here counts as causal.
    """
    model_type = str(config.get("model_type"))
    if model_type in _types()["never"]:
        return f"(type {model_type}) cannot be trained on texts here: {_types()['never'][model_type]}"
    if config.get("is_encoder_decoder"):
        kind = f"(type {model_type}) is an encoder-decoder"
        return f"{kind}; Rayloom trains causal language models, which have a decoder only"
    field = _types()["needs"].get(model_type)
    if field is not None and not config.get(field):
        return (
            f"(type {model_type}) is an encoder, whose tokens see what comes after them; "
            f"to train it as a causal language model, set {field}: true in its config.json"
        )
    return None
