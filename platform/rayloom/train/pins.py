"""Checkpoints that a host needs for longer than the run keeps them.

<folder>/<number>/checkpoints/step-00000020/       the checkpoint
                  checkpoints/...snapshot.json     Ray Train's list, with this one alone
                  metrics.jsonl  manifest.jsonl  data.json     up to its step

A pin has its checkpoint as hard links, where the storage has them, so that the run may delete its own at any time; and
what else a run directory must hold, for a run to go on from there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from rayloom.train.checkpoints import SNAPSHOT, step_of

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
_ROWS = (METRICS, "manifest.jsonl")


class Pins:
    """Pins the first checkpoint at or behind each multiple of so many steps. It goes to Ray Train's controller, which
    pins a checkpoint before it may delete it.

    Args:
        every: steps.
        count: multiples that count; what comes behind is not pinned.
    """

    def __init__(self, folder: Path, every: int, count: int) -> None:
        self._folder, self._every, self._count = folder, every, count
        self._last = 0

    def take(self, checkpoint: Path) -> Path | None:
        """Pin a checkpoint that is on the list, or find its pin; None: the last one was of the same multiple.

        Raises:
            OSError: there is no room for it.
        """
        step = step_of(checkpoint.name)
        number = (step or 0) // self._every
        if not self._last < number <= self._count:
            return None
        self._last = number
        pin = self._folder / str(number)
        if not pin.exists():
            partial = self._folder / f"{number}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            (partial / CHECKPOINTS).mkdir(parents=True)
            link_tree(checkpoint, partial / CHECKPOINTS / checkpoint.name)
            text = (checkpoint.parent / SNAPSHOT).read_text(encoding="utf-8")
            (partial / CHECKPOINTS / SNAPSHOT).write_text(_only(text, checkpoint.name), encoding="utf-8")
            partial.rename(pin)
        return pin


def pinned_step(pin: Path) -> int:
    """The step of a pin's checkpoint."""
    return next(step for child in (pin / CHECKPOINTS).iterdir() if (step := step_of(child.name)) is not None)


def complete(pin: Path, run: Path) -> None:
    """Put what a run's directory holds up to the checkpoint's step beside it."""
    step = pinned_step(pin)
    if (run / "data.json").exists():
        shutil.copyfile(run / "data.json", pin / "data.json")
    for name in reversed(_ROWS):  # the metrics come last
        if (run / name).exists():
            lines = (run / name).read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.strip() and json.loads(line)["step"] <= step]
            partial = pin / f"{name}.partial"
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            partial.replace(pin / name)


def link_tree(source: Path, target: Path) -> None:
    """Copy a folder whose files nobody writes into any more: as hard links, where the storage has them."""
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _only(snapshot: str, name: str) -> str:
    """Ray Train's list with one of its checkpoints."""
    whole: dict[str, Any] = json.loads(snapshot)
    results = zip(whole["checkpoint_results"], whole["checkpoint_report_indices"], strict=True)
    [(result, index)] = [(one, at) for one, at in results if one["checkpoint_dir_name"] == name]
    empty: dict[str, Any] = {
        key: [] for key in whole if key.startswith("pending_") or key.endswith("_checkpoint_dir_names")
    }
    own = {"checkpoint_results": [result], "checkpoint_report_indices": [index], "latest_checkpoint_result": result}
    return json.dumps({**whole, **empty, **own})
