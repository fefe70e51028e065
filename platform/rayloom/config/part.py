"""The base of every part of the job file. Each part's model lives in the room that it configures."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Strict

# Strict, or YAML's `yes` would pass for 1.
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]


class ConfigPart(BaseModel):
    """A frozen mapping that refuses unknown keys and infinity; a field's docstring is its help text everywhere."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )
