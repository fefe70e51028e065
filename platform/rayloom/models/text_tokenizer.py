"""A tokenizer for the data tasks: no more than the tokens of texts, without transformers' model code and torch.

Loading a tokenizer as transformers does takes seconds in every process, most of them for what only models need. So the
driver loads it once and hands on its state; a task has it back in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers

from rayloom.models.pieces import PieceTable


@dataclass(frozen=True)
class TokenizerState:
    """Everything that decides about tokens, as text; equal where the fingerprints are."""

    fingerprint: str
    """Changes when the tokens of any text would."""
    backend: str = field(repr=False, compare=False)
    """The `tokenizers.Tokenizer` as JSON."""
    special_tokens: str = field(repr=False, compare=False)
    """Its special tokens by name, as JSON: templates ask for them."""
    eos_token_id: int | None = field(compare=False)

    @staticmethod
    def of(tokenizer: Any) -> TokenizerState:
        """The state of a fast tokenizer of transformers; later changes of it are not in there."""
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        special = json.dumps(tokenizer.special_tokens_map)
        text = backend.to_str()
        fingerprint = hashlib.sha256(f"{text}{special}".encode()).hexdigest()[:16]
        return TokenizerState(fingerprint, text, special, tokenizer.eos_token_id)

    def load(self) -> TextTokenizer:
        """The tokenizer; made once in a process, and changed by nobody."""
        return _load(self)


@lru_cache(maxsize=4)
def _load(state: TokenizerState) -> TextTokenizer:
    return TextTokenizer(tokenizers.Tokenizer.from_str(state.backend), json.loads(state.special_tokens))


class TextTokenizer:
    """Texts -> tokens, as the tokenizer that it stands for makes them."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, Any]) -> None:
        self._backend = backend
        self.special_tokens = special_tokens
        """By name (`bos_token` ...), as templates ask for them."""
        self.added: dict[str, int] = {
            token.content: number for number, token in sorted(backend.get_added_tokens_decoder().items())
        }
        """Tokens that are found in a text before anything else is."""
        self._extents = ByteExtents.of(backend)
        self._table = PieceTable.of(backend)
        self._frames = bool(backend.encode("", add_special_tokens=True).ids)  # puts tokens around a sequence

    def ids(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """The token ids of each text; `add_special_tokens` also puts what begins or ends a sequence."""
        table = None if add_special_tokens and self._frames else self._table
        found = [table.ids(text) if table is not None and text.isascii() else None for text in texts]
        rest = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        encodings = iter(self._backend.encode_batch_fast(rest, add_special_tokens=add_special_tokens))
        return [next(encodings).ids if ids is None else ids for ids in found]

    def encodings(self, texts: Sequence[str]) -> list[Any]:
        """A `tokenizers.Encoding` of each text, with the characters of its tokens. That costs half as much again."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def borders(self, text: str, ids: Sequence[int]) -> np.ndarray | None:
        """Where the tokens of a text begin, in bytes, and where the last one ends: rising, from 0 to the text's length.

        None where the tokens do not stand for just the text's bytes, one after the other.
        """
        return None if self._extents is None else self._extents.borders(text, ids)


class ByteExtents:
    """How many bytes of a text each token of a byte-level BPE vocabulary stands for.

    Such a vocabulary writes every byte as one character of its own, and its tokens put together are the text, so sums
    of lengths say where each token is; the tokenizer need not be asked for it.
    """

    def __init__(self, lengths: np.ndarray, composes: bool) -> None:
        self._lengths = lengths
        self._composes = composes  # the tokenizer first writes letters and their accents as one character (NFC)

    @staticmethod
    def of(backend: tokenizers.Tokenizer) -> ByteExtents | None:
        """None for a tokenizer that is not byte-level, or changes texts before it cuts them up."""
        state = json.loads(backend.to_str())
        model = state["model"]
        if model["type"] != "BPE" or model.get("unk_token") or model.get("continuing_subword_prefix"):
            return None
        if (state["normalizer"] or {"type": "NFC"})["type"] != "NFC" or not _is_byte_level(state["pre_tokenizer"]):
            return None
        lengths = np.zeros(max(backend.get_vocab().values()) + 1, dtype=np.int64)
        for token, number in backend.get_vocab(with_added_tokens=False).items():
            lengths[number] = len(token)
        for token in state["added_tokens"]:
            lengths[token["id"]] = len(token["content"].encode())
        return ByteExtents(lengths, composes=state["normalizer"] is not None)

    def borders(self, text: str, ids: Sequence[int]) -> np.ndarray | None:
        """See `TextTokenizer.borders`."""
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return None
        found = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(self._lengths[np.asarray(ids, dtype=np.int64)], out=found[1:])
        return found if found[-1] == byte_offset(text, len(text)) else None


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a text's bytes are what is cut up, all of them and none besides."""
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = steps
    return (
        last["type"] == "ByteLevel"
        and not last["add_prefix_space"]
        and all(
            (step["type"] == "Split" and step["behavior"] == "Isolated") or step["type"] == "Digits" for step in before
        )
    )


def byte_offset(text: str, character: int) -> int:
    """The byte (of UTF-8) at which a character of a text begins."""
    return character if text.isascii() else len(text[:character].encode())
