"""Virtual tokens with our batches: loss and gradients are PEFT's own, and training goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from tests.unit.test_methods import IDS, load, logits_of, method_of, train

from rayloom.data.rows import SCHEMA
from rayloom.methods.attach import attach_method
from rayloom.methods.prompts import virtual_tokens
from rayloom.methods.save import load_trained, save_trained
from rayloom.train.batch import TrainedPositions, make_batch

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "position_ids": [0, 1, 2, 3, 4]},
    {"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "position_ids": [0, 1, 2]},
    {"input_ids": [40, 41, 42, 43], "labels": [-100, -100, -100, 43], "position_ids": [0, 1, 2, 3]},
]
METHODS = [
    {"type": "prompt", "virtual_tokens": 3},
    {"type": "p_tuning", "virtual_tokens": 3, "encoder_size": 16},
    {"type": "prefix", "virtual_tokens": 3},
    {"type": "prefix", "virtual_tokens": 3, "projection_size": 16},
]


def attached(folder: Path, method: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return attach_method(load(folder), method_of(method))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
def test_a_padded_batch_learns_what_peft_learns_row_by_row(method, tiny_model):
    model = attached(tiny_model, method)
    trained = torch.tensor(sum(label >= 0 for row in ROWS for label in row["labels"]))
    expected = 0.0
    for row in ROWS:  # each by itself, with all its logits, as PEFT's own documentation does it
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, num_items_in_batch=trained).loss
        loss.backward()
        expected += loss.item()
    wanted = gradients(model)
    assert wanted
    model.zero_grad()

    head = TrainedPositions(model, skip=virtual_tokens(model))
    batch = make_batch(pa.Table.from_pylist(ROWS, schema=SCHEMA), 0)
    head.choose(batch.pop("positions"))
    output = model(**batch, num_items_in_batch=trained)
    output.loss.backward()
    assert output.logits.shape[1] == int(trained)
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("method", "number"), [(METHODS[0], 3), (METHODS[1], 3), (METHODS[2], 0), ({"type": "lora"}, 0)]
)
def test_how_many_hidden_states_stand_before_a_row(method, number, tiny_model):
    assert virtual_tokens(attached(tiny_model, method)) == number


def test_an_ordinary_model_has_none(tiny_model):
    assert virtual_tokens(load(tiny_model)) == 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
def test_training_goes_on_from_a_checkpoint_with_the_network_behind_the_tokens(method, tiny_model, tmp_path):
    model = attached(tiny_model, method)
    train(model)
    save_trained(model, tmp_path)
    torch.manual_seed(1)
    other = attach_method(load(tiny_model), method_of(method))
    assert not torch.equal(logits_of(other), logits_of(model))
    assert load_trained(other, tmp_path)
    torch.testing.assert_close(logits_of(other), logits_of(model), rtol=0, atol=0)
    assert train(other) == train(model)


def test_other_methods_leave_the_checkpoint_to_peft(tiny_model, tmp_path):
    model = attached(tiny_model, {"type": "lora"})
    save_trained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert not load_trained(model, tmp_path)


def test_a_text_begins_as_its_own_embeddings(tiny_model, tokenizer):
    model = attached(tiny_model, {"type": "prompt", "virtual_tokens": 4, "init_text": "Who are you?"})
    ids = (tokenizer("Who are you?")["input_ids"] * 4)[:4]
    embeddings = load(tiny_model).get_input_embeddings()(torch.tensor(ids))
    torch.testing.assert_close(model.prompt_encoder["default"].embedding.weight, embeddings, rtol=0, atol=0)
    assert IDS.shape == (2, 8)
