"""Reference log-probabilities on disk: found only where nothing that changes them has changed."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from rayloom.config.job import JobConfig
from rayloom.data.plan import Position
from rayloom.data.reference import ReferenceTable, mark_whole, read_table, row_keys, write_part
from rayloom.data.rows import SCHEMA
from rayloom.data.segment import EncodeSegment
from rayloom.data.walk import Walk
from rayloom.errors import JobError
from rayloom.models.fingerprint import folder_fingerprint
from rayloom.stages.prepare import prepare_data, prepare_eval, segment_options
from rayloom.stages.reference import ReferencePlace, reference_place
from rayloom.train.batch import TrainedPositions
from rayloom.train.kto_trainer import KtoTrainer
from rayloom.train.pairs import answer_sums
from rayloom.train.preference_trainer import PreferenceTrainer
from rayloom.train.reference import ReferencePass, Scorer
from rayloom.train.token_scores import TokenScorer

ROWS = 40


@pytest.fixture
def parts(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    rows = [f'{{"instruction": "river {n}", "output": ["{"lamp " * (n % 5 + 1)}", "cloud no"]}}\n' for n in range(ROWS)]
    (tmp_path / "pairs.jsonl").write_text("".join(rows))
    return {
        "name": "a",
        "output_dir": str(tmp_path / "out"),
        "model": {"path": str(tiny_model)},
        "method": {"type": "full"},
        "data": {"train": [{"path": str(tmp_path / "pairs.jsonl"), "ranking": True}], "cutoff": 64, "window": 8},
        "stage": {"type": "dpo", "reference": "cached"},
        "train": {"max_steps": 4, "batch_size": 2},
    }


def place(parts: dict[str, Any], **changes: dict[str, Any]) -> ReferencePlace:
    job = JobConfig.model_validate({**parts, **{key: {**parts.get(key, {}), **part} for key, part in changes.items()}})
    plan, encoder = prepare_data(job)
    found = reference_place(job, plan, prepare_eval(job), encoder, "fp32", "cpu")
    assert found is not None
    return found


def test_only_a_job_that_says_so_has_a_place(parts):
    parts["stage"] = {"type": "dpo", "reference": "copy"}
    job = JobConfig.model_validate(parts)
    plan, encoder = prepare_data(job)
    assert reference_place(job, plan, None, encoder, "fp32", "cpu") is None


@pytest.mark.parametrize(
    ("changes", "same_folder"),
    [
        ({"model": {"attention": "eager"}}, False),
        ({"stage": {"ld_alpha": 0.5}}, False),
        ({"data": {"cutoff": 60}}, False),
        ({"train": {"deepspeed": "zero2"}}, False),
        ({"data": {"template": "chatml"}}, True),  # other tokens: rows of other keys
        ({"data": {"held_out": 0.2}}, True),
        ({"train": {"max_steps": 5}}, True),
        ({"train": {"seed": 1}}, True),
    ],
)
def test_what_changes_the_keys(parts, changes, same_folder):
    before, after = place(parts), place(parts, **changes)
    assert (before.folder == after.folder) == same_folder
    assert before != after


def test_what_does_not_change_them(parts):
    before = place(parts)
    assert place(parts, train={"learning_rate": 1.0, "save_steps": 3}) == before
    assert place(parts, stage={"beta": 0.5, "loss": "ipo"}) == before
    mark_whole(before.folder, before.mark, {})
    assert place(parts).is_whole
    assert not place(parts, data={"window": 16}).is_whole


def test_a_model_whose_weights_have_changed_is_another(tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(bytes(3 << 20))
    before = folder_fingerprint(file.parent)
    changed = bytearray(3 << 20)
    changed[-100] = 1
    times = file.stat()
    file.write_bytes(changed)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # the size and the time are those of before
    assert folder_fingerprint(file.parent) != before
    file.write_bytes(bytes(3 << 20))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert folder_fingerprint(file.parent) == before


def row(*ids: int, labels: tuple[int, ...] | None = None) -> dict[str, Any]:
    return {"input_ids": ids, "labels": labels or ids, "position_ids": range(len(ids)), "desirable": -1, "counts": []}


def test_a_row_is_known_by_its_tokens_alone():
    table = pa.Table.from_pylist([row(1, 2), row(1, 2) | {"segment": 9}, row(1, 3), row(1, 2, labels=(1, 9))], SCHEMA)
    one, same, *others = row_keys(table).tolist()
    assert one == same
    assert len({one, *others}) == 3
    sliced = pa.concat_tables([table.slice(2), table.slice(0, 1)])
    assert row_keys(sliced).tolist() == [*others, one]


def test_a_store_gives_back_what_was_written(tmp_path):
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 2**64, 500, dtype=np.uint64)
    sums = generator.normal(size=(500, 2)).astype(np.float32)
    sums[7, 1] = np.nan
    write_part(tmp_path / "store", keys[:300], sums[:300])
    write_part(tmp_path / "store", keys[200:], sums[200:])
    table = read_table(tmp_path / "store")
    order = generator.permutation(500)
    np.testing.assert_array_equal(table.sums(keys[order]), sums[order])
    assert len(table) == 500
    assert not table.has(np.array([1, 2], dtype=np.uint64)).any()
    with pytest.raises(KeyError, match="1 of 2 rows"):
        table.sums(np.array([keys[0], 1], dtype=np.uint64))
    assert not read_table(tmp_path / "none").has(keys).any()
    next((tmp_path / "store").glob("*.parquet")).write_bytes(b"no")
    with pytest.raises(JobError, match="delete it, and it is computed again"):
        read_table(tmp_path / "store")


class Counted:
    """A scorer that loads the tiny model and counts how often, and how many rows it computed."""

    def __init__(self, model: Path, ld_alpha: float | None = None) -> None:
        self.loads = self.rows = 0

        def load() -> Any:
            self.loads += 1
            return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

        self.scorer = Scorer(load, 0, torch.device("cpu"), None, None, ld_alpha)
        plain = self.scorer.sums

        def sums(table: pa.Table) -> np.ndarray:
            self.rows += table.num_rows
            return plain(table)

        self.scorer.sums = sums  # type: ignore[method-assign]


def run_pass(parts: dict[str, Any], counted: Counted, steps: int | None, batch: int = 2) -> tuple[ReferenceTable, Any]:
    job = JobConfig.model_validate({**parts, "train": {"epochs": 2}})
    plan, encoder = prepare_data(job)
    encode = EncodeSegment(encoder, segment_options(job))
    stream = pa.concat_tables([encode(plan, segment) for segment in Walk(plan).segments(Position())])
    batches = [stream.slice(start, batch) for start in range(0, stream.num_rows, batch)]
    folder = Path(job.output_dir) / "reference"
    said: list[str] = []
    work = ReferencePass(folder, "mark", batch, 2, steps, 2, True, lambda: False, said.append)
    return work.run(iter(batches), [], counted.scorer), (stream, folder, said)


@pytest.mark.parametrize("ld_alpha", [None, 0.25])
def test_sums_are_those_of_a_loop(parts, tiny_model, ld_alpha):
    table, (stream, folder, said) = run_pass(parts, counted := Counted(tiny_model, ld_alpha), None)
    assert stream.num_rows == 2 * ROWS  # each row twice, and computed once
    assert (len(table), counted.rows, counted.loads) == (ROWS, ROWS, 1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for row in stream.slice(0, 12).to_pylist():
        border = row["position_ids"].index(0, 1)
        parts_ = [slice(0, border), slice(border, None)]
        tokens = [sum(label >= 0 for label in row["labels"][part]) for part in parts_]
        expected = []
        for part in parts_:
            scores = model(torch.tensor([row["input_ids"][part]])).logits[0].detach().double().log_softmax(-1)
            labels = row["labels"][part]
            places = [place for place, label in enumerate(labels) if label >= 0]
            weights = [1.0 if i < min(tokens) or ld_alpha is None else ld_alpha for i in range(len(places))]
            expected.append(sum(w * float(scores[p - 1, labels[p]]) for w, p in zip(weights, places, strict=True)))
        found = table.sums(row_keys(pa.Table.from_pylist([row], SCHEMA)))[0]
        assert found.tolist() == pytest.approx(expected, abs=2e-5)
    assert (folder / "mark.json").exists()
    assert "40 rows" in said[0]


def test_what_is_there_is_not_computed_again(parts, tiny_model):
    first = Counted(tiny_model)
    run_pass(parts, first, 3)
    assert first.rows == 3 * 2 * 2  # steps, batches, rows
    second = Counted(tiny_model)
    _, (_, folder, said) = run_pass(parts, second, 5)
    assert second.rows == 2 * 2 * 2
    third = Counted(tiny_model)
    _, (_, _, said) = run_pass(parts, third, 5)
    assert (third.rows, third.loads) == (0, 0)
    assert said == [f"reference log-probabilities are read from {folder}"]


def test_a_folder_that_cannot_be_written_is_named(parts, tiny_model):
    Path(parts["output_dir"]).mkdir()
    (Path(parts["output_dir"]) / "reference").write_text("a file")
    with pytest.raises(JobError, match=r"reference log-probabilities cannot be written to .*out/reference"):
        run_pass(parts, Counted(tiny_model), 2)


# --- what a batch gets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "trainer"), [("dpo", PreferenceTrainer), ("kto", KtoTrainer)])
def test_a_batch_has_the_numbers_of_its_own_sequences(parts, tiny_model, tmp_path, stage, trainer):
    """Also where a row was left out, or has no second sequence; and where the batch is empty."""
    parts = {**parts, "stage": {"type": stage, "reference": "cached"}}
    if stage == "kto":
        rows = [{"instruction": f"river {n}", "output": "lamp " * (n % 5 + 1), "good": n % 3 > 0} for n in range(ROWS)]
        (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns = {"prompt": "instruction", "response": "output", "kto_tag": "good"}
        parts["data"] = {**parts["data"], "train": [{"path": str(tmp_path / "judged.jsonl"), "columns": columns}]}
    job = JobConfig.model_validate(parts)
    plan, encoder = prepare_data(job)
    encode = EncodeSegment(encoder, segment_options(job))
    stream = pa.concat_tables([encode(plan, segment) for segment in islice(Walk(plan).segments(Position()), 2)])
    alone = stream.slice(0, 1).to_pylist()[0]
    if stage == "kto":
        border = alone["position_ids"].index(0, 1)
        alone |= {name: alone[name][:border] for name in ("input_ids", "labels", "position_ids")}
    left_out = alone | {"input_ids": [], "labels": [], "position_ids": []}
    table = pa.concat_tables([pa.Table.from_pylist([left_out, alone], SCHEMA), stream.slice(3, 5)])
    kept = table.slice(1)

    scorer = Counted(tiny_model).scorer
    known = ReferenceTable()
    known.add(row_keys(kept), scorer.sums(kept))
    a_trainer: Any = object.__new__(trainer)  # what makes a batch needs no more of it
    a_trainer._cached, a_trainer._pad_token = known, 0
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    say = TokenScorer(model, TrainedPositions(model))
    batch = a_trainer._batch(table)
    for part in [batch, batch["mismatched"]] if stage == "kto" else [batch]:
        with torch.no_grad():
            expected = answer_sums(say(model, part), part)
        found = a_trainer._reference_sums(part)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    empty = a_trainer._batch(table.slice(0, 1))
    assert a_trainer._reference_sums(empty).tolist() == [0.0]
    known._keys = known._keys[:-1]
    with pytest.raises(JobError, match=r"the reference log-probabilities of 1 of \d rows are not there"):
        a_trainer._batch(table)


def test_what_is_measured_is_read_and_then_set_back():
    a_trainer: Any = object.__new__(PreferenceTrainer)
    a_trainer.args, a_trainer.measured = SimpleNamespace(device=torch.device("cpu")), ("margin", "accuracy")
    a_trainer._sums = torch.tensor([[3.0, 8.0], [2.0, 4.0]], dtype=torch.float64)
    assert a_trainer._stage_metrics() == {"margin": 1.5, "accuracy": 2.0}
    assert a_trainer._stage_metrics() == {"margin": None, "accuracy": None}  # nothing has been measured since
