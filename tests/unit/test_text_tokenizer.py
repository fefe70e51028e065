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
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rayloom.models.pieces import PieceTable, compile_for_ascii
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


# --- tokens of ASCII texts from a table -------------------------------------------------------------------------------

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CUTS = {
    "gpt2": [],
    "digits": [pre_tokenizers.Digits(individual_digits=True)],
    "numbers": [pre_tokenizers.Digits(individual_digits=False)],
    "llama3": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
    "possessive": [pre_tokenizers.Split(Regex(r"\p{L}++|[^\p{L}\s]?+\s"), "isolated")],
    "negated": [pre_tokenizers.Split(Regex(r"\P{Lu}{2}|[^\P{P}.]|\d\w"), "isolated")],
    "text": [pre_tokenizers.Split("a.", "isolated")],
}
ASCII = st.text(st.one_of(st.characters(max_codepoint=127), st.sampled_from("  \n\ta1'sSl.")), max_size=40)


def cutting(tokenizer, steps: list[object], use_regex: bool) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
    return backend


@pytest.mark.parametrize("name", CUTS)
@given(texts=st.lists(st.lists(ASCII | st.sampled_from(["<|im_end|>", "<|im_start|>"]), max_size=4).map("".join)))
def test_a_table_of_pieces_is_the_tokenizer(tokenizer, name, texts):
    backend = cutting(tokenizer, CUTS[name], use_regex=name in ("gpt2", "digits", "numbers"))
    table = PieceTable.of(backend)
    assert table is not None
    expected = [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)]
    assert [table.ids(text) for text in texts] == expected
    assert [table.ids(text) for text in texts] == expected  # and again, from the table


@pytest.mark.parametrize(
    "source",
    [
        r"^a",
        r"a$",
        r"a.",
        r"(a)",
        r"[a[b]]",
        r"[a&&b]",
        r"\p{Han}",
        r"\bword",
        r"(?m:a)",
        r"a{1,2}+",
        r"a*",
        r"\X",
        "[",
        "[]",
    ],
)
def test_an_expression_that_two_engines_may_read_differently_is_not_used(source):
    assert compile_for_ascii(source) is None


def test_a_tokenizer_that_cannot_be_told_from_pieces_is_asked_itself(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    changes: list[dict[str, object]] = [
        {"model": state["model"] | {"dropout": 0.1}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"added_tokens": [state["added_tokens"][0] | {"lstrip": True}, *state["added_tokens"][1:]]},
    ]
    for change in changes:
        assert PieceTable.of(Tokenizer.from_str(json.dumps(state | change))) is None


def test_the_table_has_an_end(tokenizer, monkeypatch):
    monkeypatch.setattr("rayloom.models.pieces._MOST_PIECES", 3)
    table = PieceTable.of(tokenizer.backend_tokenizer)
    assert table is not None
    text = "one two three four five"
    assert table.ids(text) == table.ids(text) == tokenizer(text, add_special_tokens=False).input_ids
    assert len(table._of_piece) == 3


@pytest.mark.skipif(not REAL, reason="RAYLOOM_TOKENIZERS names no folder of real tokenizers (make test-tokenizers)")
@pytest.mark.parametrize(
    "folder", sorted(Path(REAL or ".").glob("*/tokenizer.json")), ids=lambda path: path.parent.name
)
def test_real_tokenizers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder.parent)
    ours = TokenizerState.of(tokenizer).load()
    generator = np.random.default_rng(0)
    plain = list(map(chr, range(128))) + list("  \n\tae12'.") * 9 + [text for text in ours.added if text.isascii()][:8]
    texts = ["".join(generator.choice(plain, 40)) for _ in range(2000)]
    assert ours.ids(texts) == tokenizer(texts, add_special_tokens=False).input_ids
    letters = list("ab .\n\t17é\u0301中🙂\u212bĠ'") + list(ours.added)[:8]
    texts = ["".join(generator.choice(letters, 30)) for _ in range(200)]
    assert ours.ids(texts) == tokenizer(texts, add_special_tokens=False).input_ids
    told = sum(check_borders(ours, text) for text in texts)
    byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])
    assert told > 0 if byte_level else told == 0
