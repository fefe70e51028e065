"""Pre-training: learn every token of plain texts.

A text is its tokens and the end of sequence. Texts that are longer than the cutoff go on in further rows
(`rayloom.data.segment`); packing puts the rest together, each text with its own positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayloom.data.encoding import Encoding
from rayloom.data.example import Example
from rayloom.models.text_tokenizer import TokenizerState


@dataclass(frozen=True)
class PretrainEncoder:
    """Plain text -> ids and labels. Sent to every task; the tokenizer is put together where it is used."""

    tokenizer: TokenizerState
    splits: bool = True

    def key(self) -> str:
        """Changes with the tokenizer."""
        return f"pretrain {self.tokenizer.fingerprint}"

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        """The tokens of each text, however long; what begins a sequence for the tokenizer is kept and not learnt."""
        texts = [example.text for example in examples]
        known = [text for text in texts if text is not None]
        ids = iter(self.tokenizer.load().ids(known, add_special_tokens=True))
        return [
            Encoding([], [], 0, "holds a conversation, not plain text (`text`), which is what stage pretrain learns")
            if text is None
            else _ended(next(ids), self.tokenizer.eos_token_id)
            for text in texts
        ]


def _ended(input_ids: list[int], end: int | None) -> Encoding:
    if end is not None and input_ids[-1:] != [end]:
        input_ids = [*input_ids, end]
    return Encoding(input_ids, list(input_ids), 0, None)
