"""The base of every part of the job file. Each part's model lives in the room that it configures."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigPart(BaseModel):
    """A frozen mapping that refuses unknown keys; a field's docstring is its help text everywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())
