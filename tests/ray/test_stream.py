"""The stream that a job trains on: every example in its turn, whoever takes it and wherever it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tests.ray.small_jobs import job, metrics, run, two_sets, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayloom.config.job import JobConfig
from rayloom.data import index
from rayloom.data.plan import Position
from rayloom.data.rows import row_id
from rayloom.data.segment import EncodeSegment
from rayloom.data.template_library import library_template
from rayloom.data.walk import Walk
from rayloom.errors import JobError, RequestError
from rayloom.stages.prepare import prepare_data, segment_options
from rayloom.train import driver, execution

pytestmark = pytest.mark.usefixtures("connected")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_sets(tmp_path_factory.mktemp("data"))


def test_an_epoch_on_two_workers_sees_each_example_once(tiny_model: Path, data: Any, tmp_path: Path) -> None:
    plain_sets = [{"path": item["path"]} for item in data]
    config = job(
        tiny_model,
        tmp_path,
        plain_sets,
        data={"cutoff": 256},
        method={"type": "full"},
        # The workers hold all four CPUs: what reads the data must do without.
        train={"workers": 2, "cpus_per_worker": 2, "batch_size": 3, "epochs": 2, "save_steps": 1000},
    )
    result, rows = run(config)
    assert result["examples"] == {"short": 60, "long": 120}
    assert rows[-1]["epoch"] == pytest.approx(2)
    assert (result["position"]["epoch"], result["position"]["segment"]) == (1, 5)
    assert result["engine"]["class"] == "DistributedDataParallel"
    model = AutoModelForCausalLM.from_pretrained(config.run_dir / "model")
    assert result["parameters"]["trained"] == sum(p.numel() for p in model.parameters())


def test_shares_follow_the_weights(tiny_model: Path, data: Any, tmp_path: Path) -> None:
    config = job(tiny_model, tmp_path, data, data={"mix": "interleave_under", "cutoff": 256, "template": "chatml"})
    result, _ = run(config)
    saved = AutoTokenizer.from_pretrained(config.run_dir / "model")
    assert saved.chat_template == library_template("chatml")  # the model answers in the template it has learnt
    assert result["examples"] == {"short": 20, "long": 60}  # 1 : 3, to the end of the set that runs out first


def test_a_bad_row_met_while_training_is_a_request_error(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "CHECKED_BYTES", 0)  # as if the row stood behind the part that is checked up front
    path = write_rows(tmp_path / "rows.jsonl", 80)
    config = job(tiny_model, tmp_path / "out", [{"path": str(path)}])
    plan, _ = prepare_data(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": None})}))
    bad = int(list(Walk(plan).segments(Position()))[-1].rows[0])
    lines = path.read_text().splitlines()
    lines[bad] = '{"instruction": "and no answer"}'
    path.write_text("\n".join(lines))
    with pytest.raises(RequestError, match=rf"rows\.jsonl:{bad + 1}: row {bad + 1}: has no column 'output'") as error:
        run(config)
    assert f"What was trained until then is kept in {config.run_dir}" in str(error.value)
    assert json.loads((config.run_dir / "result.json").read_text())["status"] == "failed"
    assert (config.run_dir / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_stream_longer_than_one_execution(
    tiny_model: Path, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_SEGMENTS_AT_ONCE", 3)  # of six
    executions = Mock(side_effect=execution.ray_trainer)
    monkeypatch.setattr(execution, "ray_trainer", executions)
    sets = [{"path": item["path"]} for item in data]
    result, rows = run(job(tiny_model, tmp_path, sets, data={"cutoff": 256}, train={"batch_size": 1}))
    # Segments 0-2, 2-4, 4-5: a position at the end of a segment still names it.
    assert executions.call_count == 3
    assert result["status"] == "finished"
    assert result["examples"] == {"short": 30, "long": 60}
    assert [row["step"] for row in rows] == list(range(1, result["steps"] + 1))


@pytest.mark.slow
def test_a_stretch_that_cannot_be_trained_on_ends_the_job(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_SEGMENTS_AT_ONCE", 2)
    path = write_rows(tmp_path / "rows.jsonl", 80)
    config = job(tiny_model, tmp_path / "out", [{"path": str(path)}], data={"cutoff": 256}, train={"max_steps": 500})
    plan, _ = prepare_data(config)
    segment, _ = Walk(plan).step(Position())
    good = set(segment.rows.tolist())
    lines = path.read_text().splitlines()
    # A system message is never cut, so this one leaves no room for an answer.
    long = json.dumps({"instruction": "long", "output": "stone", "system": "stone " * 500})
    path.write_text("\n".join(line if row in good else long for row, line in enumerate(lines)))
    with pytest.raises(JobError, match="no example of 2 segments on end"):
        run(config)
    assert metrics(config)  # the first segment was trained on


def examples_in_order(config: JobConfig) -> list[tuple[str, str]]:
    """(set, row) of every example trained on, in stream order, from the manifest."""
    rows = [json.loads(line) for line in (config.run_dir / "manifest.jsonl").read_text().splitlines()]
    return [tuple(name) for row in sorted(rows, key=lambda row: (row["step"], row["rank"])) for name in row["examples"]]


@pytest.mark.slow
def test_another_number_of_workers_goes_on_in_the_same_order(tiny_model: Path, data: Any, tmp_path: Path) -> None:
    data_part = {"mix": "interleave_over", "manifest": True}
    train = {"workers": 2, "batch_size": 2, "max_steps": 9}
    config = job(tiny_model, tmp_path, data, data=data_part, train=train)
    run(config)
    more = config.train.model_copy(update={"workers": 1, "max_steps": 50})  # into the second epoch
    resumed = config.model_copy(update={"resume": True, "train": more})
    result, _ = run(resumed)
    plan, encoder = prepare_data(resumed)
    expected = []
    for segment in Walk(plan).segments(Position()):
        table = EncodeSegment(encoder, segment_options(resumed))(plan, segment)
        expected += [(s, r) for row in table.to_pylist() for s, r in zip(row["sets"], row["rows"], strict=True)]
        if segment.start.epoch > result["position"]["epoch"]:
            break
    numbers = {data_set.name: number for number, data_set in enumerate(plan.sets)}
    seen = [(numbers[s], row_id(*map(int, name.split(":")))) for s, name in examples_in_order(resumed)]
    assert seen == expected[: len(seen)]
    assert len(seen) == sum(result["examples"].values())
    assert result["position"]["epoch"] >= 1


def test_pretraining_on_plain_text(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"river {n} stone lamp " * (n % 40 + 1) + "\n" for n in range(30)))
    config = job(tiny_model, tmp_path, [{"path": str(path)}], data={"cutoff": 64}, stage={"type": "pretrain"})
    result, _ = run(config)
    assert result["examples"] == {"text": 30}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lengths = [len(tokenizer(line).input_ids) for line in path.read_text().splitlines()]
    # Every token but a text's first is learnt once, its end of sequence too; rows overlap by a token that is not.
    learnt_at_row_starts = result["trained_tokens"]
    assert learnt_at_row_starts == sum(lengths)
