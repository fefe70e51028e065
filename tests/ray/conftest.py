"""One local Ray cluster for all of `tests/ray`: private folder and ports, its own token, four CPUs by declaration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from ray._private.authentication_test_utils import reset_auth_token_state

from rayloom.jobs.local_head import LocalHead


@pytest.fixture(scope="session")
def head() -> Iterator[LocalHead]:
    """A running head; every test of the session shares it."""
    with LocalHead(num_cpus=4) as running:
        yield running


@pytest.fixture(scope="module")
def connected(head: LocalHead) -> Any:
    """Let `run_job` find the shared head, as a cluster's driver would."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**head.environment, "RAY_ADDRESS": head.cluster_address}.items():
            patch.setenv(name, value)
        reset_auth_token_state()  # Ray keeps what it read first, and other tests have been here before
        yield
    reset_auth_token_state()
