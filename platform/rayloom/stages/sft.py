"""Supervised fine-tuning: learn the assistant's words, given all that stands before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rayloom.data.example import Example
from rayloom.data.rows import IGNORED
from rayloom.data.template import Renderer
from rayloom.errors import RequestError
from rayloom.models.load import load_tokenizer


@dataclass(frozen=True)
class SftEncoder:
    """Conversation -> ids and labels. Small enough to send to every task: the tokenizer is loaded where it is used."""

    model_folder: str
    template: str

    def encode(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
        """(input_ids, labels) of each example; labels are `IGNORED` outside the assistant's words."""
        renderer = Renderer(load_tokenizer(self.model_folder), self.template)
        try:
            rendered = renderer.render(examples)
        except ValueError as error:
            raise RequestError(f"data.template: {error}") from None
        return [
            (
                item.input_ids,
                [token if trained else IGNORED for token, trained in zip(item.input_ids, item.trained, strict=True)],
            )
            for item in rendered
        ]
