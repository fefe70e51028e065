"""Preferences: a prompt, an answer that was chosen and one that was rejected -> two sequences of one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rayloom.data.encode import encoding_of
from rayloom.data.encoding import Encoding
from rayloom.data.example import Example
from rayloom.data.template import Rendered, Renderer
from rayloom.data.truncate import turn_starts, without_turns
from rayloom.stages.answers import AnswerEncoder, media_refusal

Sides = tuple[Example, Example]


@dataclass(frozen=True)
class PreferenceEncoder(AnswerEncoder):
    """Preference -> ids and labels of both answers, each behind the prompt. Only the answers have labels.

    Where one of the two is longer than the cutoff, both lose the same oldest turns, so that the prompt is still one. A
    pair of which the last turn alone is too long cannot be learnt from: a cut would change what was judged.
    """

    def key(self) -> str:
        return self._key("pairs")

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        """Two sequences of at most `cutoff` ids for each example, the chosen answer's first (`Encoding.border`).

        An example that is no preference, or that the template refuses, has a `fault`; one that no cut makes fit has no
        ids.
        """
        renderer = Renderer(self.tokenizer.load(), self.template, enable_thinking=self.enable_thinking)
        refusals = [_refusal(example) for example in examples]
        pairs = [example for example, refusal in zip(examples, refusals, strict=True) if refusal is None]
        rendered = iter(renderer.render([side for pair in pairs for side in _sides(pair)]))
        encodings = iter([_encoding(renderer, pair, [next(rendered), next(rendered)], cutoff) for pair in pairs])
        return [next(encodings) if refusal is None else Encoding([], [], fault=refusal) for refusal in refusals]


def _encoding(renderer: Renderer, pair: Example, rendered: Sequence[Rendered | ValueError], cutoff: int) -> Encoding:
    """The pair, rendered whole, or without as many of the prompt's turns as it takes."""
    whole, kept = 0, pair
    for dropped in range(len(turn_starts(pair.messages))):
        if dropped:
            kept = without_turns(pair, dropped)
            rendered = renderer.render(_sides(kept))
        chosen, rejected = map(encoding_of, rendered)
        if chosen.fault is not None or rejected.fault is not None:
            return Encoding([], [], fault=chosen.fault or rejected.fault)
        lengths = len(chosen.input_ids), len(rejected.input_ids)
        whole = whole or sum(lengths)
        if max(lengths) <= cutoff:
            return Encoding(
                [*chosen.input_ids, *rejected.input_ids],
                [*chosen.labels, *rejected.labels],
                cut=whole - sum(lengths),
                border=lengths[0],
                messages_cut=len(pair.messages) - len(kept.messages),
            )
    return Encoding([], [], cut=whole)


def _sides(example: Example) -> Sides:
    """The two conversations, in which only the answers are learnt."""
    prompt = tuple(replace(message, train=False) for message in example.messages)
    return Example((*prompt, *example.chosen), example.tools), Example((*prompt, *example.rejected), example.tools)


def _refusal(example: Example) -> str | None:
    """Why preference training cannot learn from an example; None: it can."""
    if not (example.chosen and example.rejected):
        kind = "plain text" if example.text is not None else "a conversation"
        kind = "an answer that was judged by itself (stage kto)" if example.desirable is not None else kind
        return f"the row is {kind}; stages dpo and reward learn from a chosen and a rejected answer"
    return media_refusal(example)
