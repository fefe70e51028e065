"""What a person sees of a search: a table, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from rayloom.search.population import told
from rayloom.search.results import FAILED, FINISHED, STOPPED, Ledger, best_trial

_STYLES = {FINISHED: ("#1f4e8c", 1.6), STOPPED: ("#9db7d5", 1.0), FAILED: ("#c2571a", 1.0)}
_BEST = ("#2e8b57", 2.6)
_TAKEN = "#777777"


def show(ledger: Ledger, console: Console) -> None:
    """A row for each trial, the best first; then what was taken over, and why some failed."""
    keys = list(dict.fromkeys(key for trial in ledger["trials"] for key in trial["values"]))
    whole = [Column(name, no_wrap=True) for name in ("trial", "status", "steps", ledger["metric"])]
    table = Table(*whole, *(Column(key.replace(".", ".\n"), overflow="fold") for key in keys), box=None, pad_edge=False)
    for trial in _ranked(ledger):
        value = "-" if trial["value"] is None else f"{trial['value']:.4f}"
        row = [trial["name"], trial["status"], str(trial["step"]), value]
        row += [_text(trial["values"].get(key, "-")) for key in keys]
        table.add_row(*row, style="bold" if trial["name"] == ledger["best"] else None)
    console.print(table, highlight=False)
    for exploit in ledger.get("exploits", []):
        console.print(told(exploit), highlight=False, markup=False, soft_wrap=True)
    for trial in ledger["trials"]:
        if trial["error"]:
            console.print(f"{trial['name']}: {trial['error']}", highlight=False, markup=False, soft_wrap=True)


def draw(ledger: Ledger, path: Path) -> None:
    """Draw the trials as lines over the searched keys and the metric, and the best value over time; of a population,
    who took over whom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    trials = [trial for trial in ledger["trials"] if trial["status"] in _STYLES]
    keys = list(dict.fromkeys(key for trial in trials for key in trial["values"]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), dpi=130, width_ratios=[3, 2])
    _parallel(left, trials, keys, ledger)
    if "exploits" in ledger:
        _population(right, trials, ledger)
    else:
        _best_so_far(right, trials, ledger)
    figure.suptitle(ledger["name"])
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _parallel(axes: Any, trials: Sequence[dict[str, Any]], keys: Sequence[str], ledger: Ledger) -> None:
    """Each key has an upright axis of its own, from its smallest value to its largest; the metric is the last. A
    trial passes by a key that it does not set."""
    best = best_trial(ledger)
    columns = [[trial["values"].get(key) for trial in trials] for key in keys]
    columns.append([trial["value"] for trial in trials])
    scaled = [_scaled(column) for column in columns]
    for number, trial in enumerate(trials):
        is_best = best is not None and trial["name"] == best["name"]
        color, width = _BEST if is_best else _STYLES[trial["status"]]
        there = [(place, column[number]) for place, column in enumerate(scaled) if column[number] is not None]
        places, heights = zip(*there, strict=True)
        label = "best" if is_best else trial["status"]
        axes.plot(places, heights, color=color, linewidth=width, marker="o", markersize=3, label=label,
                  zorder=3 if is_best else 2)  # fmt: skip
    for place, column in enumerate(columns):
        axes.axvline(place, color="#cccccc", linewidth=0.8, zorder=0)
        for height, text in _ends(column):
            below = height == 0 and len(set(map(str, column))) > 1
            axes.annotate(text, (place, height), xytext=(0, -12 if below else 5), textcoords="offset points",
                          ha="center", fontsize=7)  # fmt: skip
    axes.set_xticks(range(len(columns)), [*keys, ledger["metric"]], fontsize=8)
    axes.set(yticks=[], ylim=(-0.12, 1.15))
    for side in axes.spines.values():
        side.set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), frameon=False, fontsize=8, loc="upper center", ncols=4,
                bbox_to_anchor=(0.5, -0.1))  # fmt: skip


def _best_so_far(axes: Any, trials: Sequence[dict[str, Any]], ledger: Ledger) -> None:
    """Over the trials in the order in which they ended: what each came to, and the best of those that finished."""
    choose = min if ledger["mode"] == "min" else max
    ended = sorted((trial for trial in trials if trial["value"] is not None), key=lambda trial: trial["ended"])
    best: list[float] = []
    for trial in ended:
        counts = trial["status"] == FINISHED
        values = [*best[-1:], *([trial["value"]] if counts else [])]
        best.append(choose((value for value in values if not math.isnan(value)), default=math.nan))
    order = range(1, len(ended) + 1)
    for status, (color, _) in _STYLES.items():
        own = [
            (number, trial["value"]) for number, trial in zip(order, ended, strict=True) if trial["status"] == status
        ]
        if own:
            axes.scatter(*zip(*own, strict=True), color=color, s=18, label=status, zorder=3)
    axes.step(order, best, where="post", color=_BEST[0], linewidth=2, label="best so far")
    axes.set(xlabel="trials, as they ended", ylabel=ledger["metric"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _population(axes: Any, trials: Sequence[dict[str, Any]], ledger: Ledger) -> None:
    """Over the steps: each trial's value at the rungs and at its end, and from whom it took over a checkpoint."""
    best = best_trial(ledger)
    at = {(trial["name"], int(rung)): value for trial in trials for rung, value in trial["rungs"].items()}
    takes = {(exploit["trial"], exploit["rung"]): exploit["from"] for exploit in ledger["exploits"]}
    for trial in trials:
        is_best = best is not None and trial["name"] == best["name"]
        color, width = _BEST if is_best else _STYLES[trial["status"]]
        lines: list[list[tuple[float, float]]] = [[]]
        for rung in sorted(map(int, trial["rungs"])):
            value = at[trial["name"], rung]
            lines[-1].append((value["step"], value["value"]))
            source = at.get((takes.get((trial["name"], rung), ""), rung))
            if source is not None:  # its line goes on where the other one's is
                lines.append([(source["step"], source["value"])])
                axes.plot(*zip(lines[-2][-1], lines[-1][0], strict=True), color=_TAKEN, linestyle=":", zorder=1)
        if trial["value"] is not None:
            lines[-1].append((trial["step"], trial["value"]))
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=color, linewidth=width, marker="o", markersize=3,
                      zorder=3 if is_best else 2)  # fmt: skip
    axes.plot([], [], color=_TAKEN, linestyle=":", label="takes over the checkpoint")
    axes.set(xlabel="step", ylabel=ledger["metric"])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _scaled(column: Sequence[Any]) -> list[float | None]:
    """Values as heights from 0 to 1: numbers by size, by their logarithm where they span more than a factor of 20;
    anything else by its place."""
    there = [value for value in column if value is not None]
    if not _are_numbers(there):
        places = {_text(value): place for place, value in enumerate(_distinct(there))}
        top = max(1, len(places) - 1)
        return [None if value is None else places[_text(value)] / top for value in column]
    low, high = min(there), max(there)
    if low > 0 and high / low > 20:
        return [None if value is None else math.log(value / low) / math.log(high / low) for value in column]
    return [None if value is None else (value - low) / ((high - low) or 1.0) for value in column]


def _ends(column: Sequence[Any]) -> list[tuple[float, str]]:
    """(height, text) of what is written at an axis: its ends, or all values that are no numbers."""
    there = [value for value in column if value is not None]
    if not there:
        return []
    if not _are_numbers(there):
        values = _distinct(there)
        return [(place / max(1, len(values) - 1), _text(value)) for place, value in enumerate(values)]
    return [(0.0, f"{min(there):.4g}"), (1.0, f"{max(there):.4g}")][: 1 + (min(there) < max(there))]


def _are_numbers(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _distinct(values: Sequence[Any]) -> list[Any]:
    return list({_text(value): value for value in values}.values())


def _ranked(ledger: Ledger) -> list[dict[str, Any]]:
    """Finished, stopped early, failed; of each the best first."""
    sign, order = (1 if ledger["mode"] == "min" else -1), list(_STYLES)
    return sorted(
        ledger["trials"],
        key=lambda trial: (
            order.index(trial["status"]) if trial["status"] in order else len(order),
            math.inf if trial["value"] is None else sign * trial["value"],
        ),
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
