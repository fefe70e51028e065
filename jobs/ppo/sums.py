"""The reward of the recipes of this folder: is the sum right?

An answer is right if the last number in it is the data's. Only that number counts, so listing numbers gains nothing,
nor does a pleasant text: one must know the sum. There are 39 of them, so a guess is seldom right.
"""

from __future__ import annotations

import re


def last_number(text: str) -> str | None:
    """The last whole number in a text, as it stands there."""
    found = re.findall(r"\d+", text)
    return found[-1] if found else None


def right(prompts: list[str], answers: list[str], references: list[str]) -> list[float]:
    """1 for each answer that ends with the right number, else 0."""
    return [float(last_number(answer) == reference) for answer, reference in zip(answers, references, strict=True)]
