"""Pre-training: learn every token of plain texts.

A text is its tokens and the end of sequence. Texts that are longer than the cutoff go on in further rows
(`rayloom.data.segment`); packing puts the rest together, each text with its own positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayloom.data.encoding import Encoding
from rayloom.data.example import Example
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer, tokenizer_fingerprint


@dataclass(frozen=True)
class PretrainEncoder:
    """Plain text -> ids and labels. Small enough to send to every task."""

    tokenizer: TokenizerSource | str
    splits: bool = True

    def key(self) -> str:
        """Changes with the tokenizer."""
        return f"pretrain {tokenizer_fingerprint(self.tokenizer)}"

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        """The tokens of each text, however long; what begins a sequence for the tokenizer is kept and not learnt."""
        tokenizer = load_tokenizer(self.tokenizer)
        texts = [example.text for example in examples]
        known = [text for text in texts if text is not None]
        ids = iter(tokenizer(known).input_ids if known else [])
        return [
            Encoding([], [], 0, "holds a conversation, not plain text (`text`), which is what stage pretrain learns")
            if text is None
            else _ended(next(ids), tokenizer.eos_token_id)
            for text in texts
        ]


def _ended(input_ids: list[int], end: int | None) -> Encoding:
    if end is not None and input_ids[-1:] != [end]:
        input_ids = [*input_ids, end]
    return Encoding(input_ids, list(input_ids), 0, None)
