"""The `train` part: what follows from what."""

from __future__ import annotations

import pytest

from rayloom.train.config import TrainConfig


@pytest.mark.parametrize(
    ("train", "accumulation", "rows"),
    [
        ({"workers": 2, "batch_size": 3, "gradient_accumulation": 4}, 4, 24),
        ({"global_batch_size": 8, "batch_size": 8}, 1, 8),
        ({"global_batch_size": 8, "batch_size": 4, "workers": 2}, 1, 8),
        ({"global_batch_size": 8, "batch_size": 2, "workers": 2}, 2, 8),
        ({"global_batch_size": 8, "batch_size": 2, "workers": 2, "gradient_accumulation": 2}, 2, 8),
    ],
)
def test_rows_of_a_step(train, accumulation, rows):
    config = TrainConfig(**train)
    assert (config.accumulation, config.rows_per_step) == (accumulation, rows)
    assert TrainConfig.model_validate(config.model_dump()) == config  # as it is written down and read again


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"global_batch_size": 12, "workers": 2, "batch_size": 4},
            r"global_batch_size 12 is no multiple of workers \(2\) times batch_size \(4\); with 2 workers "
            "batch_size may be 1, 2, 3, 6",
        ),
        ({"global_batch_size": 4, "workers": 3}, "with 3 workers no batch_size makes it fit"),
        (
            {"global_batch_size": 16, "batch_size": 4, "gradient_accumulation": 2},
            "gradient_accumulation 2 does not go with global_batch_size 16, of which 4 follows",
        ),
        ({"global_batch_size": 0}, "greater than or equal to 1"),
    ],
)
def test_a_global_batch_that_does_not_divide(train, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**train)
