"""Which model types keep the examples of a packed row apart."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

import yaml


@lru_cache(maxsize=1)
def _types() -> dict[str, dict[str, str] | list[str]]:
    text = resources.files("rayloom.models").joinpath("packing.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def packing_is_exact(model_type: str) -> bool | None:
    """Whether examples packed into a row train as they would alone; None of a model type that was not tried.

    Told by `position_ids` that begin again at each example, without a KV cache and without an attention mask.
    """
    if model_type in _types()["exact"]:
        return True
    return False if model_type in _types()["leaks"] else None


def why_not_packed(model_type: str) -> str | None:
    """Why packing would mix the examples of a row, as the rest of "this model ..."; None where it does not or was not
    tried."""
    leaks = _types()["leaks"]
    return leaks.get(model_type) if isinstance(leaks, dict) else None
