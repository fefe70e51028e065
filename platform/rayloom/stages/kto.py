"""Judged answers: a conversation whose last answer somebody found good or bad -> one sequence, and the judgement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayloom.data.encode import encode_conversations
from rayloom.data.encoding import Encoding
from rayloom.data.example import Example
from rayloom.data.template import Renderer
from rayloom.stages.answers import AnswerEncoder, media_refusal


@dataclass(frozen=True)
class JudgementEncoder(AnswerEncoder):
    """Judged conversation -> ids, and labels on its last answer. What is too long is cut as a conversation is."""

    def key(self) -> str:
        return self._key("judgements")

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
    return media_refusal(example)
