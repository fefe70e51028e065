"""Which evaluation was the best, and whether it is time to stop. Pure: the best one's step and value are arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rayloom.errors import JobError
from rayloom.stages.config import CHOOSING, SMALLER_IS_BETTER
from rayloom.train.config import TrainConfig


@dataclass(frozen=True)
class BestRule:
    """How evaluations are compared."""

    metric: str
    """A name of the row of metrics, such as `eval_loss` or `eval_accuracy/SET`."""
    patience: int | None
    """After so many evaluations on end that are no better than the best, the training ends; None: it goes on."""
    eval_steps: int

    @classmethod
    def of(cls, settings: TrainConfig) -> BestRule | None:
        """The job's; None: it has none, or no evaluation."""
        if not settings.best_metric or not settings.eval_steps:
            return None
        return cls(settings.best_metric, settings.early_stopping, settings.eval_steps)

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric's value in what an evaluation has found, which has nothing of a set of which nothing counted."""
        for name in CHOOSING:
            of_set = self.metric.removeprefix(f"eval_{name}/")
            if of_set != self.metric and self.metric not in metrics:
                raise JobError(
                    f"train.best_metric: the evaluation gave no {self.metric}: set {of_set} has no example with a "
                    f"trained token; give it others, or take eval_{name}, which is over all sets"
                )
        return metrics[self.metric]

    def score(self, value: float) -> float:
        """The value, or its negative: the larger the better."""
        name = self.metric.removeprefix("eval_").partition("/")[0]
        whole = self.metric.removeprefix("eval_")
        return -value if name in SMALLER_IS_BETTER or whole in SMALLER_IS_BETTER else value

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best one so far; one that is no finite number never is."""
        if not math.isfinite(value):
            return False
        return best is None or self.score(value) > self.score(best)

    def is_over(self, step: int, best_step: int) -> bool:
        """Whether patience is at its end at an evaluation that was not the best."""
        return self.patience is not None and step - best_step >= self.patience * self.eval_steps
