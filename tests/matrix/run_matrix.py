"""Run every causal model type through `check.py` and write the page `matrix.md`: `make matrix`.

Importing torch, transformers and PEFT takes longer than a type: so this process imports them, makes no model, and is
forked for each step. The step that loads an adapter runs in a fork that never saw the model that was trained.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tests.matrix import check
from tests.matrix.page import write_page
from tests.matrix.tiny_configs import class_name, model_types

from rayloom.models.causal import why_not_causal
from rayloom.models.packing import packing_is_exact

HERE = Path(__file__).parent
PACKING = Path(__file__).parents[2] / "platform" / "rayloom" / "models" / "packing.yaml"
SECONDS = 60
"""A step's time limit."""
MEMORY = 6 * 2**30
"""A step's address space, bytes."""

Row = dict[str, Any]
_FORK = multiprocessing.get_context("fork")


def _train(model_type: str, folder: Path) -> Row:
    as_it_comes: Row = {}
    with contextlib.suppress(Exception):  # whether it is causal is said below, of the configuration that is trained
        as_it_comes = {"causal_as_it_comes": check.is_causal_as_it_comes(model_type)}
    _note(folder, as_it_comes)
    return check.train_and_save(model_type, folder)


def _load(model_type: str, folder: Path) -> Row:
    return dict(check.load_and_compare(folder))


STEPS: Sequence[Callable[[str, Path], Row]] = (_train, _load)


def _note(folder: Path, facts: Row) -> None:
    path = folder / "facts.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(known | facts), encoding="utf-8")


def _child(step: Callable[[str, Path], Row], model_type: str, folder: Path) -> None:
    """One step in a process of its own: what it finds, or why it failed, goes into the folder."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    try:
        _note(folder, step(model_type, folder))
    except Exception as error:
        traceback.print_exc()
        _note(folder, {"reason": _one_line(error)})
        sys.stdout.flush()
        os._exit(1)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError) and "pip install" in text:
        return "needs the package " + text.split("pip install ")[1].split("`")[0]
    return text if isinstance(error, check.CheckError) else f"{type(error).__name__}: {text[:160]}"


@dataclass
class Task:
    """One type on its way through the steps."""

    model_type: str
    folder: Path
    started: float = field(default_factory=time.perf_counter)
    step: int = 0
    step_started: float = 0.0
    process: Any = None

    def begin(self) -> None:
        self.step_started = time.perf_counter()
        self.process = _FORK.Process(target=_child, args=(STEPS[self.step], self.model_type, self.folder))
        self.process.start()

    def end(self) -> Row | None:
        """The row, when the last step is over or one has failed; begins the next step otherwise."""
        if self.process.is_alive():
            if time.perf_counter() - self.step_started < SECONDS:
                return None
            self.process.kill()
            self.process.join()
            _note(self.folder, {"reason": f"took longer than {SECONDS} s"})
        elif self.process.exitcode == 0 and self.step + 1 < len(STEPS):
            self.step += 1
            self.begin()
            return None
        elif self.process.exitcode < 0:
            _note(self.folder, {"reason": f"ended by signal {-self.process.exitcode}"})
        facts = json.loads((self.folder / "facts.json").read_text(encoding="utf-8"))
        return {
            "type": self.model_type,
            "class": class_name(self.model_type),
            **facts,
            "result": "fails" if "reason" in facts else "passes",
            "seconds": time.perf_counter() - self.started,
        }


def run(types: Sequence[str], jobs: int, scratch: Path) -> Iterator[Row]:
    """Rows in the order in which they are ready."""
    waiting, running = list(types), []
    while waiting or running:
        while waiting and len(running) < jobs:
            model_type = waiting.pop(0)
            folder = scratch / model_type
            folder.mkdir()
            task = Task(model_type, folder)
            task.begin()
            running.append(task)
        for task in list(running):
            row = task.end()
            if row is not None:
                running.remove(task)
                yield row
        time.sleep(0.01)


def judge(row: Row) -> Row:
    """A type that cannot pass and that the product refuses is `refused`, with the product's reason."""
    refusal = why_not_causal({"model_type": row["type"], "is_decoder": True, "causal": True})
    if row["result"] == "fails" and refusal is not None:
        return row | {"result": "refused", "reason": refusal.partition(": ")[2]}
    return row


def disagreements(rows: Sequence[Row]) -> Iterator[str]:
    """Where the product's data say something else than what was found."""
    for row in rows:
        name = row["type"]
        if row["result"] == "passes" and packing_is_exact(name) is not row["packing"]:
            yield f"packing.yaml: {name}: packing is {'' if row['packing'] else 'not '}exact"
        refused = why_not_causal({"model_type": name, "is_decoder": True, "causal": True})
        if row["result"] == "passes" and refused is not None:
            yield f"causal.yaml: {name} is refused, and passes"
        is_encoder = not row.get("causal_as_it_comes", True)
        if row["result"] == "passes" and is_encoder != (why_not_causal({"model_type": name}) is not None):
            yield f"causal.yaml: {name} is {'' if is_encoder else 'not '}an encoder as it comes"


def write_packing(rows: Sequence[Row], path: Path) -> None:
    """Write what was found of packing as the product's data."""
    passed = [row for row in rows if row["result"] == "passes"]
    data = {
        "exact": [row["type"] for row in passed if row["packing"]],
        "leaks": {row["type"]: row["why_not_packed"] for row in passed if not row["packing"]},
    }
    head = (
        "# Whether the examples of a packed row are kept apart, by model type: found by `make matrix`, written by\n"
        f"# `tests/matrix/run_matrix.py --write-packing` with transformers {transformers.__version__}.\n"
    )
    path.write_text(head + yaml.safe_dump(data, sort_keys=False, width=120), encoding="utf-8")


def main() -> int:
    """Exit status 0 if at least 150 types pass and the product's data agree with what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all of them if none is named, and only then is written")
    parser.add_argument("--jobs", type=int, default=2, help="steps at a time (2)")
    parser.add_argument("--write-packing", action="store_true", help=f"write {PACKING.name} from what is found")
    options = parser.parse_args()
    types, rows = options.types or model_types(), []
    with tempfile.TemporaryDirectory(prefix="rayloom-matrix-") as scratch:
        for row in map(judge, run(types, options.jobs, Path(scratch))):
            rows.append(row)
            print(f"{len(rows):4}/{len(types)}  {row['type']:28} {row['result']}  {row.get('reason', '')}", flush=True)
    rows.sort(key=lambda row: row["type"])
    passed = sum(row["result"] == "passes" for row in rows)
    if options.types:
        print(json.dumps(rows, indent=1))
        return 0
    if options.write_packing:
        write_packing(rows, PACKING)
    write_page(rows, HERE / "matrix.md")
    faults = [] if options.write_packing else list(disagreements(rows))
    print(*faults, f"{passed} of {len(rows)} types pass", sep="\n")
    return 1 if faults or passed < 150 else 0


if __name__ == "__main__":
    sys.exit(main())
