"""The names and texts under which a job's numbers are told to Prometheus."""

from __future__ import annotations

import math
import re
from typing import get_args

import pytest

from rayloom.config.read import read_job
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.members import Members
from rayloom.rollout.request import EngineOptions
from rayloom.search.gauges import show_search
from rayloom.stages.config import StageConfig
from rayloom.train.gauges import HELP, STATES, JobGauges, engine_measure, help_text
from rayloom.train.track import RayMetrics


def test_every_measure_of_a_stage_has_a_text():
    stages = get_args(get_args(StageConfig)[0])
    assert len(stages) > 4
    measures = {name.partition("/")[0] for stage in stages for name in stage.measures}
    assert measures <= HELP.keys()


def test_names_are_prometheus_names():
    assert all(re.fullmatch(r"[a-z][a-z_]*", name) for name in HELP)
    assert all(text[0].isupper() or text[0].isdigit() for text in HELP.values())


@pytest.mark.parametrize(("loss", "said"), [(0.5, 0), (math.nan, 1), (math.inf, 1)])
def test_a_loss_that_is_no_number_is_told(tmp_path, job_file, loss, said):
    metrics, book = RayMetrics(read_job(job_file), tmp_path), Book()
    metrics._gauges = book  # type: ignore[assignment]
    metrics.log(3, {"loss": loss, "examples/a": 4.0})
    assert book.entries["loss_is_no_number", ""] == said
    assert book.entries["examples", "a"] == 4
    metrics.log(3, {"eval_loss": 1.0})  # an evaluation says nothing of it
    assert book.entries["loss_is_no_number", ""] == said


def test_texts():
    assert help_text("kl") == HELP["kl"]
    assert help_text("eval_loss") == f"Of the evaluation: mean{HELP['loss'].removeprefix('Mean')}"
    assert help_text("unheard_of") == "unheard_of of metrics.jsonl"


def test_every_count_of_the_fleet_has_a_text():
    options = EngineOptions(model="m", precision="fp32", max_length=8, adapter_rank=None, device="cpu")
    counts = Members(RolloutConfig(engines=12), options, (1,)).metrics()
    assert {engine_measure(name)[0] for name in (*counts, "prompts", "tokens", "generate_seconds")} <= HELP.keys()
    assert engine_measure("busy_seconds_11") == ("engine_busy_seconds", "11")
    assert engine_measure("restarts") == ("engine_restarts", "")


class Book:
    """Writes down what a gauge would be set to."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], float] = {}

    def set(self, measure: str, value: float, of: str = "") -> None:
        self.entries[measure, of] = float(value)


def test_a_search_is_told_by_the_status_of_its_trials():
    trials = [("finished", 0.5), ("finished", 0.4), ("running", 0.3), ("failed", None), ("stopped early", 0.9)]
    ledger = {"mode": "min", "metric": "loss", "trials": [{"status": s, "value": v} for s, v in trials]}
    book = Book()
    show_search(book, ledger, 8)
    counts = {of: value for (measure, of), value in book.entries.items() if measure == "search_trials"}
    assert counts == {"waiting": 3, "running": 1, "finished": 2, "stopped early": 1, "failed": 1}
    assert book.entries["search_best", "loss"] == 0.3
    assert ("search_exploits", "") not in book.entries, "it is no population"
    show_search(book, {**ledger, "mode": "max", "exploits": [{}, {}]}, 8)
    assert (book.entries["search_best", "loss"], book.entries["search_exploits", ""]) == (0.9, 2)
    assert {measure for measure, _ in book.entries} <= HELP.keys()


@pytest.mark.parametrize("state", STATES)
def test_a_job_is_in_one_state(state):
    book = Book()
    gauges = JobGauges(book, None)
    gauges.show(state, ["fault", "moved", "fault"], None)
    assert {of for (measure, of), value in book.entries.items() if measure == "state" and value} == {state}
    assert (book.entries["breaks", "fault"], book.entries["breaks", "moved"]) == (2, 1)
    assert ("checkpoint_time", "") not in book.entries, "there is none before it trains"
    gauges.show(state, [], 1e9)
    assert book.entries["checkpoint_time", ""] == 1e9
    assert book.entries["breaks", "fault"] == 0
