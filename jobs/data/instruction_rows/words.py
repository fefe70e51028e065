"""Helpers of make_instructions.py: reading tables, forming words, and working out sums."""

import random
import re
from collections.abc import Sequence
from fractions import Fraction

Draft = list[tuple[str, str]]
"""A question with its answer, then follow-up questions with theirs, which may be left off."""


def table(text: str) -> list[list[str]]:
    """Read one entry a line, its fields split by '|'; an indented line continues the line before it."""
    lines = re.sub(r"\n +", " ", text.strip()).split("\n")
    return [[field.strip().replace(r"\n", "\n") for field in line.split("|")] for line in lines]


def phrases(text: str) -> list[str]:
    """Read phrases split by commas."""
    return [" ".join(phrase.split()) for phrase in text.split(",")]


def pairs(text: str) -> list[list[str]]:
    """Read entries split by commas, their fields split by colons."""
    return [[field.strip() for field in entry.split(":")] for entry in phrases(text)]


def ask(rng: random.Random, forms: str, **values: object) -> str:
    """Choose one of the forms of a question, split by '|', and fill in the values."""
    return rng.choice(forms.split("|")).format(**values)


def cap(text: str) -> str:
    """Make the first letter a capital and leave the rest alone."""
    return text[:1].upper() + text[1:]


def stop(sentence: str) -> str:
    """End a sentence with a full stop, unless it has one."""
    return sentence if sentence.endswith(".") else sentence + "."


def with_article(noun: str) -> str:
    """Put "a" or "an" before a word; fit for the words of the tables."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    """Form the plural of a word; fit for the words of the tables."""
    if noun == "foot":
        return "feet"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("ch", "s", "x")) else "s")


def num(number: Fraction | int) -> str:
    """Write a number, with decimals only where it needs them."""
    return f"{float(number):.6f}".rstrip("0").rstrip(".")


def count(number: Fraction | int, noun: str) -> str:
    """Write a number with its noun in the right form, such as "1 foot" or "3 feet"."""
    return f"{num(number)} {noun if number == 1 else plural(noun)}"


def listing(items: Sequence[object]) -> str:
    """Join items with commas and a final "and"."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def quoted(words: Sequence[str]) -> str:
    """Join words, each in double quotes, with commas and a final "and"."""
    return listing([f'"{word}"' for word in words])


def numbered(items: Sequence[str]) -> str:
    """Write items as a numbered list, one a line."""
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))


def clock(minutes: int) -> str:
    """Write the minutes since midnight as a time of day, such as 18:05."""
    return f"{minutes // 60 % 24}:{minutes % 60:02}"


def value_of(expression: str) -> Fraction:
    """Compute a sum such as "2 × 3 + 4", multiplying and dividing first."""
    tokens = expression.split()
    total, term = Fraction(0), Fraction(tokens[0])
    for sign, token in zip(tokens[1::2], tokens[2::2], strict=True):
        number = Fraction(token)
        if sign in "×÷":
            term = term * number if sign == "×" else term / number
        else:
            total, term = total + term, number if sign == "+" else -number
    return total + term


def work_out(text: str) -> str:
    """Put the result of a sum in place of each "#" that follows it, and of later ones."""
    result = ""
    while "#" in text:
        before, after = text.split("#", 1)
        expression = re.search(r"([\d.]+(?: [+×÷-] [\d.]+)+) = $", before)
        result = num(value_of(expression[1])) if expression else result
        text = before + result + after
    return text
