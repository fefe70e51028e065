"""The base of every part of the job file. Each part's model lives in the room that it configures."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigPart(BaseModel):
    """A frozen mapping that refuses unknown keys and infinity; a field's docstring is its help text everywhere."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )
