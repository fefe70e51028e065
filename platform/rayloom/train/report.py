"""What a person sees of a running job: a progress bar on a terminal, plain lines in a log, a picture at the end."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MetricsRow = dict[str, Any]

_LINE = re.compile(r"^step (?P<step>\d+)  (?P<percent>\d+) %  loss (?P<loss>\S+)")


def metrics_line(row: MetricsRow) -> str:
    """One row of metrics as a line of the log."""
    if "loss" not in row:
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name.startswith("eval_"))
        return f"step {row['step']}  {100 * row['progress']:.0f} %  {numbers}"
    of_answers = f"reward {row['reward']:.4f}  " if "reward" in row else ""
    of_answers += f"kl {row['kl']:.3g}  " if "kl" in row else ""
    grad_norm = "-" if row.get("grad_norm") is None else f"{row['grad_norm']:.3g}"
    return (
        f"step {row['step']}  {100 * row['progress']:.0f} %  loss {row['loss']:.4f}  "
        f"{of_answers}lr {row['learning_rate']:.3g}  grad norm {grad_norm}  {row['tokens_per_second']:.0f} tokens/s  "
        f"epoch {row['epoch']:.2f}"
    )


def parse_metrics_line(line: str) -> tuple[int, int, float] | None:
    """(step, percent done, loss) of a line that `metrics_line` made; None for any other line."""
    match = _LINE.match(line.strip())
    return (int(match["step"]), int(match["percent"]), float(match["loss"])) if match else None


def mean_loss(rows: Sequence[MetricsRow]) -> float:
    """Mean loss over all steps. A row holds the mean of the steps since the row before, so it counts that often;
    steps that were left out are as the others of their row."""
    steps = [0, *(row["step"] for row in rows)]
    return (
        sum(row["loss"] * (step - before) for row, before, step in zip(rows, steps, steps[1:], strict=False))
        / steps[-1]
    )


class Reporter:
    """Shows messages and metrics; a bar below them where the output is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=100)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def show(self, row: MetricsRow) -> None:
        """A row of metrics."""
        self.line(metrics_line(row))

    def line(self, line: str) -> None:
        """A line of a job's log; one that holds metrics moves the bar too."""
        self.say(line)
        if self._bar and (parsed := parse_metrics_line(line)):
            step, percent, loss = parsed
            self._bar.update(self._task, completed=percent, description=f"step {step}  loss {loss:.3f}")


def plot_loss(rows: list[MetricsRow], evaluations: list[MetricsRow], path: Path, title: str) -> None:
    """Draw the loss over the steps, as it was and smoothed, and where there was one, the evaluation's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    smooth, average = [], losses[0]
    for loss in losses:
        average = 0.7 * average + 0.3 * loss
        smooth.append(average)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=130)
    axes.plot(steps, losses, color="#9db7d5", linewidth=1.2, marker="o", markersize=2.5, label="loss")
    axes.plot(steps, smooth, color="#1f4e8c", linewidth=2.0, label="smoothed")
    if evaluations:
        steps, losses = [row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations]
        axes.plot(steps, losses, color="#c2571a", linewidth=1.6, marker="s", markersize=4, label="evaluation")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token", title=title)
    if min(row["loss"] for row in rows) >= 0:
        axes.set_ylim(bottom=0)
    _finish(figure, [axes], path)


def plot_reward(rows: list[MetricsRow], evaluations: list[MetricsRow], path: Path, title: str) -> None:
    """Draw the mean reward of the rounds over the steps, that of the evaluations, and how far the policy has gone from
    the reference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=130)
    steps = [row["step"] for row in rows]
    drawn = axes.plot(steps, [row["reward"] for row in rows], color="#1f4e8c", linewidth=2.0, label="reward")
    if evaluations:
        steps_of, rewards = [row["step"] for row in evaluations], [row["eval_reward"] for row in evaluations]
        drawn += axes.plot(steps_of, rewards, color="#c2571a", linewidth=1.6, marker="s", markersize=4,
                           label="reward, evaluation")  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="mean reward of an answer", title=title)
    every = [axes]
    if all("kl" in row for row in rows):
        other = axes.twinx()
        drawn += other.plot(steps, [row["kl"] for row in rows], color="#8a8a8a", linewidth=1.0, label="divergence")
        other.set(ylabel="divergence, nats an answer")
        every.append(other)
    axes.legend(handles=drawn, frameon=False)
    _finish(figure, every, path)


def _finish(figure: Any, every: Sequence[Any], path: Path) -> None:
    from matplotlib import pyplot as plt

    every[0].grid(alpha=0.25)
    if len(every) == 1:
        every[0].legend(frameon=False)
    for axes in every:
        axes.spines["top"].set_visible(False)
        axes.spines["right"].set_visible(len(every) > 1)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
