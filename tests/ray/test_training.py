"""Training on a real Ray: right numbers under every engine, exact resume, clear refusals."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from tests.ray.small_jobs import cross_entropies, job, metrics, plain_losses, run, two_sets, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayloom.config.job import JobConfig
from rayloom.data.example import Example
from rayloom.data.plan import Position
from rayloom.data.segment import EncodeSegment, read_segment
from rayloom.data.walk import Walk
from rayloom.errors import JobError, RequestError
from rayloom.methods.attach import attach_method
from rayloom.methods.config import FullConfig
from rayloom.stages.prepare import eval_options, prepare_data, prepare_eval, segment_options
from rayloom.train.preparation import prepare

STEPS = 4
pytestmark = pytest.mark.usefixtures("connected")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_sets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def mixed() -> dict[str, Any]:
    return {"mix": "interleave_once"}


@pytest.fixture(scope="module")
def plain(tiny_model: Path, data: list[dict[str, Any]], mixed: dict[str, Any], tmp_path_factory: Any) -> Any:
    """The run that the others are compared with: one worker, no DeepSpeed."""
    part = {**mixed, "manifest": True}
    config = job(tiny_model, tmp_path_factory.mktemp("plain"), data, data=part, train={"max_steps": STEPS})
    result, rows = run(config)
    return config, result, rows


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


def examples_of(config: JobConfig, steps: int, rows_per_step: int = 2) -> list[list[tuple[list[int], list[int]]]]:
    """Ids and labels of the examples that each step takes, found from the stream."""
    plan, encoder = prepare_data(config)
    options = segment_options(config)
    segments = list(itertools.islice(Walk(plan).segments(Position()), 12))  # more than the steps take
    tables = [EncodeSegment(encoder, options)(plan, segment) for segment in segments]
    items = [item for segment in segments for item in read_segment(plan, segment, options)]
    by_row = {(item.set, item.row): item.example for item in items}
    stream = [row for table in tables for row in table.to_pylist()]
    taken: list[list[Example]] = []
    for step in range(steps):
        rows = stream[step * rows_per_step : (step + 1) * rows_per_step]
        taken.append([by_row[address] for row in rows for address in zip(row["sets"], row["rows"], strict=True)])
    return [[(one.input_ids, one.labels) for one in encoder.encode(examples, 128)] for examples in taken]


def fresh_model(config: JobConfig, folder: Path) -> Any:
    """As the worker makes it: LoRA's A factors are drawn at random, after seeding, loading and attaching."""
    torch.manual_seed(config.train.seed)
    return attach_method(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config.method)


def test_losses_equal_a_loop_without_packing(plain: Any, tiny_model: Path) -> None:
    config, result, rows = plain
    expected = plain_losses(fresh_model(config, tiny_model), examples_of(config, STEPS), config)
    assert losses(rows) == pytest.approx(expected, abs=1e-5)
    assert result["engine"] == {"class": "DistributedDataParallel", "zero_stage": 0, "row_threads": 1}


def test_rows_of_one_example_share_rows_in_a_batch(
    tiny_model: Path, data: list[dict[str, Any]], mixed: dict[str, Any], tmp_path: Path
) -> None:
    """Three become two of nearly one length, one for each core, where three would be computed one after the other."""
    little = {"type": "lora", "rank": 1, "target": ["q_proj"]}
    part, train = {**mixed, "packing": False}, {"max_steps": STEPS, "batch_size": 3}
    config = job(tiny_model, tmp_path, data, data=part, method=little, train=train)
    result, rows = run(config)
    assert result["engine"]["row_threads"] == 2
    examples = examples_of(config, STEPS, rows_per_step=3)
    assert [len(step) for step in examples] == [3] * STEPS
    assert losses(rows) == pytest.approx(plain_losses(fresh_model(config, tiny_model), examples, config), abs=1e-5)


def _dft(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    likelihoods = logits.softmax(-1)[range(len(labels)), labels]
    return -likelihoods.detach() * likelihoods.log()


def _eaft(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    best = logits.detach().sort(-1, descending=True).values[:, :20].softmax(-1)
    unsure = -(best * best.log()).sum(-1) / math.log(20)
    return unsure**8 * cross_entropies(logits, labels)


def _smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return 0.7 * cross_entropies(logits, labels) - 0.3 * logits.log_softmax(-1).mean(-1)


LOSSES = {
    "dft": ({"loss": "dft"}, _dft, 2),
    "eaft": ({"loss": "eaft", "eaft_alpha": 8.0}, _eaft, 1),
    "smoothed": ({"label_smoothing": 0.3}, _smoothed, 1),
}


@pytest.mark.parametrize(
    "name", ["dft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eaft", "smoothed"))]
)
def test_each_loss_equals_a_loop(
    name: str, plain: Any, tiny_model: Path, data: list[dict[str, Any]], mixed: dict[str, Any], tmp_path: Path
) -> None:
    stage, of_tokens, accumulation = LOSSES[name]
    train = {"max_steps": 4, "learning_rate": 1e-2, "batch_size": 2 // accumulation}
    config = job(
        tiny_model, tmp_path, data, data=mixed, stage=stage, train={**train, "gradient_accumulation": accumulation}
    )
    _, rows = run(config)
    expected = plain_losses(fresh_model(config, tiny_model), examples_of(config, 4), config, of_tokens)
    assert losses(rows) == pytest.approx(expected, abs=1e-5)
    assert abs(rows[0]["loss"] - plain[2][0]["loss"]) > 1e-3  # and it is another loss


def test_a_loss_that_is_no_number_ends_the_job(tiny_model: Path, data: list[dict[str, Any]], tmp_path: Path) -> None:
    train = {"learning_rate": 1e30, "max_grad_norm": None, "max_steps": 9, "save_steps": 1, "max_loss": 1e300}
    config = job(tiny_model, tmp_path, data, data={"mix": "interleave_once"}, train=train)
    with pytest.raises(
        JobError, match=r"step \d: the loss is (nan on rank 0|inf on rank 0|a number, but its gradient is not), and"
    ) as failed:
        run(config)
    text, rows = str(failed.value), metrics(config)
    step = int(re.findall(r"step (\d+): the loss", text)[0])
    assert [row["step"] for row in rows] == list(range(1, step))  # none was made with it
    assert f"the gradient's norm was {rows[-1]['grad_norm']:.3g} at step {step - 1}" in text
    assert re.search(r"The rows of (rank 0's batch|the step) \(chunk:row\): (short|long) \d+:\d+", text)
    assert "Traceback" not in text
    assert "The last checkpoint is kept" in text
    assert json.loads((config.run_dir / "result.json").read_text())["status"] == "failed"


def test_a_loss_that_is_too_large_ends_the_job(plain: Any, tiny_model: Path, tmp_path: Path, data: Any) -> None:
    losses_before = losses(plain[2])
    limit = losses_before[0] - 1e-3  # what a step before the first one would have to be below
    config = job(tiny_model, tmp_path, data, data={"mix": "interleave_once"}, train={"max_steps": 9, "max_loss": limit})
    with pytest.raises(JobError) as failed:
        run(config)
    text = str(failed.value)
    said = re.search(r"step 1: the loss is (\S+), and the most that it may be is (\S+) \(train.max_loss\)", text)
    assert said, text
    assert float(said[1]) > float(said[2]) == pytest.approx(limit, rel=1e-3)
    assert re.search(r"no step was logged yet. The rows of the step \(chunk:row\): (short|long) \d+:\d+", text)
    assert not (config.run_dir / "model").exists()


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("zero1", {}),
        ("zero2", {}),
        ("zero3", {}),
        pytest.param("zero2", {"offload": "optimizer"}, marks=pytest.mark.slow),
        pytest.param("zero3", {"offload": "all"}, marks=pytest.mark.slow),
        pytest.param("zero3", {"deepspeed_json": {"offload_optimizer": {"device": "cpu"}}}, marks=pytest.mark.slow),
    ],
)
def test_zero_on_two_workers_equals_plain(
    stage: str, more: dict[str, Any], plain: Any, tiny_model: Path, data: Any, mixed: dict[str, Any], tmp_path: Path
) -> None:
    _, _, expected = plain
    if "deepspeed_json" in more:
        own = tmp_path / "ds.json"
        own.write_text(json.dumps({"bf16": {"enabled": "auto"}, "zero_optimization": more["deepspeed_json"]}))
        more = {"deepspeed_json": str(own)}
    config = job(
        tiny_model,
        tmp_path,
        data,
        data=mixed,
        train={"max_steps": STEPS, "workers": 2, "batch_size": 1, "global_batch_size": 2, "deepspeed": stage, **more},
    )
    result, rows = run(config)
    assert result["engine"] == {"class": "DeepSpeedEngine", "zero_stage": int(stage[-1]), "row_threads": 1}
    assert losses(rows) == pytest.approx(losses(expected), abs=1e-5)
    assert [row["position"] for row in rows] == [row["position"] for row in expected]
    assert [row["examples_seen"] for row in rows] == [row["examples_seen"] for row in expected]


@pytest.mark.parametrize("changed", [{"batch_size": 1, "global_batch_size": 2}, {"activation_checkpointing": True}])
def test_what_must_not_change_the_losses(
    changed: dict[str, Any], plain: Any, tiny_model: Path, data: Any, mixed: dict[str, Any], tmp_path: Path
) -> None:
    _, _, expected = plain
    _, rows = run(job(tiny_model, tmp_path, data, data=mixed, train={"max_steps": STEPS, **changed}))
    assert losses(rows) == pytest.approx(losses(expected), abs=1e-5)


def test_run_directory(plain: Any) -> None:
    config, result, rows = plain
    assert sorted(path.name for path in config.run_dir.iterdir()) == [
        "checkpoints",
        "data.json",
        "job.yaml",
        "loss.png",
        "manifest.jsonl",
        "metrics.jsonl",
        "model",
        "result.json",
    ]
    stored = yaml.safe_load((config.run_dir / "job.yaml").read_text())
    assert stored["train"]["max_steps"] == STEPS
    assert stored["data"]["train"][0]["name"] == "short"
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert result == json.loads((config.run_dir / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["steps"] == STEPS
    assert (config.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_adapter_loads_in_peft_and_merges(plain: Any, tiny_model: Path) -> None:
    config, _, _ = plain
    tokenizer = AutoTokenizer.from_pretrained(config.run_dir / "model")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "river stone?"}], return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        untrained = base(ids).logits
        adapted = PeftModel.from_pretrained(base, config.run_dir / "model").eval()
        logits = adapted(ids).logits
        merged = adapted.merge_and_unload()(ids).logits
    assert (logits - untrained).abs().max() > 1e-3  # it has learned something
    torch.testing.assert_close(merged, logits, atol=1e-5, rtol=1e-5)


def test_a_job_finds_what_was_prepared(plain: Any, tmp_path: Path, capsys: Any) -> None:
    config, _, rows = plain
    stored = config.model_copy(update={"output_dir": str(tmp_path), "name": "stored"})
    told = [Console(file=io.StringIO(), width=160) for _ in range(2)]
    for console in told:
        prepare(stored, console)
    assert "is prepared already" not in told[0].file.getvalue()  # type: ignore[attr-defined]
    assert told[1].file.getvalue().count("is prepared already") == 2  # type: ignore[attr-defined]
    capsys.readouterr()
    _, after = run(stored)
    assert capsys.readouterr().out.count("prepared tokens are read from") == 2
    assert losses(after) == losses(rows)
    assert (stored.run_dir / "manifest.jsonl").read_text() == (config.run_dir / "manifest.jsonl").read_text()


def test_a_finished_run_is_refused(plain: Any) -> None:
    config, _, rows = plain
    with pytest.raises(RequestError, match="holds a finished run"):
        run(config)
    with pytest.raises(RequestError, match="nothing is left to do"):
        run(config.model_copy(update={"resume": True}))
    assert metrics(config) == rows


def test_resume_refuses_another_job(plain: Any) -> None:
    config, _, _ = plain
    longer = config.train.model_copy(update={"max_steps": STEPS + 1, "seed": 7})
    changed = config.model_copy(update={"resume": True, "train": longer, "method": FullConfig()})
    with pytest.raises(RequestError) as refused:
        run(changed)
    assert [message.split(":")[0] for message in refused.value.messages] == ["resume", "resume"]
    assert "train.seed is 7" in str(refused.value)
    assert "method differs" in str(refused.value)


def test_more_than_the_cluster_has_is_refused_in_time(tiny_model: Path, data: Any, tmp_path: Path) -> None:
    config = job(tiny_model, tmp_path / "out", data, data={"mix": "interleave_once"}, train={"workers": 64})
    config = config.model_copy(update={"train": config.train.model_copy(update={"wait_for_resources": 3.0})})
    started = time.monotonic()
    with pytest.raises(RequestError) as refused:
        run(config)
    assert time.monotonic() - started < 60
    assert "64 workers with 1 CPU" in str(refused.value)
    assert "1 node with 4 CPU" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_evaluation_on_what_is_held_out_and_bad_rows_counted(tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", 60)
    with path.open("a") as file:
        file.write("no json\n" + json.dumps({"instruction": "no answer"}) + "\n")
    config = job(
        tiny_model,
        tmp_path,
        [{"path": str(path)}],
        data={"held_out": 0.2, "on_bad_row": "skip"},
        train={"workers": 2, "eval_steps": 2},
    )
    result, rows = run(config)
    held_out = result["held_out"]["rows"]
    assert 4 <= held_out <= 20  # 12 +- 3 by chance
    assert result["examples"]["rows"] == 60 - held_out
    assert result["dropped"]["rows"]["cannot be read"] == result["dropped"]["rows"]["does not fit its format"] == 1
    evaluations = [row for row in rows if "eval_loss" in row]
    assert len(evaluations) >= 2
    assert result["eval"]["eval_loss"] == evaluations[-1]["eval_loss"]
    assert len({row["step"] for row in evaluations}) == len(evaluations)

    # The same number by hand, from the adapter that was saved.
    plan = prepare_eval(config)
    assert plan is not None
    _, encoder = prepare_data(config)
    options = eval_options(config)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, config.run_dir / "model").eval()
    total = hits = tokens = 0.0
    for segment in Walk(plan).segments(Position()):
        for row in EncodeSegment(encoder, options)(plan, segment).to_pylist():
            if row["input_ids"]:
                labels = torch.tensor(row["labels"][1:])
                with torch.no_grad():
                    logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
                total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                hits += int((logits.argmax(-1) == labels).sum())
                tokens += int((labels >= 0).sum())
    assert result["eval"]["eval_loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert result["eval"]["eval_accuracy"] == pytest.approx(hits / tokens, abs=1e-9)


@pytest.mark.parametrize(("engine", "workers", "threads"), [("none", 1, 2), ("zero2", 2, 1)])
def test_stopped_and_resumed_equals_uninterrupted(
    engine: str, workers: int, threads: int, tiny_model: Path, data: Any, tmp_path: Path
) -> None:
    train = {"workers": workers, "batch_size": 2 // workers, "deepspeed": engine, "epochs": 40, "max_steps": 120}
    little = {"type": "lora", "rank": 1, "target": ["q_proj"]}  # of the model trains: its rows go side by side
    parts: dict[str, Any] = {"data": {"mix": "interleave_over"}, "train": train}
    parts |= {"method": little} if threads > 1 else {}
    whole = job(tiny_model, tmp_path, data, name="whole", **parts)
    result, rows = run(whole)
    assert result["engine"]["row_threads"] == threads

    cut = job(tiny_model, tmp_path, data, name="cut", **parts)
    file = tmp_path / "cut.yaml"
    file.write_text(yaml.safe_dump(cut.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-m", "rayloom", "train", str(file)],
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen: list[str] = []
    for line in process.stdout or []:
        seen.append(line)
        if line.startswith("step 20 "):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 1, "".join(seen)
    stopped = json.loads((cut.run_dir / "result.json").read_text())
    assert stopped["status"] == "stopped"
    assert 20 <= stopped["steps"] < 120
    assert "resume=true" in seen[-1]

    resumed, rows_after = run(cut.model_copy(update={"resume": True}))
    assert rows_after[: len(rows)] == [
        {
            **row,
            **{name: after[name] for name in ("tokens_per_second", "data_wait", "step_seconds")},
        }  # what the clock says
        for row, after in zip(rows, rows_after, strict=True)
    ]
    assert (resumed["examples"], resumed["tokens"]) == (result["examples"], result["tokens"])
    assert resumed["train_loss"] == pytest.approx(result["train_loss"], abs=1e-12)
    weights, expected = (load_file(c.run_dir / "model" / "adapter_model.safetensors") for c in (cut, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
