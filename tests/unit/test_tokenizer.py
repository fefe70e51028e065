"""Added tokens are part of the tokenizer, and of all that follows from it."""

from __future__ import annotations

import pytest

from rayloom.errors import RequestError
from rayloom.models.config import ModelConfig
from rayloom.models.text_tokenizer import TokenizerState
from rayloom.models.tokenizer import TokenizerSource, load_tokenizer


def source(path: object, **fields: object) -> TokenizerSource:
    return TokenizerSource.of(ModelConfig.model_validate({"path": str(path), **fields}))


def test_added_tokens_are_one_token_each(tiny_model):
    plain = load_tokenizer(str(tiny_model))
    more = source(tiny_model, add_tokens=["loomword"], add_special_tokens=["<|tool|>"])
    tokenizer = load_tokenizer(more)
    assert tokenizer("loomword<|tool|>").input_ids == [len(plain), len(plain) + 1]
    assert tokenizer.decode([len(plain), len(plain) + 1], skip_special_tokens=True) == "loomword"
    assert TokenizerState.of(load_tokenizer(more)) != TokenizerState.of(load_tokenizer(str(tiny_model)))
    assert len(load_tokenizer(str(tiny_model))) == len(plain)  # the shared one is as it was


def test_a_token_that_is_there_already(tiny_model):
    with pytest.raises(RequestError, match=r"^model\.add_special_tokens: .* has the token '<\|im_end\|>' already"):
        load_tokenizer(source(tiny_model, add_special_tokens=["<|im_end|>"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"add_tokens": ["a", "a"]}, "the token 'a' is added twice"),
        ({"add_tokens": ["a"], "add_special_tokens": ["a"]}, "the token 'a' is added twice"),
        ({"add_tokens": [""]}, "an added token must not be empty"),
        ({"token_descriptions": {"b": "text"}}, "`token_descriptions` describes 'b', which is neither"),
        ({"add_tokens": ["b"], "token_descriptions": {"b": " "}}, "the description of 'b' is empty"),
        ({"shifted_attention": True, "attention": "eager"}, "`shifted_attention` computes with sdpa"),
        ({"quantization": "nf4", "train_from_scratch": True}, "which a quantized one cannot"),
        ({"quantization": {"type": "int8", "bits": 2}}, "`bits` says nothing for type int8; it belongs to hqq"),
        ({"quantization": {"type": "hqq", "group_size": 20}}, "`group_size` must be a multiple of 8, not 20"),
        ({"kernels": "unsloth", "train_from_scratch": True}, "`kernels: unsloth` loads a model's own weights"),
    ],
)
def test_what_contradicts_itself(fields, message):
    with pytest.raises(ValueError, match="validation error") as refused:
        source("m", **fields)
    assert message in str(refused.value)
