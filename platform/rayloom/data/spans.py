"""From characters to tokens, and which tokens of a text stay whatever is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rayloom.data.chat_jinja import Span
from rayloom.models.text_tokenizer import TextTokenizer, byte_offset

_MEDIA_BLOCKS = (
    ("<|vision_start|>", "<|vision_end|>"),
    ("<|audio_bos|>", "<|audio_eos|>"),
    ("<|audio_start|>", "<|audio_end|>"),
    ("<|begin_of_image|>", "<|end_of_image|>"),
    ("<|begin_of_video|>", "<|end_of_video|>"),
    ("<|image_start|>", "<|image_end|>"),
    ("<start_of_image>", "<end_of_image>"),
    ("<image>", "</image>"),
    ("<img>", "</img>"),
)
"""What opens and closes an image, a video or a sound, in the models that say so; all between belongs together."""


@dataclass(frozen=True)
class FixedTokens:
    """The tokens of one vocabulary that are never cut: added ones, and those within a media block."""

    added: frozenset[int]
    blocks: tuple[tuple[int, int], ...]

    @staticmethod
    def of(tokenizer: TextTokenizer) -> FixedTokens:
        # Some vocabularies (Gemma's) add runs of spaces and line breaks; those are text like any other.
        added = {content: token for content, token in tokenizer.added.items() if content.strip()}
        blocks = [(added[first], added[last]) for first, last in _MEDIA_BLOCKS if first in added and last in added]
        return FixedTokens(frozenset(added.values()), tuple(blocks))

    def positions(self, input_ids: Sequence[int]) -> set[int]:
        """Where they stand. A block that is never closed is none."""
        found = {index for index, token in enumerate(input_ids) if token in self.added}
        for first, last in self.blocks:
            marks = [index for index in sorted(found) if input_ids[index] in (first, last)]
            for start, stop in pairwise(marks):
                if input_ids[start] == first and input_ids[stop] == last:
                    found.update(range(start, stop))
        return found


def tokens_between(borders: np.ndarray, text: str, span: Span) -> Span | None:
    """The tokens of a span of characters; None unless it begins and ends where tokens do.

    Args:
        borders: as `TextTokenizer.borders`.
    """
    if span[0] >= span[1]:
        return (0, 0)
    edges = [byte_offset(text, character) for character in span]
    first, stop = np.searchsorted(borders, edges).tolist()
    return (first, stop) if borders[first] == edges[0] and borders[stop] == edges[1] else None


def token_range(encoding: Any, span: Span) -> Span:
    """The tokens that lie within a span of characters.

    A token that begins before the span or ends behind it is not in it.

    Args:
        encoding: a `tokenizers.Encoding`. It is asked about the borders only: to fetch the offsets of all tokens takes
            longer than all the rest.
    """
    start, stop = span
    first = next((token for char in range(start, stop) if (token := encoding.char_to_token(char)) is not None), None)
    if first is None:
        return (0, 0)
    last = next(token for char in range(stop - 1, start - 1, -1) if (token := encoding.char_to_token(char)) is not None)
    length = len(encoding)
    while last + 1 < length and encoding.token_to_chars(last + 1)[0] < stop:
        last += 1  # the other tokens of a character that takes several
    while first <= last and encoding.token_to_chars(first)[0] < start:
        first += 1
    while last >= first and encoding.token_to_chars(last)[1] > stop:
        last -= 1
    return (first, last + 1)


def begins_inside_character(encoding: Any, token: int) -> bool:
    """Whether a token goes on with a character that the token before it began."""
    before, own = encoding.token_to_chars(token - 1), encoding.token_to_chars(token)
    return bool(own[0] < before[1])
