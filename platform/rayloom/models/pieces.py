"""Tokens of ASCII texts from a table: a byte-level BPE vocabulary gives a piece of text the same tokens wherever it is.

Such a tokenizer cuts a text into pieces (words, runs of digits, of spaces) by regular expressions, and only then looks
for tokens, in each piece by itself. The pieces of most texts are few and come again, so what the tokenizer made of one
is kept. The expressions are its own, rewritten for ASCII, where Python's `re` and the tokenizer's engine say the same;
a text with other characters, and a tokenizer that is not understood, are left to the tokenizer itself.
"""

from __future__ import annotations

import json
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import tokenizers

_ASCII = [chr(code) for code in range(128)]
# What `ByteLevel` itself cuts by, as GPT-2 did.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GROUPS = ("(?:", "(?=", "(?!", "(?<=", "(?<!", "(?i:")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "s": lambda character: character in "\t\n\x0b\x0c\r ",
    "d": lambda character: character in "0123456789",
    "w": lambda character: character.isalnum() or character == "_",
}
_CONTROLS = "rntfv"
_MOST_PIECES, _LONGEST_PIECE = 1 << 16, 64


class PieceTable:
    """Ids of ASCII texts by one tokenizer; what it made of a piece is kept, up to some ten megabytes."""

    def __init__(self, model: Any, cuts: Sequence[re.Pattern[str]], added: Sequence[dict[str, int]]) -> None:
        self._cuts = cuts
        self._added = [(_alternatives(tokens), tokens) for tokens in added if tokens]
        self._of_piece = _Pieces(model)

    @staticmethod
    def of(backend: tokenizers.Tokenizer) -> PieceTable | None:
        """None for a tokenizer that is not byte-level BPE, or that cuts texts in a way which is not understood."""
        state = json.loads(backend.to_str())
        model = state["model"]
        plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        if model["type"] != "BPE" or not plain or (state["normalizer"] or {"type": "NFC"})["type"] != "NFC":
            return None
        if any(token[key] for token in state["added_tokens"] for key in ("lstrip", "rstrip", "single_word")):
            return None
        cuts = _cuts(state["pre_tokenizer"])
        if cuts is None:
            return None
        # Those that are looked for before the text is normalized come first.
        added = [
            {token["content"]: token["id"] for token in state["added_tokens"] if token["normalized"] == normalized}
            for normalized in (False, True)
        ]
        return PieceTable(backend.model, cuts, added)

    def ids(self, text: str) -> list[int]:
        """The ids of an ASCII text, as the tokenizer gives them without the tokens that begin or end a sequence."""
        return self._split(text, 0)

    def _split(self, text: str, level: int) -> list[int]:
        if level == len(self._added):
            pieces = [text]
            for cut in self._cuts:
                pieces = [piece for part in pieces for piece in cut.split(part) if piece]
            return list(chain.from_iterable(map(self._of_piece.__getitem__, pieces)))
        pattern, tokens = self._added[level]
        ids: list[int] = []
        for number, part in enumerate(pattern.split(text)):  # a text, a token, a text ...
            if number % 2:
                ids.append(tokens[part])
            elif part:
                ids += self._split(part, level + 1)
        return ids


class _Pieces(dict[str, tuple[int, ...]]):
    """A piece -> its ids; asks the vocabulary's model for what is not there yet."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(piece.translate(_BYTE_CHARACTERS)))
        if len(piece) <= _LONGEST_PIECE and len(self) < _MOST_PIECES:
            self[piece] = ids
        return ids


def _byte_characters() -> dict[int, int]:
    """The character as which a byte-level vocabulary writes each byte below 128 (GPT-2's `bytes_to_unicode`)."""
    unprintable = [code for code in range(128) if not 33 <= code <= 126]
    return {code: 256 + number for number, code in enumerate(unprintable)}


_BYTE_CHARACTERS = _byte_characters()


def _alternatives(tokens: dict[str, int]) -> re.Pattern[str]:
    """Finds the leftmost token, of those that begin there the longest."""
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def _cuts(pre_tokenizer: dict[str, Any] | None) -> list[re.Pattern[str]] | None:
    """The expressions by which a text is cut, one after the other; None: not understood."""
    if pre_tokenizer is None:
        return None
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    sources = [_step(step) for step in before] + ([_GPT2] if last.get("use_regex", True) else [])
    found = [None if source is None else compile_for_ascii(source) for source in sources]
    return None if None in found else [pattern for pattern in found if pattern is not None]


def _step(step: dict[str, Any]) -> str | None:
    if step["type"] == "Digits":
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return None
    pattern = step["pattern"]
    return str(pattern["Regex"]) if "Regex" in pattern else "".join(map(_literal, pattern["String"]))


def _literal(character: str) -> str:
    return character if character.isalnum() or ord(character) > 127 else f"\\{character}"


def compile_for_ascii(source: str) -> re.Pattern[str] | None:
    """A tokenizer's expression as one of Python's that finds the same in ASCII texts, in a group for `split`.

    None where it uses anything that the two engines may read differently (the tokenizers' is Oniguruma), or where it
    can match nothing at all.
    """
    parts: list[str] = []
    in_class = False
    at = 0
    while at < len(source):
        character = source[at]
        if character == "\\":
            escape = re.match(r"\\([pP])\{(\w+)\}|\\(.)", source[at:], re.DOTALL)
            said = None if escape is None else _escape(escape, in_class)
            if escape is None or said is None:
                return None
            parts.append(said)
            at += escape.end()
            continue
        if in_class:
            if character == "[" or source.startswith("&&", at):
                return None  # classes within classes
            in_class = character != "]"
        elif character == "[":
            in_class = True
            if source.startswith("[^", at):
                character = "[^"
        elif character in "^$." or source.startswith("}+", at):
            return None
        elif character == "(":
            group = next((one for one in _GROUPS if source.startswith(one, at)), None)
            if group is None:
                return None
            character = group
        parts.append(character)
        at += len(character)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pattern = re.compile(f"({''.join(parts)})")
    except (re.error, Warning):
        return None
    return None if pattern.fullmatch("") else pattern


def _escape(escape: re.Match[str], in_class: bool) -> str | None:
    """What stands for an escape: within a class the characters, outside of one a class of them."""
    negated, name, letter = escape[1] == "P", escape[2], escape[3]
    if letter is not None:
        if letter.lower() not in _CLASSES:
            known = letter in _CONTROLS or (letter.isascii() and not letter.isalnum())
            return escape[0] if known else None
        negated, holds = letter.isupper(), _CLASSES[letter.lower()]
    else:
        if not re.fullmatch(r"[LMNPSZC][a-z]?", name):  # scripts and the like
            return None

        def holds(character: str) -> bool:
            return unicodedata.category(character).startswith(name)

    characters = [re.escape(character) for character in _ASCII if holds(character) != negated]
    if in_class:
        return "".join(characters)
    return f"[{''.join(characters)}]" if characters else "(?!)"
