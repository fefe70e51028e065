"""A local Ray cluster of its own for `tests/engine`: four CPUs by declaration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray._private.authentication_test_utils import reset_auth_token_state

from rayloom.jobs.local_head import LocalHead


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A running cluster that this process is connected to."""
    with LocalHead(num_cpus=4) as head, pytest.MonkeyPatch.context() as patch:
        for name, value in head.environment.items():
            patch.setenv(name, value)
        reset_auth_token_state()
        ray.init(address=head.cluster_address, namespace="rayloom", log_to_driver=False)
        yield
        ray.shutdown()
    reset_auth_token_state()
