"""Run every method with every feature under every DeepSpeed stage, and write the page `techniques.md`.

A cell trains two steps on a real Ray cluster, or is refused before anything loads, with the reason; it must not fail,
and what it trains must be what it says. The cells are data, `techniques.yaml`; a cell that names a key or a value that
the job file does not have is `not built`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tests.tiny_model import make_tiny_model

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import validate_job
from rayloom.errors import RequestError
from rayloom.jobs.local_head import LocalHead
from rayloom.train.driver import run_job

HERE = Path(__file__).parent
SECONDS = 240
"""A cell's time limit."""
OUTCOMES = ("trains", "refused", "not built", "fails")

_FORK = multiprocessing.get_context("fork")
_STAGES = {"none": 0, "zero2": 2, "zero3": 3}
_UNKNOWN = re.compile(r"unknown key|: unknown '")


@dataclass(frozen=True)
class Cell:
    """One method, one feature, one DeepSpeed stage."""

    method: str
    feature: str
    deepspeed: str

    def document(self, table: Mapping[str, Any]) -> dict[str, Any]:
        """What of the job file the cell says."""
        engine = {"train": {"deepspeed": self.deepspeed}}
        return merged(table["base"], table["methods"][self.method], table["features"][self.feature], engine)

    def __str__(self) -> str:
        return f"{self.method} x {self.feature} x {self.deepspeed}"


def read_table() -> dict[str, Any]:
    """`techniques.yaml`."""
    return dict(yaml.safe_load((HERE / "techniques.yaml").read_text(encoding="utf-8")))


def cells(table: Mapping[str, Any]) -> list[Cell]:
    """Every cell, methods first."""
    return [Cell(*names) for names in product(table["methods"], table["features"], table["deepspeed"])]


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other; the later one wins."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


def config_of(cell: Cell, table: Mapping[str, Any], folder: Path) -> JobConfig:
    """The cell's job on the tiny model and the rows that `main` put into `folder`.

    Raises:
        RequestError: the config refuses it.
    """
    rest = {
        "name": re.sub(r"[^A-Za-z0-9]+", "-", str(cell)),
        "output_dir": str(folder / "runs"),
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(folder / "rows.jsonl")]},
    }
    return validate_job(Document(str(cell), merged(cell.document(table), rest)))


def judge(cell: Cell, table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What becomes of a cell: an `outcome` of `OUTCOMES`, and `why`."""
    try:
        job = config_of(cell, table, folder)
    except RequestError as error:
        built = not any(_UNKNOWN.search(message) for message in error.messages)
        return {"outcome": "refused" if built else "not built", "why": _reason(cell, error)}
    try:
        result = run_job(job, started=time.time())
    except RequestError as error:
        if job.run_dir.exists():
            return {"outcome": "fails", "why": f"refused only when workers ran: {_reason(cell, error)}"}
        return {"outcome": "refused", "why": _reason(cell, error)}
    fault = _fault(job, result)
    return {"outcome": "fails", "why": fault} if fault else {"outcome": "trains", "why": _evidence(result)}


def _reason(cell: Cell, error: RequestError) -> str:
    return " ".join("; ".join(message.removeprefix(f"{cell}: ") for message in error.messages).split())


def _fault(job: JobConfig, result: Mapping[str, Any]) -> str | None:
    """Why a run that ended well is yet not what the job says."""
    rows = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    if result["steps"] != 2 or len(losses) != 2 or not all(map(math.isfinite, losses)):
        return f"{result['steps']} steps with losses {losses}"
    if result["precision"] != job.train.precision:
        return f"computed in {result['precision']}"
    stage = _STAGES[job.train.deepspeed]
    if result["engine"]["zero_stage"] != stage:
        return f"trained by {result['engine']}, not ZeRO stage {stage}"
    share = _share(result)
    everything = job.method.type == "full" and job.optimizer.type != "badam"  # whose layers take turns
    if (share == 1) != everything:
        return f"{share:.1%} of the parameters train"
    return None


def _share(result: Mapping[str, Any]) -> float:
    return float(result["parameters"]["trained"] / result["parameters"]["all"])


def _evidence(result: Mapping[str, Any]) -> str:
    return f"{_share(result):.1%} of the parameters train"


# --- running ----------------------------------------------------------------------------------------------------------


def _child(cell: Cell, table: Mapping[str, Any], folder: Path, answer: Path) -> None:
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    print(f"\n=== {cell}", flush=True)
    try:
        row = judge(cell, table, folder)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        row = {"outcome": "fails", "why": f"{type(error).__name__}: {lines[-1][:200] if lines else ''}"}
    answer.write_text(json.dumps(row), encoding="utf-8")


def run(chosen: Sequence[Cell], table: Mapping[str, Any], folder: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """One cell after the other, each in a fork of this process, which never joins the cluster itself."""
    for number, cell in enumerate(chosen):
        answer = folder / f"{number}.json"
        process = _FORK.Process(target=_child, args=(cell, table, folder, answer))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        if answer.exists():
            yield cell, json.loads(answer.read_text(encoding="utf-8"))
        else:
            yield cell, {"outcome": "fails", "why": f"no answer in {SECONDS} s; exit status {process.exitcode}"}


def read_results(path: Path | None) -> dict[Cell, dict[str, Any]]:
    """What an earlier run, which was broken off, has found."""
    if path is None or not path.exists():
        return {}
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {Cell(*row.pop("cell")): row for row in rows}


_HEAD = """# Technique x technique

Made by `tests/matrix/techniques.py` on {date} with {versions}, one worker on CPU, a two-layer Llama. Do not edit.

{counts}. A cell that trains made two steps, computed in the precision, by the engine and with the share of trained
parameters that the job says. A refused one was refused before anything was loaded or written. An empty one was not run.

"""


def write_page(results: Mapping[Cell, Mapping[str, Any]], table: Mapping[str, Any], path: Path) -> None:
    """A table for each DeepSpeed stage, methods down and features across; reasons below, each once."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "transformers", "peft", "deepspeed", "torch"))
    counted = Counter(row["outcome"] for row in results.values())
    counts = ", ".join(f"{counted[outcome]} {outcome}" for outcome in OUTCOMES if counted[outcome])
    text = _HEAD.format(
        date=datetime.date.today().isoformat(),
        versions=versions,
        counts=f"{len(results)} of {len(cells(table))} cells: {counts}",
    )
    reasons: dict[str, int] = {}
    for engine in table["deepspeed"]:
        text += f"## {'No DeepSpeed' if engine == 'none' else engine}\n\n| | {' | '.join(table['features'])} |\n"
        text += "|---|" + "---|" * len(table["features"]) + "\n"
        for method in table["methods"]:
            row = [results.get(Cell(method, feature, engine)) for feature in table["features"]]
            text += f"| {method} | {' | '.join(_mark(one, reasons) for one in row)} |\n"
        text += "\n"
    text += "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
    path.write_text(text, encoding="utf-8")


def _mark(row: Mapping[str, Any] | None, reasons: dict[str, int]) -> str:
    if row is None:
        return ""
    if row["outcome"] == "trains":
        return "trains"
    return f"{row['outcome']} ({reasons.setdefault(row['why'], len(reasons) + 1)})"


def _write_rows(path: Path) -> None:
    rows = ({"instruction": f"Say the number {number}.", "output": f"It is {number}."} for number in range(40))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Exit status 0 if no cell fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", help="only these; then no page is written")
    parser.add_argument("--features", nargs="*", help="only these; then no page is written")
    parser.add_argument("--deepspeed", nargs="*", help="only these; then no page is written")
    parser.add_argument(
        "--results",
        type=Path,
        help="a file that gets a line for each cell; those in it are not run, and the page has all",
    )
    options = parser.parse_args()
    table = read_table()
    chosen = [
        cell
        for cell in cells(table)
        if cell.method in (options.methods or table["methods"])
        and cell.feature in (options.features or table["features"])
        and cell.deepspeed in (options.deepspeed or table["deepspeed"])
    ]
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayloom-techniques-")))
        # DeepSpeed's kernels are compiled here: a build that is killed leaves a lock for which every later one waits.
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
        head = stack.enter_context(LocalHead(num_cpus=4))
        make_tiny_model(folder / "model")
        _write_rows(folder / "rows.jsonl")
        os.environ.update({**head.environment, "RAY_ADDRESS": head.cluster_address})
        results = read_results(options.results)
        for cell, row in run([cell for cell in chosen if cell not in results], table, folder):
            results[cell] = row
            if options.results:
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"cell": astuple(cell), **row}) + "\n")
            print(
                f"{sum(one in results for one in chosen):4}/{len(chosen)}  {cell}: {row['outcome']}: {row['why']}",
                flush=True,
            )
        failed = sum(row["outcome"] == "fails" for row in results.values())
        if failed:
            (HERE / "techniques.log").write_bytes((folder / "log.txt").read_bytes())
            print(f"{failed} cells fail; what they wrote is in {HERE / 'techniques.log'}")
    if options.results or len(chosen) == len(cells(table)):
        write_page(results, table, HERE / "techniques.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
