"""Prompts: a conversation without its last answer -> the ids from where the model goes on, and that answer as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayloom.data.encoding import Encoding
from rayloom.data.example import Example
from rayloom.data.template import Renderer
from rayloom.data.truncate import turn_starts, without_turns
from rayloom.stages.answers import AnswerEncoder, media_refusal


@dataclass(frozen=True)
class PromptEncoder(AnswerEncoder):
    """Conversation, judged answer or preference -> a prompt with the generation prompt behind it.

    What is longer than the cutoff loses its oldest turns; where the last turn alone is too long, the prompt cannot be
    learnt from: cut, it would ask something else.
    """

    def key(self) -> str:
        return self._key("prompts")

    def encode(self, examples: Sequence[Example], cutoff: int) -> list[Encoding]:
        """At most `cutoff` ids of each prompt, each with a label, and the data's own answer (`Encoding.answer`).

        An example without a prompt, or that the template refuses, has a `fault`; one that no cut makes fit has no ids.
        """
        renderer = Renderer(self.tokenizer.load(), self.template, enable_thinking=self.enable_thinking)
        refusals = [_refusal(example) for example in examples]
        prompts = [
            example.without_answer() for example, refusal in zip(examples, refusals, strict=True) if refusal is None
        ]
        rendered = renderer.render_prompts([prompt for prompt, _ in prompts])
        encodings = iter(
            [
                _encoding(renderer, prompt, answer, ids, cutoff)
                for (prompt, answer), ids in zip(prompts, rendered, strict=True)
            ]
        )
        return [next(encodings) if refusal is None else Encoding([], [], fault=refusal) for refusal in refusals]


def _encoding(renderer: Renderer, prompt: Example, answer: str, ids: list[int] | ValueError, cutoff: int) -> Encoding:
    """The prompt, whole or without as many of its oldest turns as it takes."""
    whole, kept = 0, prompt
    for dropped in range(len(turn_starts(prompt.messages))):
        if dropped:
            kept = without_turns(prompt, dropped)
            (ids,) = renderer.render_prompts([kept])
        if isinstance(ids, ValueError):
            return Encoding([], [], fault=str(ids))
        whole = whole or len(ids)
        if len(ids) <= cutoff:
            messages_cut = len(prompt.messages) - len(kept.messages)
            return Encoding(ids, ids, cut=whole - len(ids), answer=answer, messages_cut=messages_cut)
    return Encoding([], [], cut=whole)


def _refusal(example: Example) -> str | None:
    """Why an example asks nothing; None: it does."""
    if example.text is not None:
        return "the row is plain text; stage ppo answers the prompts of conversations"
    return media_refusal(example)
