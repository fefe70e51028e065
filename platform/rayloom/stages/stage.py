"""The base of every stage's part of the job file."""

from __future__ import annotations

from typing import ClassVar, Literal

from rayloom.config.part import ConfigPart


class Stage(ConfigPart):
    """What all stages have."""

    rows: ClassVar[Literal["texts", "conversations", "pairs", "judgements", "prompts"]]
    """What kind of example it learns from."""
    measures: ClassVar[tuple[str, ...]]
    """What is measured besides the loss; evaluation puts `eval_` before the names."""
    large_loss: ClassVar[float | None] = 100.0
    """No smaller loss counts as exploded, whatever the first step's was; None: losses of the stage do not tell."""

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference: the model as it was before the training."""
        return False
