"""What evaluations tell of all examples and of each set, and what a number that is none does to means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayloom.data.rows import SCHEMA
from rayloom.train.batch import TrainedPositions
from rayloom.train.best import BestRule
from rayloom.train.evaluate import evaluate
from rayloom.train.example_trainer import Scores
from rayloom.train.preference_trainer import PreferenceTrainer

NAN = math.nan


def test_each_set_has_every_metric(tiny_model):
    """But for one without a trained token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trained = [[-100, 6, 7], [-100, 9, 3, 4], [-100, -100]]
    rows = [
        {
            "input_ids": list(range(5, 5 + len(labels))),
            "labels": labels,
            "position_ids": list(range(len(labels))),
            "sets": [n],
        }
        for n, labels in enumerate(trained)
    ]
    tables = [pa.Table.from_pylist([row], schema=SCHEMA) for row in rows]
    found = evaluate(model, tables, ["x", "y", "z"], TrainedPositions(model), 0, torch.device("cpu"))
    names = ["eval_loss", "eval_perplexity", "eval_accuracy"]
    assert list(found) == [*names, *(f"{name}/{of_set}" for of_set in "xy" for name in names)]
    for end in ("", "/x", "/y"):
        assert found[f"eval_perplexity{end}"] == pytest.approx(math.exp(found[f"eval_loss{end}"]))
    assert found["eval_loss"] == pytest.approx((2 * found["eval_loss/x"] + 3 * found["eval_loss/y"]) / 5)


def evaluated(*batches: tuple[Sequence[int], Scores]) -> dict[str, float]:
    """What an evaluation tells of batches' examples, given their sets."""
    trainer: Any = object.__new__(PreferenceTrainer)
    trainer.model_wrapped, trainer.args = torch.nn.Linear(1, 1), SimpleNamespace(device=torch.device("cpu"))
    trainer.measured, trainer._eval_names = ("rewards/desirable", "accuracy"), ["x", "y"]
    trainer._batch = trainer._prepare_inputs = lambda batch: batch
    scores = iter([scores for _, scores in batches])
    trainer._scores = lambda model, inputs: next(scores)
    found: dict[str, float] = trainer._eval_metrics([pa.table({"sets": [[n] for n in sets]}) for sets, _ in batches])
    return found


def scored(losses: list[float], *measures: list[float]) -> Scores:
    return Scores(torch.tensor(losses), torch.tensor(measures))


EMPTY = Scores(torch.tensor([NAN]), torch.empty(2, 0))  # padding, which stands for no example


def test_padding_and_absent_measures_are_left_out():
    found = evaluated(
        ([0, 1], scored([1.0, 2.0], [NAN, 4.0], [1.0, 0.0])),
        ([], EMPTY),
        ([0], scored([6.0], [2.0], [1.0])),
    )
    assert found["eval_loss"] == 3.0
    assert found["eval_rewards/desirable"] == 3.0
    assert (found["eval_loss/x"], found["eval_rewards/desirable/x"], found["eval_accuracy/x"]) == (3.5, 2.0, 1.0)
    assert (found["eval_loss/y"], found["eval_rewards/desirable/y"], found["eval_accuracy/y"]) == (2.0, 4.0, 0.0)


def test_a_loss_that_is_no_number_is_not_left_out():
    """Nor is its set, though no other example of it has a loss, and no mean with it is a number."""
    found = evaluated(
        ([0, 1], scored([1.0, NAN], [5.0, NAN], [1.0, 1.0])), ([], EMPTY), ([0], scored([3.0], [7.0], [0.0]))
    )
    for name in ("eval_loss", "eval_rewards/desirable", "eval_accuracy"):
        assert math.isnan(found[name])
        assert math.isnan(found[f"{name}/y"])
    assert (found["eval_loss/x"], found["eval_rewards/desirable/x"], found["eval_accuracy/x"]) == (2.0, 6.0, 0.5)


@pytest.mark.parametrize("loss", [math.inf, -math.inf])
def test_an_infinite_loss_makes_an_infinite_mean(loss):
    found = evaluated(([0, 1], scored([1.0, loss], [5.0, 6.0], [1.0, 1.0])))
    assert found["eval_loss"] == found["eval_loss/y"] == loss
    assert found["eval_loss/x"] == 1.0


def test_where_nothing_was_evaluated_there_is_no_number():
    """0 would be the best loss of all."""
    found = evaluated(([], EMPTY))
    assert math.isnan(found["eval_loss"])
    assert not BestRule("eval_loss", None, 1).is_better(found["eval_loss"], None)


@pytest.mark.parametrize("bad", [NAN, math.inf, 400.0])
def test_rewards_of_a_skipped_step_are_no_part_of_their_mean(bad):
    trainer: Any = object.__new__(PreferenceTrainer)
    trainer._guard = SimpleNamespace(left_out_last=bad == 400.0)  # a large loss has rewards that are numbers
    trainer.args, trainer._shifts = SimpleNamespace(device=torch.device("cpu")), True
    trainer._before = torch.tensor([6.0, 4.0], dtype=torch.float64)
    trainer._now = torch.tensor([bad, 4.0], dtype=torch.float64)
    trainer._settle_rewards()
    trainer._guard.left_out_last = False
    assert trainer._options("bco_pair") == {"shift": 1.5}
    trainer._now += torch.tensor([4.0, 1.0], dtype=torch.float64)  # the next step is counted again
    trainer._settle_rewards()
    assert trainer._options("bco_pair") == {"shift": 2.0}
