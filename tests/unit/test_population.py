"""A population without Ray: who takes over whom, with which values, and what that is on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rayloom.config.document import Document
from rayloom.config.read import read_job
from rayloom.errors import RequestError
from rayloom.search.plan import TRIALS, SearchPlan, plan_search
from rayloom.search.population import Rungs, changed, exploits, history, next_rung, rungs_of, taken_over
from rayloom.search.run import _heading
from rayloom.search.show import draw
from rayloom.search.takeover import decide, forget_pins, is_ordered, pins_folder, take_over
from rayloom.search.turns import Turns
from rayloom.train.checkpoints import SNAPSHOT
from rayloom.train.head_file import split_groups
from rayloom.train.own_settings import OwnSettings
from rayloom.train.pins import Pins, complete
from rayloom.train.schedule import ProgressSchedule

SPACE = {"train.learning_rate": "loguniform(1e-5, 1e-3)", "train.scheduler": "choice(constant, linear, cosine)"}
TRAIN = {"max_steps": 100, "logging_steps": 5}


def document(space: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **search: Any) -> Document:
    data = {
        "name": "s",
        "model": {"path": "m"},
        "data": {"train": [{"path": "x.jsonl"}]},
        "train": TRAIN | (train or {}),
        "search": {"metric": "loss", "scheduler": "population", "samples": 4, "space": space or SPACE, **search},
    }
    return Document("job.yaml", data)


def planned(folder: Path, **parts: Any) -> SearchPlan:
    whole = document(**parts)
    whole.data["output_dir"] = str(folder)
    return plan_search(whole)[0]


def refusal(**parts: Any) -> str:
    with pytest.raises(RequestError) as error:
        plan_search(document(**parts))
    return str(error.value)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"space": {"method.rank": "choice(4, 8)"}}, "method.rank cannot change within a run"),
        ({"space": {"data.train[0].weight": "uniform(0.1, 1)"}}, "data.train[0].weight cannot change within a run"),
        ({"train": {"max_steps": None}}, "say train.max_steps"),
        ({"train": {"logging_steps": 100}}, "search.interval: 0.2 of train.max_steps (100), where loss comes, is not"),
        ({"train": {"eval_steps": 5, "best_metric": "eval_loss"}}, "train.best_metric: a trial of a population"),
        ({"samples": 1}, "search.samples: a population has at least 2 trials"),
        ({"searcher": "optuna"}, "leave searcher optuna out"),
        ({"quantile": 0.6}, "search.quantile: must be at most 0.5"),
        ({"metric": "eval_loss"}, "needs data.held_out or data.eval"),
    ],
)
def test_a_population_that_is_refused(parts: dict[str, Any], message: str) -> None:
    assert message in refusal(**parts)


def test_rungs_are_where_the_metric_and_a_checkpoint_come(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert rungs_of(plan.job, plan.search) == Rungs(20, 4)
    assert plan.trial_job("s-0001", plan.points[0]).train.save_steps == 20
    assert plan.best_job(plan.points[0]).train.save_steps == 500, "as the job file has it"
    rounded = planned(tmp_path, train={"logging_steps": 15, "save_steps": 5})
    assert rungs_of(rounded.job, rounded.search) == Rungs(15, 6)
    assert rounded.trial_job("s-0001", rounded.points[0]).train.save_steps == 5, "which is at each rung too"


def test_the_worst_take_over_the_best(tmp_path: Path) -> None:
    plan = planned(tmp_path, samples=8)
    values = {f"s-{number}": float(number) for number in range(8)}
    points = {name: dict(plan.points[0], **{"train.learning_rate": 1e-4}) for name in values}
    decided = exploits(values, points, plan.entries, plan.search, 1)
    assert [exploit.trial for exploit in decided] == ["s-6", "s-7"]
    assert {exploit.source for exploit in decided} <= {"s-0", "s-1"}
    assert decided == exploits(dict(reversed(values.items())), points, plan.entries, plan.search, 1), (
        "no clock, no order"
    )
    assert decided != exploits(values, points, plan.entries, plan.search, 2)
    most = plan.search.model_copy(update={"mode": "max"})
    assert [exploit.trial for exploit in exploits(values, points, plan.entries, most, 1)] == ["s-1", "s-0"]
    assert exploits(dict.fromkeys(values, 1.0), points, plan.entries, plan.search, 1) == [], "none is better"
    assert exploits({"s-0": 1.0}, points, plan.entries, plan.search, 1) == []


def test_values_change_a_little_within_their_range(tmp_path: Path) -> None:
    import random

    plan = planned(tmp_path, resample=0.0)
    generator = random.Random(0)
    found = [
        changed({"train.learning_rate": 1e-4, "train.scheduler": "constant"}, plan.entries, plan.search, generator)
        for _ in range(50)
    ]
    assert {point["train.learning_rate"] for point in found} == {8e-5, 1.2e-4}
    assert {point["train.scheduler"] for point in found} == {"constant", "linear"}, "the next one, or the end"
    edge = changed({"train.learning_rate": 1e-3, "train.scheduler": "cosine"}, plan.entries, plan.search, generator)
    assert edge["train.learning_rate"] in (8e-4, 1e-3)
    anew = plan.search.model_copy(update={"resample": 1.0})
    drawn = [changed(found[0], plan.entries, anew, generator)["train.learning_rate"] for _ in range(50)]
    assert len(set(drawn)) == 50
    assert all(1e-5 <= value <= 1e-3 for value in drawn)


def ledger_of(plan: SearchPlan, values: list[float], rung: int = 1) -> dict[str, Any]:
    """All trials have come to a rung; the first one has the first value."""
    trials = [
        {"name": f"s-{number:04d}", "status": "running", "point": point, "values": plan.values(point), "passed": rung}
        | {"rungs": {str(r): {"step": 20 * r, "value": value} for r in range(1, rung + 1)}, "value": value}
        | {"step": 20 * rung, "ended": 0.0, "error": None, "run_dir": f"trials/s-{number:04d}"}
        for number, (point, value) in enumerate(zip(plan.points or (), values, strict=True), 1)
    ]
    head = {"name": "s", "metric": "loss", "mode": "min", "best": None, "decided": rung - 1, "exploits": []}
    return {**head, "trials": trials}


def test_a_rung_waits_for_all_that_live(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    ledger, rungs = ledger_of(plan, [1.0, 2.0, 3.0, 4.0]), Rungs(20, 4)
    assert next_rung(ledger, 4, rungs) == 1
    assert next_rung(ledger, 5, rungs) is None, "one has not begun"
    ledger["trials"][3]["passed"] = 0
    assert next_rung(ledger, 4, rungs) is None
    ledger["trials"][3]["status"] = "failed"
    assert next_rung(ledger, 4, rungs) == 1
    ledger["decided"] = 4
    assert next_rung(ledger, 4, rungs) is None


def run_directory(plan: SearchPlan, name: str, steps: int) -> Path:
    """What a trial's job has left after so many steps; the checkpoint's content says whose it is."""
    folder = plan.folder / TRIALS / name
    checkpoint = folder / "checkpoints" / f"step-{steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text(f"{name} {steps}")
    results = [{"version": 0, "checkpoint_dir_name": one, "metrics": {}} for one in ("step-00000010", checkpoint.name)]
    text = {"ray_version": "2", "checkpoint_results": results, "checkpoint_report_indices": [0, 1]}
    text |= {"latest_checkpoint_result": results[1], "pending_training_results": [], "current_report_index": 2}
    (folder / "checkpoints" / SNAPSHOT).write_text(json.dumps(text))
    rows = [{"step": step, "loss": 1.0} for step in range(5, steps + 10, 5)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.json").write_text("{}")
    return folder


def pinned(plan: SearchPlan, name: str, steps: int = 20) -> Path:
    run = run_directory(plan, name, steps)
    pins = Pins(pins_folder(plan.folder, name, 0), 20, 4)
    pin = pins.take(run / "checkpoints" / f"step-{steps:08d}")
    assert pin is not None
    complete(pin, run)
    return run


def test_a_pin_outlives_its_checkpoint(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    run = run_directory(plan, "s-0001", 20)
    checkpoint, pins = run / "checkpoints" / "step-00000020", Pins(tmp_path / "pins", 20, 4)
    early = checkpoint.with_name("step-00000010")
    early.mkdir()
    assert pins.take(early) is None, "before the first rung"
    pin = pins.take(checkpoint)
    assert pin == tmp_path / "pins" / "1"
    assert pins.take(checkpoint) is None, "once"
    assert Pins(tmp_path / "pins", 20, 4).take(checkpoint) == pin, "found by who begins again"
    assert Pins(tmp_path / "others", 4, 4).take(checkpoint) is None, "behind the last rung"
    complete(pin, run)
    assert (pin / "checkpoints" / checkpoint.name / "weights").stat().st_ino == (checkpoint / "weights").stat().st_ino
    shutil.rmtree(checkpoint)
    assert (pin / "checkpoints" / checkpoint.name / "weights").read_text() == "s-0001 20"
    listed = json.loads((pin / "checkpoints" / SNAPSHOT).read_text())
    assert [one["checkpoint_dir_name"] for one in listed["checkpoint_results"]] == ["step-00000020"]
    assert (listed["checkpoint_report_indices"], listed["current_report_index"]) == ([1], 2)
    rows = [json.loads(line)["step"] for line in (pin / "metrics.jsonl").read_text().splitlines()]
    assert rows == [5, 10, 15, 20], "what came later is not of this checkpoint"


def test_a_trial_goes_on_in_a_copy_of_the_best_one(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    names = [f"s-{number:04d}" for number in range(1, 5)]
    runs = {name: pinned(plan, name) for name in names}
    ledger = ledger_of(plan, [3.0, 1.0, 4.0, 2.0])
    old = ledger["trials"][2]["values"]
    decide(plan, ledger, 1)
    [exploit] = ledger["exploits"]
    assert (exploit["trial"], exploit["from"], exploit["step"], exploit["old"]) == ("s-0003", "s-0002", 20, old)
    assert exploit["new"] == ledger["trials"][2]["values"] == plan.values(ledger["trials"][2]["point"]) != old
    worst = runs["s-0003"]
    assert (worst / "checkpoints" / "step-00000020" / "weights").read_text() == "s-0003 20", "its job has not ended yet"
    forget_pins(plan.folder, 1)
    shutil.rmtree(runs["s-0002"])  # whatever becomes of the other one
    assert is_ordered(worst, ledger)
    take_over(worst, ledger)
    assert (worst / "checkpoints" / "step-00000020" / "weights").read_text() == "s-0002 20"
    assert read_job(worst / "job.yaml") == plan.trial_job("s-0003", ledger["trials"][2]["point"])
    assert not is_ordered(worst, ledger)
    take_over(worst, ledger)  # nothing is left to do
    assert not [child for child in worst.parent.iterdir() if child.name.startswith(".")]


def test_a_take_over_that_broke_off(tmp_path: Path) -> None:
    """Killed before `search.json` knew, and between the two renames."""
    plan = planned(tmp_path)
    runs = {name: pinned(plan, name) for name in ("s-0001", "s-0002", "s-0003", "s-0004")}
    values = [3.0, 1.0, 4.0, 2.0]
    decide(plan, ledger_of(plan, values), 1)
    ledger = ledger_of(plan, values)
    assert not is_ordered(runs["s-0003"], ledger), "what is not in the ledger was not decided"
    decide(plan, ledger, 1)
    runs["s-0003"].rename(runs["s-0003"].with_name(".s-0003.before"))
    take_over(runs["s-0003"], ledger)
    assert (runs["s-0003"] / "checkpoints" / "step-00000020" / "weights").read_text() == "s-0002 20"


def test_the_best_job_says_what_it_cannot_repeat(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    ledger = ledger_of(plan, [1.0, 2.0, 3.0, 4.0], rung=3)
    first = {
        name: {"train.learning_rate": rate} for name, rate in (("s-0001", 1e-3), ("s-0002", 1e-4), ("s-0004", 1e-5))
    }
    second, third = {"train.learning_rate": 2e-3}, {"train.learning_rate": 3e-3}
    ledger["trials"][0]["values"] = first["s-0001"]
    ledger["trials"][1]["values"] = {"train.learning_rate": 9e-3}
    ledger["exploits"] = [
        {"trial": "s-0002", "from": "s-0001", "rung": 1, "step": 20, "old": first["s-0002"], "new": second},
        {"trial": "s-0004", "from": "s-0002", "rung": 2, "step": 40, "old": first["s-0004"], "new": third},
        # What became of it later is no part of the model that was taken over.
        {
            "trial": "s-0002",
            "from": "s-0004",
            "rung": 3,
            "step": 60,
            "old": second,
            "new": {"train.learning_rate": 9e-3},
        },
    ]
    assert [(part["step"], part["trial"], part["values"]) for part in history(ledger, "s-0004")] == [
        (0, "s-0001", first["s-0001"]), (20, "s-0002", second), (40, "s-0004", third),
    ]  # fmt: skip
    assert len(taken_over(ledger, "s-0002")) == 2
    text = _heading(ledger, ledger["trials"][3])
    assert "no job file can repeat" in text
    assert "trials/s-0004/model" in text
    assert "#   from step 20, in s-0002: train.learning_rate 0.002" in text
    assert _heading(ledger, ledger["trials"][0]) == "# Trial s-0001 of s."
    for trial in ledger["trials"]:
        trial["status"] = "finished"
    draw(ledger, tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 10_000


def test_those_behind_come_first() -> None:
    turns = Turns(2)
    assert turns.ask("a", 0)
    assert turns.ask("b", 0)
    assert not turns.ask("c", 0)
    assert not turns.is_wanted(0), "c is not behind"
    assert turns.is_wanted(1)
    turns.give("a")
    assert not turns.ask("a", 1), "c is behind it"
    assert turns.ask("c", 0)
    turns.give("b")
    turns.give("d")
    assert turns.ask("a", 1)
    assert turns.ask("a", 1), "it is still its turn"


def test_a_resumed_job_has_its_own_weight_decay() -> None:
    def optimizer(decay: float) -> torch.optim.Optimizer:
        groups = [{"params": [torch.ones(2)], "weight_decay": decay}, {"params": [torch.ones(2)], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3)

    before, now = optimizer(0.1), optimizer(0.02)
    settings = OwnSettings(now)
    now.load_state_dict(before.state_dict())
    assert [group["weight_decay"] for group in now.param_groups] == [0.1, 0.0], "what a checkpoint brings back"
    settings.on_train_begin(None, None, None, optimizer=now)
    assert [group["weight_decay"] for group in now.param_groups] == [0.02, 0.0]


def test_a_resumed_job_has_its_own_rate_of_the_value_head() -> None:
    """A group's rate is a ratio to the job's, which may be another one now."""
    head, rest = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))

    def optimizer(ratio: float) -> torch.optim.Optimizer:
        made = torch.optim.AdamW([{"params": [rest, head], "weight_decay": 0.02}], lr=1e-3)
        made.param_groups[:] = split_groups(made.param_groups, {id(head)}, ratio)
        return made

    before, now = optimizer(10.0), optimizer(100.0)
    settings = OwnSettings(now)
    now.load_state_dict(before.state_dict())
    assert now.param_groups[1]["lr_ratio"] == 10.0, "what a checkpoint brings back"
    settings.on_train_begin(None, None, None, optimizer=now)
    ProgressSchedule(now, 1e-5).set(0.5)
    assert [group["lr"] for group in now.param_groups] == pytest.approx([5e-6, 5e-4])


def test_deepspeed_leaves_out_groups_without_weights() -> None:
    groups = [{"params": [], "weight_decay": 0.5}, {"params": [torch.ones(2)], "weight_decay": 0.02}]
    now = torch.optim.AdamW(groups, lr=1e-3)
    settings = OwnSettings(now)
    now.param_groups[:] = [group for group in now.param_groups if group["params"]]
    now.param_groups[0]["weight_decay"] = 0.1
    settings.on_train_begin(None, None, None, optimizer=now)
    assert [group["weight_decay"] for group in now.param_groups] == [0.02]
