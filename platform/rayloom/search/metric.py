"""The number that trials are compared by, found in a job's rows of metrics."""

from __future__ import annotations

import math

from rayloom.errors import JobError, RequestError
from rayloom.train.report import MetricsRow


class Metric:
    """Reads one metric; says at the first row that should have it, and has not, what there is instead."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._seen: dict[str, None] = {}

    def read(self, row: MetricsRow) -> float | None:
        """The value; None: this row is of the other kind (of the training, or of an evaluation).

        Raises:
            RequestError: the job reports no such metric.
            JobError: it is not finite.
        """
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        self._seen |= dict.fromkeys(numbers)
        value = numbers.get(self.name)
        if value is None and self.name in row:  # there was nothing to measure
            return None
        if value is None:
            is_evaluation = "loss" not in row
            if is_evaluation == self.name.startswith("eval_"):
                raise self.missing()
            return None
        if not math.isfinite(value):
            raise JobError(f"{self.name} is {value} at step {row['step']}")
        return float(value)

    def missing(self) -> RequestError:
        """What to say where the metric does not come."""
        return RequestError(f"search.metric: the job never reports {self.name}; it reports {', '.join(self._seen)}")
