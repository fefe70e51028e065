"""`search.json`: what became of every trial. Plain data, read without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Ledger = dict[str, Any]

FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"
"""How a trial ends; one that has not is `running`."""


def read_ledger(folder: Path) -> Ledger:
    """What a search's `search.json` holds; of a search that has not begun, no trials."""
    try:
        return dict(json.loads((folder / "search.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {"trials": []}


def write_ledger(folder: Path, ledger: Ledger) -> None:
    """Replace `search.json`; never half-written."""
    partial = folder / "search.partial"
    partial.write_text(json.dumps(ledger, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "search.json")


def trials_left(ledger: Ledger, trials: int) -> int:
    """Of so many trials, those that have not ended."""
    return trials - sum(trial["status"] in (FINISHED, STOPPED, FAILED) for trial in ledger["trials"])


def best_trial(ledger: Ledger) -> dict[str, Any] | None:
    """The best of those that finished; only where none has, of those that were stopped early. By their last values: a
    value on the way is not what the job ends with."""
    choose = min if ledger["mode"] == "min" else max
    for status in (FINISHED, STOPPED):
        trials = [trial for trial in ledger["trials"] if trial["status"] == status and trial["value"] is not None]
        if trials:
            return dict(choose(trials, key=lambda trial: trial["value"]))
    return None
