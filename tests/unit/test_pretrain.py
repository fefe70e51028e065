"""Plain text to tokens: the tokenizer's own ids, the end of sequence, everything trained."""

from __future__ import annotations

from rayloom.data.example import Example, Message
from rayloom.models.text_tokenizer import TokenizerState
from rayloom.stages.pretrain import PretrainEncoder


def test_a_text_is_its_tokens_and_the_end(tokenizer):
    encoder = PretrainEncoder(TokenizerState.of(tokenizer))
    texts = ["a river of stone", "", "lamp"]
    encodings = encoder.encode([Example(text=text) for text in texts], cutoff=4)
    for text, encoding in zip(texts, encodings, strict=True):
        assert encoding.input_ids == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        assert encoding.labels == encoding.input_ids
        assert (encoding.cut, encoding.fault) == (0, None)


def test_a_conversation_is_refused(tokenizer):
    chat = Example(messages=(Message("user", "Q"), Message("assistant", "A")))
    first, second = PretrainEncoder(TokenizerState.of(tokenizer)).encode([chat, Example(text="lamp")], cutoff=4)
    assert "holds a conversation" in (first.fault or "")
    assert second.fault is None
