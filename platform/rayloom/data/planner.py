"""Who says what is in each segment of a stream: one actor, so that the tasks need not walk the plan."""

from __future__ import annotations

from rayloom.data.plan import Plan, Position, Segment
from rayloom.data.walk import Walk
from rayloom.errors import RequestError


class Planner:
    """Walks the plan and says what is in segment `number`, the first being `start`'s. One actor for the pipeline.

    The walk is sequential, because a segment begins where the one before it ended; it only counts rows, so it is far
    ahead of the tasks. It keeps every segment's position, so that a task that Ray runs again is told the same.
    """

    def __init__(self, plan: Plan, start: Position) -> None:
        self._plan = plan
        self._walk = Walk(plan)
        self._starts = [start]

    def segment(self, number: int) -> Segment | RequestError | None:
        """The segment; None behind the last one; an error as a value, since Ray hands on an exception's text only."""
        try:
            while True:
                last = min(number, len(self._starts) - 1)
                start = self._starts[last]
                if self._plan.epochs is not None and start.epoch >= self._plan.epochs:
                    return None
                segment, after = self._walk.step(start)
                if last == len(self._starts) - 1:
                    self._starts.append(after)
                if last == number:
                    return segment
        except RequestError as error:
            return error
