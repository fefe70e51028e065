"""Supervised fine-tuning: learn the assistant's words, given all that stands before them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from rayloom.data.encode import encode_conversations
from rayloom.data.encoding import Encoding
from rayloom.data.example import Example
from rayloom.data.template import Renderer
from rayloom.models.text_tokenizer import TokenizerState
from rayloom.stages.answers import media_refusal


@dataclass(frozen=True)
class SftEncoder:
    """Conversation -> ids and labels. Sent to every task; the tokenizer is put together where it is used."""

    tokenizer: TokenizerState
    template: str
    train_on_prompt: bool = False
    """Train every token, not only the answers."""
    mask_history: bool = False
    """Train the last answer only."""
    enable_thinking: bool | None = None
    """Handed to the template; None: the template decides."""

    @property
    def splits(self) -> bool:
        """What is longer than the cutoff is cut."""
        return False

    def key(self) -> str:
        """Changes with the tokenizer, the template and what is trained."""
        rule = (self.template, self.train_on_prompt, self.mask_history, self.enable_thinking)
        return f"sft {self.tokenizer.fingerprint} {hashlib.sha256(repr(rule).encode()).hexdigest()}"

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        """At most `cutoff` ids of each example, and labels, which are `IGNORED` where nothing is trained.

        An example that is no conversation, or that the template refuses, has a `fault`.
        """
        renderer = Renderer(
            self.tokenizer.load(),
            self.template,
            train_on_prompt=self.train_on_prompt,
            mask_history=self.mask_history,
            enable_thinking=self.enable_thinking,
        )
        refusals = [_refusal(example) for example in examples]
        conversations = [example for example, refusal in zip(examples, refusals, strict=True) if refusal is None]
        encodings = iter(encode_conversations(renderer, conversations, cutoff))
        return [next(encodings) if refusal is None else Encoding([], [], fault=refusal) for refusal in refusals]


def _refusal(example: Example) -> str | None:
    """Why supervised fine-tuning cannot learn from an example; None: it can."""
    if example.text is not None:
        return "the row is plain text; supervised fine-tuning learns from conversations"
    if example.chosen or example.rejected:
        return "the row is a preference (chosen and rejected); supervised fine-tuning learns from conversations"
    if example.desirable is not None:
        return "the row judges its answer as desirable or not; supervised fine-tuning learns from every answer"
    return media_refusal(example)
