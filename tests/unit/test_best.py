"""Which evaluation is the best, when it is time to stop, and what of it a job file may say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayloom.config.job import JobConfig
from rayloom.errors import JobError, RequestError
from rayloom.stages.rules import check_stage
from rayloom.train.best import BestRule

VALUES = st.lists(st.floats(0, 5), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("metric", "best"),
    [("eval_loss", min), ("eval_perplexity/a", min), ("eval_accuracy", max), ("eval_rewards/margin", max)],
)
@given(values=VALUES, patience=st.integers(1, 4))
def test_a_run(metric, best, values, patience):
    rule, found, at, ended = BestRule(metric, patience, 10), None, 0, None
    for number, value in enumerate(values, 1):
        if rule.is_better(value, found):
            found, at = value, number
        elif rule.is_over(10 * number, 10 * at):
            ended = number
            break
    seen = values[: ended or len(values)]
    assert found == best(seen)
    assert at == seen.index(found) + 1
    waits = [n for n in range(1, len(values) + 1) if n - (values.index(best(values[:n])) + 1) >= patience]
    assert ended == (waits[0] if waits else None)


def test_what_is_no_number_is_never_the_best():
    rule = BestRule("eval_loss", None, 1)
    assert not any(rule.is_better(float(value), None) for value in ("nan", "inf", "-inf"))
    assert not BestRule("eval_rewards/margin", None, 1).is_better(float("inf"), 1.0)
    assert rule.is_better(1.0, None)
    assert not rule.is_over(1000, 1)


@pytest.mark.parametrize(
    ("metric", "of_set"), [("eval_perplexity/a", "a"), ("eval_rewards/margin/a/b", "a/b"), ("eval_reward/b", "b")]
)
def test_a_set_of_which_nothing_was_evaluated_is_named(metric, of_set):
    rule = BestRule(metric, None, 1)
    assert rule.value({"eval_loss": 1.0, metric: 2.0}) == 2.0
    with pytest.raises(JobError, match=f"the evaluation gave no {metric}: set {of_set} has no example"):
        rule.value({"eval_loss": 1.0})


def job(metric: str, stage: str = "sft", **data: object) -> JobConfig:
    data = {"train": ["x.jsonl", "y.jsonl"], "held_out": 0.1, **data}
    train = {"best_metric": metric, "eval_steps": 5}
    return JobConfig.model_validate(
        {"name": "a", "model": {"path": "m"}, "data": data, "stage": {"type": stage}, "train": train}
    )


@pytest.mark.parametrize(
    ("metric", "stage"),
    [
        ("eval_loss", "sft"),
        ("eval_perplexity/x", "sft"),
        ("eval_accuracy/x", "sft"),
        ("eval_rewards/margin/y", "dpo"),
        ("eval_accuracy", "kto"),
    ],
)
def test_what_is_told(metric, stage):
    check_stage(job(metric, stage))


@pytest.mark.parametrize(
    ("metric", "stage", "message"),
    [
        (
            "eval_perplexity",
            "dpo",
            "is not told in stage dpo; known: eval_loss, eval_accuracy, eval_rewards/margin, each",
        ),
        ("loss", "sft", "loss is not told in stage sft"),
        ("eval_loss/z", "sft", "each also of one set, such as eval_loss/x"),
    ],
)
def test_what_is_not(metric, stage, message):
    with pytest.raises(RequestError, match=message):
        check_stage(job(metric, stage))


def test_nothing_to_compare():
    with pytest.raises(RequestError, match=r"train.best_metric: nothing is evaluated; say data.held_out or data.eval"):
        check_stage(job("eval_loss", held_out=0.0))
