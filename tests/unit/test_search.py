"""A search before it starts: what its space draws, the jobs of its trials, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayloom.config.document import Document
from rayloom.config.read import read_job, validate_job
from rayloom.errors import JobError, RequestError
from rayloom.search.metric import Metric
from rayloom.search.plan import plan_search
from rayloom.search.results import best_trial, trials_left
from rayloom.search.show import draw, show
from rayloom.search.space import corner_points, parse_space, points

SPACE = {
    "train.learning_rate": "loguniform(1e-5, 1e-3)",
    "train.warmup": "uniform(0, 0.5)",
    "train.batch_size": "randint(1, 4)",
    "method.rank": {"choice": [4, 8], "when": {"method.type": "lora"}},
}


def document(space: dict[str, Any], **search: Any) -> Document:
    data = {
        "name": "s",
        "model": {"path": "m"},
        "data": {"train": [{"path": "x.jsonl", "weight": 0.5}, {"path": "y.jsonl", "weight": 0.5}],
                 "mix": "interleave_over"},
        "search": {"metric": "loss", "space": space, **search},
    }  # fmt: skip
    return Document("job.yaml", data)


def refusal(space: dict[str, Any], **search: Any) -> str:
    with pytest.raises(RequestError) as error:
        plan_search(document(space, **search))
    return str(error.value)


def test_a_search_needs_a_folder() -> None:
    request = document({"train.learning_rate": "choice(1e-4, 1e-3)"})
    request.data["output_dir"] = "s3://bucket/runs"
    with pytest.raises(RequestError, match="output_dir: a search needs a folder, and s3://bucket/runs is an address"):
        plan_search(request)


def test_points_are_a_function_of_the_seed() -> None:
    entries = parse_space(SPACE)
    drawn = list(points(entries, samples=200, seed=1, whole_grid=False))
    assert drawn == list(points(entries, samples=200, seed=1, whole_grid=False))
    assert drawn != list(points(entries, samples=200, seed=2, whole_grid=False))
    rates = [point["train.learning_rate"] for point in drawn]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 0.35 < sum(rate < 1e-4 for rate in rates) / 200 < 0.65, "evenly by the logarithm"
    assert {point["train.batch_size"] for point in drawn} == {1, 2, 3, 4}, "both ends"
    assert 0.2 < sum(point["train.warmup"] for point in drawn) / 200 < 0.3


def test_a_value_that_yaml_has_cut_at_its_comma() -> None:
    with pytest.raises(
        ValueError, match=r"not 'grid\(2'; within braces YAML ends a value at a comma, so put it in quotes"
    ):
        parse_space({"train.batch_size": "grid(2"})
    with pytest.raises(ValueError, match=r"not 'many'$"):
        parse_space({"train.batch_size": "many"})


def test_grid_values_are_combined_with_samples() -> None:
    entries = parse_space({"train.seed": "grid(1, 2)", "train.batch_size": "grid(1, 2)", "method.rank": "choice(4, 8)"})
    drawn = list(points(entries, samples=3, seed=0, whole_grid=False))
    assert len(drawn) == 12
    assert len(list(points(entries, samples=3, seed=0, whole_grid=True))) == 8


def test_corners_hold_every_end() -> None:
    corners = list(corner_points(parse_space(SPACE)))
    for key, ends in {"train.learning_rate": {1e-5, 1e-3}, "train.batch_size": {1, 4}, "method.rank": {4, 8}}.items():
        assert {corner[key] for corner in corners} == ends


def test_a_trial_is_the_job_with_its_values() -> None:
    plan, jobs = plan_search(document({"data.train[0].weight": "uniform(0.1, 0.9)", **SPACE}, samples=5))
    assert (plan.trials, len(jobs)) == (5, 6 + 5)
    point = plan.points[0]
    job = plan.trial_job("s-0001", point)
    assert job.data.train[0].weight == point["data.train[0].weight"]
    assert (job.train.learning_rate, job.method.rank) == (point["train.learning_rate"], point["method.rank"])
    assert job.search is None
    assert job.run_dir == plan.job.run_dir / "trials" / "s-0001"
    assert plan.best_job(point).run_dir == plan.job.run_dir.with_name("s-best")


def test_a_condition_leaves_a_key_out() -> None:
    space = {
        "method": {"choice": [{"type": "lora"}, {"type": "full"}]},
        "method.rank": {"choice": [4, 16], "when": {"method.type": "lora"}},
    }
    plan, jobs = plan_search(document(space, searcher="grid"))
    assert [plan.values(point) for point in plan.points] == [
        {"method": {"type": "lora"}, "method.rank": 4},
        {"method": {"type": "lora"}, "method.rank": 16},
        {"method": {"type": "full"}},
    ], "a grid has each job once"
    assert jobs[-1].method.type == "full"
    assert plan.document.data.get("method") is None, "the job file's own document stays as it is"


@pytest.mark.parametrize(
    ("space", "search", "message"),
    [
        ({"train.learning_rat": "uniform(0.1, 1)"}, {}, "no key 'learning_rat'; did you mean 'learning_rate'"),
        ({"data.train[5].weight": "uniform(0.1, 1)"}, {}, "there is no entry 5"),
        ({}, {}, "search.space: must not be empty"),
        ({"method.rank": "choice()"}, {}, "method.rank: choice is empty"),
        ({"train.learning_rate": "loguniform(1e-3, 1e-5)"}, {}, "two numbers, the lower one first"),
        ({"train.learning_rate": "loguniform(0, 1e-5)"}, {}, "loguniform takes numbers above 0"),
        ({"train.learning_rate": "normal(0, 1)"}, {}, "unknown 'normal'; known here: loguniform"),
        ({"train.learning_rate": 1e-4}, {}, "write what it is drawn from as"),
        ({"method.rank": "randint(1.5, 4)"}, {}, "randint takes whole numbers"),
        ({"train.warmup": "uniform(0.5, 1.5)"}, {}, "train.warmup: must be below 1, not 1.5"),
        ({"train.deepspeed": "choice(none, zero4)"}, {}, "unknown 'zero4'; did you mean 'zero"),
        ({"method.type": "choice(lora, full)", "method.rank": "choice(8)"}, {}, "unknown key 'method.rank'"),
        ({"name": "choice(a, b)"}, {}, "name is the same in all trials"),
        ({"train.learning_rate": "uniform(0.1, 1)"}, {"searcher": "grid"}, "use grid or choice for it"),
        ({"method.rank": "grid(4, 8)"}, {"searcher": "optuna"}, "use choice for method.rank, not grid"),
        ({"method.rank": "choice(4, 8)"}, {"metric": "eval_loss"}, "needs data.held_out or data.eval"),
        ({"method.rank": "choice(4, 8)"}, {"scheduler": "pbt"}, "search.scheduler: unknown 'pbt'"),
    ],
)  # fmt: skip
def test_a_search_that_is_refused(space: dict[str, Any], search: dict[str, Any], message: str) -> None:
    assert message in refusal(space, **search)


def test_a_scheduler_needs_values_on_the_way() -> None:
    wrong = document({"method.rank": "choice(4, 8)"}, metric="eval_loss", scheduler="asha")
    wrong.data["data"]["held_out"] = 0.1
    with pytest.raises(RequestError, match=r"without train\.eval_steps eval_loss comes at the end only"):
        plan_search(wrong)


def test_a_metric_is_missed_at_the_first_row_of_its_kind() -> None:
    training, evaluation = {"step": 5, "loss": 1.5, "position": {}}, {"step": 5, "eval_loss": 2.0}
    assert Metric("loss").read(training) == 1.5
    assert Metric("loss").read(evaluation) is None
    assert Metric("eval_loss").read(training) is None
    assert Metric("rewards/margin").read({**training, "rewards/margin": None}) is None  # nothing to measure
    with pytest.raises(RequestError, match=r"the job never reports lss; it reports step, loss$"):
        Metric("lss").read(training)
    typo = Metric("eval_los")
    assert typo.read(training) is None
    with pytest.raises(RequestError, match=r"it reports step, loss, eval_loss$"):
        typo.read(evaluation)
    with pytest.raises(JobError, match="loss is nan at step 5"):
        Metric("loss").read({**training, "loss": math.nan})


def trial(name: str, status: str, value: float | None, **values: Any) -> dict[str, Any]:
    return {"name": name, "status": status, "value": value, "values": values, "step": 1, "ended": 0.0, "error": None}


def test_the_best_has_finished(tmp_path: Path) -> None:
    early, late = trial("a", "stopped early", 0.1, x=1e-5), trial("b", "finished", 0.5, x=1e-3, y="oft")
    failed, worse = trial("c", "failed", None, x=1e-4), trial("d", "finished", 0.7, x=2e-3)
    ledger = {"name": "s", "metric": "loss", "mode": "min", "best": "b", "trials": [early, late, failed, worse]}
    assert best_trial(ledger)["name"] == "b"
    assert best_trial({**ledger, "mode": "max"})["name"] == "d"
    assert best_trial({**ledger, "trials": [early, failed]})["name"] == "a"
    assert best_trial({**ledger, "trials": [failed]}) is None
    assert trials_left(ledger, 6) == 2
    draw(ledger, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_the_table_of_a_log_names_every_trial_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """What is no terminal has 80 columns."""
    values = {"train.learning_rate": 1e-3, "train.weight_decay": 0.5}
    trials = [trial(f"learning-rate-000{number}", "stopped early", 0.5 + number, **values) for number in range(3)]
    ledger = {"name": "s", "metric": "eval_loss", "mode": "min", "best": None, "trials": trials}
    show(ledger, Console(width=80))
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if "stopped early" in line]
    assert [row[0] for row in rows] == ["learning-rate-0000", "learning-rate-0001", "learning-rate-0002"]
    assert all(row[5:7] == ["0.001", "0.5"] for row in rows)
    assert "learning_rate" in printed
    assert "…" not in printed


def test_train_leaves_the_search_aside() -> None:
    job = validate_job(document({"method.rank": "choice(4, 8)"}))
    assert job.search is not None
    assert job.method.rank == 8


@pytest.mark.parametrize("name", ["learning-rate", "population"])
def test_the_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    recipe = read_job(root / "jobs" / "search" / f"{name}.yaml")
    assert recipe.search is not None
    plan, _ = plan_search(Document("recipe", recipe.model_dump(mode="json")))
    assert plan.trials == recipe.search.samples
