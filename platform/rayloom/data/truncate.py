"""What becomes of a conversation that is longer than the cutoff.

1. It loses whole turns, from the oldest, until it fits or one turn is left. A turn is a user's message with all that
   follows up to the user's next one: answers, tool calls, what the tools answered. The system message stays. What is
   left is rendered anew, so it is exactly what the template makes of the shorter conversation.
2. The one turn that is left is cut inside its texts, each from its end, the longest first: no text keeps more tokens
   than the largest number with which all fit. So a long prompt leaves a short answer whole, and a long answer a short
   prompt. The template's own tokens, tool calls, added tokens (an end-of-turn, an image's) and media blocks stay.
3. If that does not do, or nothing that is trained is left, the example cannot be trained on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from rayloom.data.example import Example, Message
from rayloom.data.template import Rendered


def turn_starts(messages: Sequence[Message]) -> list[int]:
    """Where each turn begins: the first message behind the system message, and users' messages behind an answer."""
    first = 1 if messages and messages[0].role == "system" else 0
    return [
        index
        for index in range(first, len(messages))
        if index == first or (messages[index].role == "user" and messages[index - 1].role != "user")
    ]


def without_turns(example: Example, count: int) -> Example:
    """The example without its `count` oldest turns; fewer than it has."""
    first, *_ = starts = turn_starts(example.messages)
    return replace(example, messages=example.messages[:first] + example.messages[starts[count] :])


def cut_texts(
    rendered: Rendered, parts: Sequence[Sequence[int]], cutoff: int, inner: Collection[int] = ()
) -> Rendered | None:
    """Cut texts from their ends until at most `cutoff` tokens are left; None: that cannot be done.

    Args:
        parts: for each text the positions of its tokens that may be cut, rising; no position in two of them. Each
            keeps at least one.
        inner: positions of tokens that go on with a character that the token before began: no text ends before one.
    """
    if len(rendered.input_ids) <= cutoff:
        return rendered
    fixed = len(rendered.input_ids) - sum(len(part) for part in parts)
    limit = _limit([len(part) for part in parts], cutoff - fixed)
    if limit < 1:
        return None
    cut: set[int] = set()
    for part in parts:
        keep = min(limit, len(part))
        while 0 < keep < len(part) and part[keep] in inner:
            keep -= 1
        if keep == 0:
            return None
        cut.update(part[keep:])
    return Rendered(
        [token for index, token in enumerate(rendered.input_ids) if index not in cut],
        [trained for index, trained in enumerate(rendered.trained) if index not in cut],
    )


def _limit(lengths: Sequence[int], budget: int) -> int:
    """The largest number of tokens that each text may have so that all together have at most `budget`; they have more.

    Below one where the budget has not one for each, and where there are none.
    """
    limit = 0
    for done, length in enumerate(sorted(lengths)):
        limit = budget // (len(lengths) - done)
        if length > limit:
            break
        budget -= length
    return limit
