"""What all tests share: one tiny model for the session."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and a trained tokenizer with a ChatML template."""
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
