"""Conversations -> token ids and labels that fit the cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rayloom.data.encoding import IGNORED, Encoding
from rayloom.data.example import Example
from rayloom.data.template import Rendered, Renderer
from rayloom.data.truncate import cut_texts, turn_starts, without_turns


def encode_conversations(renderer: Renderer, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
    """Encode a batch; what is longer than `cutoff` tokens is cut as `rayloom.data.truncate` says."""
    rendered = renderer.render(examples)
    long = {
        index: _Search(example, len(one.input_ids))
        for index, (example, one) in enumerate(zip(examples, rendered, strict=True))
        if isinstance(one, Rendered) and len(one.input_ids) > cutoff
    }
    _drop_turns(renderer, list(long.values()), cutoff)
    return [
        _cut_to_fit(renderer, long[index], cutoff) if index in long else encoding_of(one)
        for index, one in enumerate(rendered)
    ]


@dataclass
class _Search:
    """The search for the fewest turns to drop from one example: at least `low`, at most `high`."""

    example: Example
    length: int
    low: int = 1
    high: int = field(init=False)
    fitting: Rendered | None = None
    """Rendered without `high` turns, once that is known to fit."""

    def __post_init__(self) -> None:
        self.high = len(turn_starts(self.example.messages)) - 1

    @property
    def tried(self) -> int:
        return (self.low + self.high) // 2

    def narrow(self, rendered: Rendered | ValueError, cutoff: int) -> None:
        if isinstance(rendered, Rendered) and len(rendered.input_ids) <= cutoff:
            self.high, self.fitting = self.tried, rendered
        else:
            self.low = self.tried + 1

    @property
    def open(self) -> bool:
        return self.low < self.high or (self.low == self.high and self.fitting is None)


def _drop_turns(renderer: Renderer, searches: Sequence[_Search], cutoff: int) -> None:
    """Halve all the searches' ranges in step, so that each round is one call of the tokenizer."""
    while searches := [search for search in searches if search.open]:
        rendered = renderer.render([without_turns(search.example, search.tried) for search in searches])
        for search, one in zip(searches, rendered, strict=True):
            search.narrow(one, cutoff)


def _cut_to_fit(renderer: Renderer, search: _Search, cutoff: int) -> Encoding:
    example = without_turns(search.example, search.high) if search.high > 0 else search.example
    fitting = search.fitting
    if fitting is None:
        try:
            found = renderer.cuttable(example)
        except ValueError as error:
            return Encoding([], [], fault=str(error))
        fitting = cut_texts(found.rendered, found.parts, cutoff, found.inner)
    # The first token has nothing before it that it could be predicted from.
    if fitting is None or not any(fitting.trained[1:]):
        return Encoding([], [], cut=search.length)
    messages_cut = len(search.example.messages) - len(example.messages)
    return encoding_of(fitting, cut=search.length - len(fitting.input_ids), messages_cut=messages_cut)


def encoding_of(rendered: Rendered | ValueError, cut: int = 0, messages_cut: int = 0) -> Encoding:
    """Ids and labels of what was rendered; an error becomes a `fault`."""
    if isinstance(rendered, ValueError):
        return Encoding([], [], fault=str(rendered))
    ids = rendered.input_ids
    labels = [IGNORED] * len(ids)
    flags = bytes(rendered.trained)  # few runs of many tokens, which `find` skips at once
    start = flags.find(1)
    while start >= 0:
        stop = flags.find(0, start)
        stop = len(ids) if stop < 0 else stop
        labels[start:stop] = ids[start:stop]
        start = flags.find(1, stop)
    return Encoding(ids, labels, cut, messages_cut=messages_cut)
