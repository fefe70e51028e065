"""What the doctor says of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    state: State
    """`warn`: jobs run, though some not, or slower; `bad`: jobs cannot run."""
    text: str
    """What there is; where it is not well, also what to do."""
