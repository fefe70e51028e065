"""Judged answers: a conversation whose last answer somebody found good or bad -> one sequence, and the judgement."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayloom.data.encode import encode_conversations
from rayloom.data.encoding import Encoding
from rayloom.data.example import Example
from rayloom.data.template import Renderer
from rayloom.models.text_tokenizer import TokenizerState


@dataclass(frozen=True)
class JudgementEncoder:
    """Judged conversation -> ids, and labels on its last answer. What is too long is cut as a conversation is."""

    tokenizer: TokenizerState
    template: str
    enable_thinking: bool | None = None
    """Handed to the template; None: the template decides."""

    @property
    def splits(self) -> bool:
        """What is longer than the cutoff is cut."""
        return False

    def key(self) -> str:
        """Changes with the tokenizer and the template."""
        rule = (self.template, self.enable_thinking)
        return f"judgements {self.tokenizer.fingerprint} {hashlib.sha256(repr(rule).encode()).hexdigest()}"

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        """At most `cutoff` ids of each example, labels, and its judgement (`Encoding.desirable`).

        An example that nobody judged, or that the template refuses, has a `fault`.
        """
        renderer = Renderer(
            self.tokenizer.load(), self.template, mask_history=True, enable_thinking=self.enable_thinking
        )
        refusals = [_refusal(example) for example in examples]
        judged = [_unmarked(example) for example, refusal in zip(examples, refusals, strict=True) if refusal is None]
        encodings = iter(encode_conversations(renderer, judged, cutoff))
        return [
            replace(next(encodings), desirable=example.desirable)
            if refusal is None
            else Encoding([], [], fault=refusal)
            for example, refusal in zip(examples, refusals, strict=True)
        ]


def _unmarked(example: Example) -> Example:
    """The conversation without its turns' own words on what is learnt: the judgement is on the last answer."""
    return replace(example, messages=tuple(replace(message, train=None) for message in example.messages))


def _refusal(example: Example) -> str | None:
    """Why stage kto cannot learn from an example; None: it can."""
    if example.desirable is None:
        kind = "a conversation"
        if example.text is not None:
            kind = "plain text"
        elif example.chosen or example.rejected:
            kind = "a preference (stage dpo)"
        return f"the row is {kind}; stage kto learns from answers that were judged (a column named by kto_tag)"
    if example.images or example.videos or example.audios:
        return "the row has images, videos or audios, which a text model cannot read"
    return None
