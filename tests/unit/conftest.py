"""What the unit tests share: a tokenizer, a job file, and Hypothesis without a clock and without chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tests.job_text import JOB

from rayloom.models.tokenizer import load_tokenizer

# Derandomized: a red run is red again. To search further: `--hypothesis-profile=search`.
hypothesis.settings.register_profile("rayloom", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("rayloom")


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """The smallest job file (`tests.job_text.JOB`)."""
    path = tmp_path / "job.yaml"
    path.write_text(JOB, encoding="utf-8")
    return path
