"""What the encoders of stages that learn from answers alone have in common."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from rayloom.data.example import Example
from rayloom.models.text_tokenizer import TokenizerState


@dataclass(frozen=True)
class AnswerEncoder:
    """A tokenizer and a template. Sent to every task; the tokenizer is put together where it is used."""

    tokenizer: TokenizerState
    template: str
    enable_thinking: bool | None = None
    """Handed to the template; None: the template decides."""

    @property
    def splits(self) -> bool:
        """What is longer than the cutoff is cut."""
        return False

    def _key(self, kind: str) -> str:
        """Changes with the kind of rows, the tokenizer and the template."""
        rule = (self.template, self.enable_thinking)
        return f"{kind} {self.tokenizer.fingerprint} {hashlib.sha256(repr(rule).encode()).hexdigest()}"


def media_refusal(example: Example) -> str | None:
    """Why no text model can learn from an example with media; None: it has none."""
    if example.images or example.videos or example.audios:
        return "the row has images, videos or audios, which a text model cannot read"
    return None
