"""The encoder of supervised fine-tuning: labels are the ids where an answer is, and nowhere else."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from tests.chat import renderer_of

from rayloom.data.encoding import IGNORED, Encoding
from rayloom.data.example import Example, Message
from rayloom.data.template import Rendered
from rayloom.data.template_library import library_template
from rayloom.models.text_tokenizer import TokenizerState
from rayloom.stages.sft import SftEncoder

QUESTION = (Message("user", "What is your name?"),)
ANSWER = (Message("assistant", "Loomis."),)
EXAMPLES = [
    Example(QUESTION + ANSWER),
    Example((Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes?"))),
]


def test_labels_are_the_ids_of_the_answers(tokenizer):
    encoder = SftEncoder(TokenizerState.of(tokenizer), tokenizer.chat_template)
    encoder = pickle.loads(pickle.dumps(encoder))  # as it reaches a task
    encoded = encoder.encode(EXAMPLES, 2048)
    for encoding, rendered in zip(
        encoded, renderer_of(tokenizer, tokenizer.chat_template).render(EXAMPLES), strict=True
    ):
        assert isinstance(rendered, Rendered)
        assert encoding.input_ids == rendered.input_ids
        assert [label != IGNORED for label in encoding.labels] == rendered.trained
        assert all(label in (token, IGNORED) for label, token in zip(encoding.labels, encoding.input_ids, strict=True))
        assert (encoding.cut, encoding.messages_cut, encoding.fault) == (0, 0, None)
    assert learnt(tokenizer, encoded[0]) == "Loomis.<|im_end|>"
    assert encoder.encode([], 2048) == []


def learnt(tokenizer, encoding):
    return tokenizer.decode([label for label in encoding.labels if label != IGNORED])


def test_the_settings_reach_the_renderer(tokenizer):
    example = Example(QUESTION + ANSWER + QUESTION + ANSWER)
    template = library_template("qwen3")
    (encoding,) = SftEncoder(TokenizerState.of(tokenizer), template, mask_history=True).encode([example], 2048)
    assert learnt(tokenizer, encoding) == "Loomis.<|im_end|>"
    (encoding,) = SftEncoder(TokenizerState.of(tokenizer), template, train_on_prompt=True).encode([example], 2048)
    assert encoding.labels == encoding.input_ids
    (encoding,) = SftEncoder(TokenizerState.of(tokenizer), template, enable_thinking=True).encode([EXAMPLES[0]], 2048)
    assert learnt(tokenizer, encoding) == "<think>\n\n</think>\n\nLoomis.<|im_end|>"


def test_the_key_changes_with_what_changes_the_tokens(tokenizer):
    plain = SftEncoder(TokenizerState.of(tokenizer), tokenizer.chat_template)
    others = [
        replace(plain, template=library_template("qwen3")),
        replace(plain, train_on_prompt=True),
        replace(plain, mask_history=True),
        replace(plain, enable_thinking=False),
    ]
    assert plain.key() == replace(plain).key()
    assert len({encoder.key() for encoder in (plain, *others)}) == 5
    assert not plain.splits


def test_what_is_too_long_is_cut(tokenizer):
    long = Example((Message("user", "a" * 100), *ANSWER))
    (encoding,) = SftEncoder(TokenizerState.of(tokenizer), tokenizer.chat_template).encode([long], 40)
    assert len(encoding.input_ids) == 40
    assert encoding.cut > 0
    assert learnt(tokenizer, encoding) == "Loomis.<|im_end|>"


@pytest.mark.parametrize(
    ("example", "fault"),
    [
        (Example(text="Once"), "the row is plain text; "),
        (Example(QUESTION, chosen=ANSWER, rejected=ANSWER), "the row is a preference (chosen and rejected); "),
        (Example(QUESTION + ANSWER, desirable=True), "the row judges its answer as desirable or not; "),
        (Example(QUESTION + ANSWER, images=("a.png",)), "the row has images, videos or audios, "),
        (Example((Message("tool", "4"), *ANSWER)), "the chat template refuses a conversation with the roles tool, "),
        (Example(), "the chat template renders nothing for this conversation"),
    ],
)
def test_a_bad_row_leaves_the_others_alone(example, fault, tokenizer):
    encoder = SftEncoder(TokenizerState.of(tokenizer), library_template("chatml"))
    first, bad, last = encoder.encode([EXAMPLES[0], example, EXAMPLES[1]], 2048)
    assert bad.fault is not None
    assert bad.fault.startswith(fault)
    assert bad == Encoding([], [], fault=bad.fault)
    assert [first, last] == encoder.encode(EXAMPLES, 2048)
