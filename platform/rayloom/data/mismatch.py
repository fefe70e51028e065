"""Mismatched pairs: each example's prompt with another example's answer, from which KTO estimates a divergence.

The other example is the next one of the segment, so the pairs are a function of the stream's order alone: they depend
neither on the size of a batch nor on the number of workers, nor on how the rows were tokenized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rayloom.data.encoding import IGNORED
from rayloom.data.rows import Encoded


def with_mismatches(examples: Sequence[Encoded], cutoff: int) -> list[Encoded]:
    """The examples of a segment, each with a second sequence behind its own (`Encoded.border`).

    An answer is what has labels; all of them stand behind the prompt. An answer that makes its new sequence longer than
    `cutoff` is cut at its end. A lone example, or a prompt that leaves no room, gets no second sequence.
    """
    return [_joined(one, other, cutoff) for one, other in zip(examples, _next_ones(examples), strict=True)]


def _next_ones(examples: Sequence[Encoded]) -> list[Encoded | None]:
    if len(examples) < 2:
        return [None] * len(examples)
    return [*examples[1:], examples[0]]


def _joined(one: Encoded, other: Encoded | None, cutoff: int) -> Encoded:
    prompt = one.input_ids[: _answer_start(one)]
    if other is None or len(prompt) >= cutoff:
        return one
    start, room = _answer_start(other), cutoff - len(prompt)
    return replace(
        one,
        input_ids=[*one.input_ids, *prompt, *other.input_ids[start : start + room]],
        labels=[*one.labels, *[IGNORED] * len(prompt), *other.labels[start : start + room]],
        border=len(one.input_ids),
    )


def _answer_start(example: Encoded) -> int:
    return next(place for place, label in enumerate(example.labels) if label != IGNORED)
