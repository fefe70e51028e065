"""One local Ray cluster for all of `tests/ray`: private folder and ports, its own token, four CPUs by declaration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tiny_model import make_tiny_model

from rayloom.jobs.local_head import LocalHead


@pytest.fixture(scope="session")
def head() -> Iterator[LocalHead]:
    """A running head; every test of the session shares it."""
    with LocalHead(num_cpus=4) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights and a trained tokenizer with a ChatML template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(folder)
    return folder
