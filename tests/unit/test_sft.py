"""The encoder of supervised fine-tuning: labels are the ids where an answer is, and nowhere else."""

from __future__ import annotations

import pickle

import pytest

from rayloom.data.example import Example, Message
from rayloom.data.template import Renderer
from rayloom.errors import RequestError
from rayloom.stages.sft import SftEncoder

EXAMPLES = [
    Example((Message("user", "What is your name?"), Message("assistant", "Loomis."))),
    Example((Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes?"))),
]


def test_labels_are_the_ids_of_the_answers(tiny_model, tokenizer):
    encoder = pickle.loads(pickle.dumps(SftEncoder(str(tiny_model), tokenizer.chat_template)))  # as it reaches a task
    encoded = encoder.encode(EXAMPLES)
    for (input_ids, labels), rendered in zip(
        encoded, Renderer(tokenizer, tokenizer.chat_template).render(EXAMPLES), strict=True
    ):
        assert input_ids == rendered.input_ids
        assert [label != -100 for label in labels] == rendered.trained
        assert all(label in (token, -100) for label, token in zip(labels, input_ids, strict=True))
    assert tokenizer.decode([label for label in encoded[0][1] if label >= 0]) == "Loomis.<|im_end|>"
    assert encoder.encode([]) == []


def test_a_template_that_cannot_be_masked_is_a_fault_of_the_request(tiny_model):
    with pytest.raises(RequestError, match=r"^data\.template: the chat template renders nothing"):
        SftEncoder(str(tiny_model), "").encode(EXAMPLES)
