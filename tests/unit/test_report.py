"""What a person sees of a job: lines that can be read back, the mean loss, a picture."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot

from rayloom.train.report import Reporter, mean_loss, metrics_line, parse_metrics_line, plot_loss

ROW = {
    "step": 12,
    "progress": 0.296,
    "loss": 1.23456,
    "learning_rate": 0.00012345,
    "grad_norm": 0.98765,
    "tokens_per_second": 1234.5,
    "epoch": 0.5,
}
LINE = "step 12  30 %  loss 1.2346  lr 0.000123  grad norm 0.988  1234 tokens/s  epoch 0.50"


def row(**fields: Any) -> dict[str, Any]:
    return {**ROW, **fields}


def test_golden_line():
    assert metrics_line(ROW) == LINE
    assert "grad norm -  " in metrics_line(row(grad_norm=None))


@given(
    step=st.integers(0, 10**9),
    progress=st.floats(0, 1),
    loss=st.floats(0, 1e6) | st.sampled_from([float("nan"), float("inf")]),
)
def test_a_line_can_be_read_back(step, progress, loss):
    parsed = parse_metrics_line("  " + metrics_line(row(step=step, progress=progress, loss=loss)) + "\n")
    assert parsed is not None
    assert parsed[0] == step
    assert parsed[1] == pytest.approx(100 * progress, abs=0.5001)
    assert parsed[2] == pytest.approx(loss, abs=0.00005001, nan_ok=True)


@pytest.mark.parametrize("line", ["", "step", "saving step 3", "a step 12  30 %  loss 1.0", "step 12 30 % loss 1.0"])
def test_other_lines_are_none(line):
    assert parse_metrics_line(line) is None


def test_lines_go_to_a_log_as_they_are(capsys):
    with Reporter() as reporter:  # under pytest no terminal
        reporter.say("[bold]not markup[/bold]")
        reporter.show(ROW)
    assert capsys.readouterr().out == f"[bold]not markup[/bold]\n{LINE}\n"


@given(losses=st.lists(st.floats(0, 10), min_size=1, max_size=30), every=st.integers(1, 8))
def test_the_mean_loss_is_that_of_all_steps(losses, every):
    """However often it is logged: a row holds the mean of the steps since the row before, the last one of the rest."""
    starts = range(0, len(losses), every)
    rows = [
        {"step": min(start + every, len(losses)), "loss": sum(part) / len(part)}
        for start in starts
        if (part := losses[start : start + every])
    ]
    assert mean_loss(rows) == pytest.approx(sum(losses) / len(losses))


def test_the_picture_is_one(tmp_path):
    for rows in ([{"step": 1, "loss": 2.0}], [{"step": n, "loss": 3.0 / n} for n in range(1, 9)]):
        plot_loss(rows, [{"step": 1, "eval_loss": 2.5}], tmp_path / "loss.png", "a title")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_picture_has_the_curves_of_its_rows(evaluated, tmp_path, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr(pyplot, "close", drawn.append)  # a figure that stays open can be read
    rows = [{"step": 3 * number, "loss": 4.0 / number} for number in range(1, 6)]
    evaluations = [{"step": step, "eval_loss": 3.0 - step / 10} for step in (6, 15)] if evaluated else []
    plot_loss(rows, evaluations, tmp_path / "loss.png", "a title")
    monkeypatch.undo()
    (figure,) = drawn
    pyplot.close(figure)
    (axes,) = figure.axes
    curves = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert curves["loss"] == [(row["step"], row["loss"]) for row in rows]
    assert len(curves["smoothed"]) == len(rows)
    assert curves.get("evaluation", []) == [(row["step"], row["eval_loss"]) for row in evaluations]
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert named == ["loss", "smoothed", *(["evaluation"] if evaluated else [])]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss per trained token")
