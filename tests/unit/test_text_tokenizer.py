"""The data tasks' tokenizer: the tokens of transformers', and borders that are true or not told."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayloom.models.text_tokenizer import TextTokenizer, TokenizerState

REAL = os.environ.get("RAYLOOM_TOKENIZERS")  # a folder of tokenizers; `make test-tokenizers` makes it
TEXTS = st.text(st.sampled_from("ab .\n\t1é\u0301中🙂\u212b<|im_end|>Ġ"), max_size=30)


@pytest.fixture(scope="module")
def state(tokenizer) -> TokenizerState:
    return pickle.loads(pickle.dumps(TokenizerState.of(tokenizer)))


def check_borders(tokenizer: TextTokenizer, text: str) -> bool:
    """Whether borders are told; if so, the tokens between them are the text's bytes."""
    (ids,) = tokenizer.ids([text])
    borders = tokenizer.borders(text, ids)
    if borders is None:
        return False
    (encoding,) = tokenizer.encodings([text])
    assert encoding.ids == ids
    assert (borders[0], borders[-1], len(borders)) == (0, len(text.encode()), len(ids) + 1)
    for token, (start, stop) in enumerate(encoding.offsets):  # these are of characters, of which a token may be a part
        first, last = len(text[:start].encode()), len(text[:stop].encode())
        assert first <= borders[token] <= borders[token + 1] <= last
    return True


@given(text=TEXTS)
def test_tokens_and_borders(tokenizer, state, text):
    ours = state.load()
    assert ours.ids([text]) == [tokenizer(text, add_special_tokens=False).input_ids]
    assert ours.ids([text], add_special_tokens=True) == [tokenizer(text).input_ids]
    assert check_borders(ours, text)


def test_a_composed_text_has_borders_and_another_only_where_nothing_changes(tokenizer):
    assert check_borders(TokenizerState.of(tokenizer).load(), "e\u0301 caf\u00e9")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    composing = TokenizerState.of(PreTrainedTokenizerFast(tokenizer_object=backend)).load()
    assert check_borders(composing, "caf\u00e9")
    assert not check_borders(composing, "e\u0301")
    # Two changes of length that make up for each other: one byte less and one more. The sum alone would not tell.
    assert not check_borders(composing, "\u212b")


def test_added_tokens_that_take_the_space_before_them(tokenizer):
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"][2]["lstrip"] = True
    taking = TokenizerState.of(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend))))
    assert check_borders(taking.load(), "a<|im_end|>")
    assert not check_borders(taking.load(), "a <|im_end|>")


def test_a_tokenizer_that_is_not_byte_level_has_no_borders():
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TokenizerState.of(PreTrainedTokenizerFast(tokenizer_object=words)).load().borders("a", [0]) is None


def test_made_once_in_a_process_and_told_apart_by_what_it_does(tokenizer, tiny_model, state):
    assert state.load() is TokenizerState.of(tokenizer).load()
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.add_tokens(["<more>"])
    changed = TokenizerState.of(other)
    assert changed != state
    assert "<more>" in changed.load().added
    assert changed.load().ids(["<more>"]) == [[other.convert_tokens_to_ids("<more>")]]
    limited = AutoTokenizer.from_pretrained(tiny_model)
    limited("a b c d", truncation=True, max_length=2, padding="max_length")  # leaves its mark in the backend
    assert TokenizerState.of(limited) == state


@pytest.mark.skipif(not REAL, reason="RAYLOOM_TOKENIZERS names no folder of real tokenizers (make test-tokenizers)")
@pytest.mark.parametrize(
    "folder", sorted(Path(REAL or ".").glob("*/tokenizer.json")), ids=lambda path: path.parent.name
)
def test_real_tokenizers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder.parent)
    ours = TokenizerState.of(tokenizer).load()
    generator = np.random.default_rng(0)
    letters = list("ab .\n\t17é\u0301中🙂\u212bĠ'") + list(ours.added)[:8]
    texts = ["".join(generator.choice(letters, 30)) for _ in range(200)]
    assert ours.ids(texts) == tokenizer(texts, add_special_tokens=False).input_ids
    told = sum(check_borders(ours, text) for text in texts)
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])
    assert told > 0 if byte_level else told == 0
