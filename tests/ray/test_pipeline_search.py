"""Searches over a pipeline of a tiny model: what trials share is trained once, and a step that fails is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.ray.test_pipeline import data, write  # noqa: F401  # `data` is a fixture

from rayloom.errors import RequestError
from rayloom.pipeline.read import read_pipeline, read_pipeline_document
from rayloom.pipeline.run import run_pipeline
from rayloom.search.run import run_search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected"), pytest.mark.timeout(900)]


def search_of(file: Path, *overrides: str) -> dict[str, Any]:
    return run_search(read_pipeline_document(file, overrides))


def test_steps_in_common_are_trained_once(tiny_model: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    space = "{steps.sft.method.rank: 'grid(2, 4)', steps.dpo.train.learning_rate: 'grid(1e-3, 1e-8)'}"
    search = f"search={{metric: loss, searcher: grid, space: {space}}}"
    file = write(tiny_model, data, tmp_path, max_steps=12)
    ledger = search_of(file, search)
    assert [trial["status"] for trial in ledger["trials"]] == ["finished"] * 4
    folder = tmp_path / "chain"
    steps = sorted(path.name.partition("-")[0] for path in (folder / "steps").iterdir() if path.name[0] != ".")
    assert steps.count("sft") == 2
    assert steps.count("dpo") == 4
    results = [json.loads((Path(trial["run_dir"]) / "result.json").read_text()) for trial in ledger["trials"]]
    assert sorted(step["skipped"] for result in results for step in result["pipeline"]) == [False] * 6 + [True] * 2
    best = next(trial for trial in ledger["trials"] if trial["name"] == ledger["best"])
    assert best["values"]["steps.dpo.train.learning_rate"] == 1e-3
    with pytest.raises(RequestError, match="is finished; nothing is left to do"):
        search_of(file, search, "resume=true")
    with pytest.raises(RequestError, match="search differs from the search's own"):
        search_of(file, search.replace("1e-8", "1e-7"), "resume=true")
    # What it says is the best is a pipeline that comes to the same.
    again = run_pipeline(read_pipeline(folder / "best.yaml"), started=0.0)
    rows = (Path(again["pipeline"][1]["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["loss"] == pytest.approx(best["value"], rel=1e-4)


def test_a_step_that_fails_is_named(tiny_model: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    space = "{steps.dpo.train.learning_rate: 'choice(1e-3, 1e30)'}"
    search = f"search={{metric: loss, searcher: grid, space: {space}}}"
    file = write(tiny_model, data, tmp_path, max_steps=12, max_grad_norm=None)
    ledger = search_of(file, search)
    assert sorted(trial["status"] for trial in ledger["trials"]) == ["failed", "finished"]
    (failed,) = [trial for trial in ledger["trials"] if trial["status"] == "failed"]
    assert failed["error"].startswith("step dpo: ")
