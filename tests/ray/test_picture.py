"""The picture of a job's losses shows what its metrics say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from tests.ray.small_jobs import job, run, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected")]


def test_both_curves_are_those_of_the_metrics(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)  # a figure that stays open can be read
    sets = [{"path": str(write_rows(tmp_path / "rows.jsonl", 40))}]
    config = job(tiny_model, tmp_path, sets, data={"held_out": 0.2}, train={"max_steps": 4, "eval_steps": 2})
    _, rows = run(config)
    monkeypatch.undo()
    (figure,) = drawn
    pyplot.close(figure)
    (axes,) = figure.axes
    curves = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert curves["loss"] == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert curves["evaluation"] == [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    assert [len(curves[name]) for name in ("loss", "evaluation")] == [4, 2]
    assert axes.get_title() == "run"
    assert (config.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
