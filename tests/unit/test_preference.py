"""Preferences from rows to batches: two sequences a row, and what the model says of their answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from tests.chat import own_ids
from transformers import AutoModelForCausalLM

from rayloom.config.job import JobConfig
from rayloom.data.encoding import IGNORED
from rayloom.data.example import Example, Message
from rayloom.data.plan import Position, Segment
from rayloom.data.rows import EQUAL, TOO_LONG, Encoded, segment_table
from rayloom.data.segment import drop_reason
from rayloom.data.template_library import library_template
from rayloom.errors import RequestError
from rayloom.losses.pairs import tail_weights
from rayloom.models.text_tokenizer import TokenizerState
from rayloom.stages.preference import PreferenceEncoder
from rayloom.stages.rules import check_stage
from rayloom.train.batch import TrainedPositions
from rayloom.train.pairs import answer_sums, make_pair_batch, pairs_of
from rayloom.train.token_scores import TokenScorer

CHATML = library_template("chatml")
QUESTION = (Message("system", "Be brief."), Message("user", "river stone?"))
EARLIER = (Message("user", "lamp " * 30), Message("assistant", "cloud seven"))


def preference(prompt: tuple[Message, ...] = QUESTION, good: str = "river", bad: str = "stone lamp lamp") -> Example:
    return Example(prompt, chosen=(Message("assistant", good),), rejected=(Message("assistant", bad),))


def conversation(example: Example, answer: tuple[Message, ...]) -> Example:
    return Example((*example.messages, *answer))


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> PreferenceEncoder:
    assert CHATML is not None
    return PreferenceEncoder(TokenizerState.of(tokenizer), CHATML)


def test_two_sequences_of_which_the_answers_are_learnt(tokenizer, encoder):
    example = preference((*QUESTION, Message("assistant", "stone"), Message("user", "seven?")))
    (encoding,) = encoder.encode([example], 200)
    for part, answer in zip(encoding.parts, (example.chosen, example.rejected), strict=True):
        ids, labels = encoding.input_ids[part], encoding.labels[part]
        assert ids == own_ids(tokenizer, conversation(example, answer), CHATML)
        learnt = [label for label in labels if label != IGNORED]
        assert tokenizer.decode(learnt) == f"{answer[0].content}<|im_end|>"
        assert labels[-len(learnt) - 1 :].count(IGNORED) <= 1  # the end of the sequence, not the earlier answer


def test_both_lose_the_same_turns(tokenizer, encoder):
    example = preference((QUESTION[0], *EARLIER, QUESTION[1]))
    short = preference()
    longest = len(own_ids(tokenizer, conversation(short, short.rejected), CHATML))
    (cut,), (whole,) = encoder.encode([example], longest), encoder.encode([example], 1000)
    (expected,) = encoder.encode([short], longest)
    assert (cut.input_ids, cut.labels, cut.border) == (expected.input_ids, expected.labels, expected.border)
    assert (cut.cut, cut.messages_cut) == (len(whole.input_ids) - len(cut.input_ids), 2)
    (none,) = encoder.encode([example], longest - 1)
    assert none.input_ids == []
    assert drop_reason(none, longest - 1) == TOO_LONG


def test_equal_answers_are_left_out(encoder):
    (encoding,) = encoder.encode([preference(good="lamp", bad="lamp")], 200)
    assert drop_reason(encoding, 200) == EQUAL
    (other,) = encoder.encode([preference()], 200)
    assert drop_reason(other, 200) is None


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example((*QUESTION, Message("assistant", "river"))), "the row is a conversation; stages dpo and reward learn"),
        (Example(text="river"), "the row is plain text; stages dpo and reward learn"),
        (Example(QUESTION, chosen=preference().chosen, rejected=preference().rejected, images=("x",)), "has images"),
    ],
)
def test_what_is_no_preference(encoder, example, message):
    refused, kept = encoder.encode([example, preference()], 200)
    assert message in refused.fault
    assert kept.border > 0


def table_of(encoder: PreferenceEncoder, examples: list[Example]) -> pa.Table:
    encoded = [
        Encoded(one.input_ids, one.labels, 0, number, border=one.border)
        for number, one in enumerate(encoder.encode(examples, 200))
    ]
    none = np.empty(0, dtype=np.int64)
    segment = Segment(Position(), none, none, none, 0.0, 1.0)
    return segment_table(segment, encoded, [], capacity=64, seed=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_a_model_says_of_pairs(encoder, tokenizer, tiny_model, frozen):
    """Against each answer by itself, in float64."""
    examples = [preference(), preference(good="cloud cloud seven", bad="river")]
    table = table_of(encoder, examples)
    batch = make_pair_batch(table, tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64).eval()
    model.requires_grad_(not frozen)
    chooser = TrainedPositions(model)
    scorer = TokenScorer(model, chooser)
    positions, labels = batch["positions"], batch["labels"][0]
    with torch.no_grad():
        said = scorer(model, batch)
    rows = positions // batch["input_ids"].shape[1]
    pairs = pairs_of(answer_sums(said, batch), None, labels, rows)
    chooser.choose(None)
    order = [row[0] for row in table["rows"].to_pylist()]
    for number, index in enumerate(order):
        for side, total, tokens in (
            (examples[index].chosen, pairs.chosen, pairs.chosen_tokens),
            (examples[index].rejected, pairs.rejected, pairs.rejected_tokens),
        ):
            ids = own_ids(tokenizer, conversation(examples[index], side), CHATML)
            answer = len(tokenizer(f"{side[0].content}<|im_end|>", add_special_tokens=False).input_ids)
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            end = max(
                place for place, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("<|im_end|>")
            )
            places = range(end - answer + 1, end + 1)
            expected = sum(scores[place - 1, ids[place]].item() for place in places)
            assert total[number].item() == pytest.approx(expected, abs=1e-4)
            assert tokens[number] == answer


def test_a_batch_without_pairs_is_one_row_of_padding(encoder):
    table = table_of(encoder, [preference()])
    batch = make_pair_batch(table.slice(0, 0), 0)
    assert batch["input_ids"].shape == (1, 2)
    assert (batch["labels"] == IGNORED).all()
    assert make_pair_batch(table, 0)["input_ids"].shape[0] == 2


def job(**parts: Any) -> JobConfig:
    return JobConfig.model_validate({"name": "a", "model": {"path": "m"}, "data": {"train": ["x.jsonl"]}, **parts})


@pytest.mark.parametrize(
    ("stage", "method", "message"),
    [
        (
            {},
            {"type": "full"},
            "stage.loss: sigmoid compares with the model with its adapter off, and there is none; say stage.reference",
        ),
        (
            {"loss": "ipo"},
            {"init": "pissa"},
            "takes a part; say stage.reference: cached, log-probabilities computed before, or copy, a "
            "second copy of the weights; or take",
        ),
        ({}, {"adapters": ["x"]}, "unless method.new_adapter is true"),
        ({"loss": {"orpo": 1.0, "ipo": 0.5}}, {"type": "full"}, "stage.loss: ipo compares with"),
    ],
)
def test_what_has_no_reference(stage, method, message):
    with pytest.raises(RequestError, match=message):
        check_stage(job(stage={"type": "dpo", **stage}, method=method))
    check_stage(job(stage={"type": "dpo", "loss": "orpo"}, method=method))
    check_stage(job(stage={"type": "dpo", "reference": "copy", **stage}, method=method))
    with pytest.raises(
        RequestError, match=r"stage.reference: copy: zero3 would not shard the copy; use zero2, or cached"
    ):
        check_stage(job(stage={"type": "dpo", "reference": "copy"}, method=method, train={"deepspeed": "zero3"}))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"beta": 0.0}, "greater than 0"),
        (
            {"loss": "hinge", "label_smoothing": 0.1},
            "label_smoothing is for the losses sigmoid, robust, aot, cpo, exo_pair",
        ),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "exo_pair", "label_smoothing": 0.0}, "must be above 0"),
        ({"gamma": 1.0}, "gamma is for loss simpo, not sigmoid"),
        ({"loss": "bce"}, "sigmoid"),
        ({"loss": "simpo", "reference": "copy"}, "reference copy: the loss simpo compares with no reference"),
        ({"loss": "orpo", "reference": "cached"}, "reference cached: the loss orpo compares with no reference"),
        ({"loss": {}}, "at least 1"),
        ({"loss": {"sigmoid": 0.0}}, "greater than 0"),
        ({"loss": {"hinge": 1, "ipo": 1}, "label_smoothing": 0.1}, "not hinge, ipo"),
        ({"ld_alpha": 1.5}, "less than or equal to 1"),
        ({"ld_alpha": 0.5, "ftx": 1.0}, "ld_alpha weighs log-probabilities, of which ftx takes means"),
        ({"ld_alpha": 0.5, "loss": "simpo"}, "of which the losses cpo, simpo, orpo take means"),
    ],
)
def test_bad_input(stage, message):
    with pytest.raises(ValueError, match=message):
        job(stage={"type": "dpo", **stage})


def test_what_stands_behind_the_shorter_answer_counts_less():
    """Against each token by itself: the chosen answer has 3 tokens, the rejected one 5."""
    rows, labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1]), torch.tensor([7, 7, 7, -100, 7, 7, 7, 7, 7])
    assert tail_weights(rows, labels, 2, 0.25).tolist() == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.25, 0.25])
    four = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    weights = tail_weights(four, torch.ones(7, dtype=torch.long), 4, 0.5)  # pairs of 1 and 3, of 2 and 1
    assert weights.tolist() == pytest.approx([1, 1, 0.5, 1, 0.5, 0.5, 1])


@pytest.mark.parametrize("key", ["train_on_prompt", "mask_history"])
def test_masks_that_mean_nothing_here(key):
    data = {"train": ["x.jsonl"], key: True}
    with pytest.raises(RequestError, match=f"data.{key}: stage dpo learns from the last answer, nothing else"):
        check_stage(job(stage={"type": "dpo"}, data=data))
    check_stage(job(data=data))
