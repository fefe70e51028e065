"""Families of models: what a name means where a model does not say it itself. The list is `families.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import resources
from types import MappingProxyType

import yaml


@dataclass(frozen=True)
class Family:
    """One entry of `families.yaml`."""

    name: str
    models: tuple[str, ...]
    """Patterns of model names."""
    types: tuple[str, ...]
    """`model_type` of their configurations."""
    template: str | None = None
    """Name in the template library, for models that bring no template."""
    code: bool = False
    """Whether the models need Python code of their own."""
    note: str = ""
    """What is particular about them."""


@lru_cache(maxsize=1)
def families() -> Mapping[str, Family]:
    """All families by name, in the order of the list."""
    text = resources.files("rayloom.models").joinpath("families.yaml").read_text(encoding="utf-8")
    found = {
        name: Family(name, **{**entry, "models": tuple(entry["models"]), "types": tuple(entry["types"])})
        for name, entry in yaml.safe_load(text).items()
    }
    return MappingProxyType(found)


def family_of(path: str, model_type: str | None = None) -> Family | None:
    """The family that a model belongs to; None: none is known.

    By its name, which is the last part of a hub name or folder; of several patterns that fit the one with the most
    letters counts. A name that says nothing is told by `model_type`, where only one family has that.
    """
    name = path.rstrip("/").rpartition("/")[2].removeprefix("pypi:").partition("==")[0].lower()
    fits = [
        (len(pattern.replace("*", "")), family)
        for family in families().values()
        for pattern in family.models
        if fnmatchcase(name, pattern.lower())
    ]
    if fits:
        return max(fits, key=lambda fit: fit[0])[1]
    of_type = [family for family in families().values() if model_type in family.types]
    return of_type[0] if len(of_type) == 1 else None
