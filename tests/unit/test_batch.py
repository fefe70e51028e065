"""A batch holds what the loss needs, and a model that follows it computes the same loss and the same gradients."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayloom.data.rows import SCHEMA, collate
from rayloom.train.batch import TrainedPositions, make_batch

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, 9], "position_ids": [0, 1, 2, 0, 1]},
    {"input_ids": [3, 4, 5], "labels": [3, -100, 5], "position_ids": [0, 1, 2]},
]


def table(rows: list[dict[str, list[int]]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def test_positions_are_those_whose_next_token_is_trained():
    batch = make_batch(table(ROWS), pad_token=0)
    assert batch["positions"].tolist() == [
        1,
        3,
        6,
    ]  # the second row begins at 5; its own first label counts for nothing
    assert batch["labels"].tolist() == batch["shift_labels"].tolist() == [[7, 9, 5]]
    assert batch["input_ids"].shape == batch["position_ids"].shape == (2, 5)


@pytest.mark.parametrize("rows", [[], [{"input_ids": [1, 2], "labels": [-100, -100], "position_ids": [0, 1]}]])
def test_a_batch_that_trains_nothing_keeps_one_position(rows):
    batch = make_batch(table(rows), pad_token=0)
    assert batch["positions"].tolist() == [0]
    assert batch["labels"].tolist() == [[-100]]


def test_a_model_counts_positions_by_itself_where_nothing_is_packed():
    assert "position_ids" not in make_batch(table(ROWS[1:]), 0)
    assert make_batch(table(ROWS), 0)["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]


def test_the_loss_and_its_gradients_are_those_of_all_logits(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, use_cache=False)
    whole = {name: torch.from_numpy(array) for name, array in collate(table(ROWS), 0).items()}
    trained = torch.tensor(3)
    expected = model(**whole, num_items_in_batch=trained)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    head = TrainedPositions(model)
    batch = make_batch(table(ROWS), 0)
    head.choose(batch.pop("positions"))
    output = model(**batch, num_items_in_batch=trained)
    output.loss.backward()
    assert output.logits.shape[:2] == (1, 3)
    torch.testing.assert_close(output.loss, expected.loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)

    head.choose(None)
    assert model(**whole).logits.shape[:2] == (2, 5)


def test_packed_examples_learn_as_if_alone(tiny_model):
    """Loss and gradients of a packed row equal the sum over its examples, each in a row of its own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, use_cache=False)
    examples = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12]]
    packed = {
        "input_ids": [token for ids in examples for token in ids],
        "labels": [label for ids in examples for label in [-100, *ids[1:]]],
        "position_ids": [position for ids in examples for position in range(len(ids))],
    }
    trained = torch.tensor(sum(len(ids) - 1 for ids in examples))
    head = TrainedPositions(model)

    def learn(rows):
        model.zero_grad()
        total = 0.0
        for row in rows:
            batch = make_batch(table([row]), 0)
            head.choose(batch.pop("positions"))
            loss = model(**batch, num_items_in_batch=trained).loss
            loss.backward()
            total += loss.item()
        return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    alone = [{"input_ids": ids, "labels": [-100, *ids[1:]], "position_ids": list(range(len(ids)))} for ids in examples]
    expected, gradients = learn(alone)
    loss, packed_gradients = learn([packed])
    assert loss == pytest.approx(expected, abs=1e-5)  # transformers takes the loss in fp32
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


LENGTHS = [9, 2, 5, 4, 7, 3, 6]


def lone(lengths: list[int]) -> list[dict[str, list[int]]]:
    """Rows of one example each, of which some tokens train."""
    return [
        {
            "input_ids": [(7 * n + position) % 60 for position in range(length)],
            "labels": [-100, *((7 * n + position) % 60 if position % 3 else -100 for position in range(1, length))],
            "position_ids": list(range(length)),
        }
        for n, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(("row", "side_by_side", "shape"), [(2048, 1, (1, 36)), (2048, 2, (2, 19)), (10, 2, (4, 9))])
def test_rows_are_put_together(monkeypatch, row, side_by_side, shape):
    """In as many rows as asked for, or a multiple of it where they would be long; none has much padding."""
    monkeypatch.setattr("rayloom.train.batch.ROW", row)
    batch = make_batch(table(lone(LENGTHS)), 0, side_by_side)
    assert tuple(batch["input_ids"].shape) == shape
    padded = batch["input_ids"].numel() - sum(LENGTHS)
    starts = batch["position_ids"] == 0
    assert int(starts.sum()) == len(LENGTHS) + (padded > 0)  # padding begins anew too; one row has some
    apart = make_batch(table(lone(LENGTHS)), 0)
    assert sorted(batch["labels"][0].tolist()) == sorted(apart["labels"][0].tolist())


def test_rows_that_are_packed_or_alone_stay_as_they_are():
    for rows in (ROWS, ROWS[1:], []):
        one, other = make_batch(table(rows), 0, 2), make_batch(table(rows), 0)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("row", [2048, 10])
def test_rows_put_together_learn_as_if_apart(tiny_model, monkeypatch, row):
    monkeypatch.setattr("rayloom.train.batch.ROW", row)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64, use_cache=False)
    head = TrainedPositions(model)
    found = []
    for side_by_side in (None, 2):
        batch = make_batch(table(lone(LENGTHS)), 0, side_by_side)
        head.choose(batch.pop("positions"))
        model.zero_grad()
        loss = model(**batch, num_items_in_batch=torch.tensor(20)).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for apart, together in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-7)
