"""Training speed of the demo's configuration against a bare PyTorch loop on the same batches, and its start-up.

The two take turns, three times each, and of each step the median counts: the same step trains on the same batch in
every run, and a machine that slows down meanwhile slows both down. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parents[2]
TURNS = 3
WARM_UP = 2  # steps that are not counted: memory is laid out and kernels are chosen in them

Steps = list[tuple[int, float]]
"""Of each optimizer step: its tokens without padding, and its seconds."""


def main() -> None:
    """Run the three measurements and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of each run")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(options.steps)))
        return
    bare_runs, rayloom_runs, results = [], [], []
    for turn in range(1, TURNS + 1):
        bare_runs.append(run_bare(options.steps))
        print(f"turn {turn} of {TURNS}: bare loop {speed(bare_runs[-1:]):.1f} tokens/s", flush=True)
        steps, result = run_rayloom(options.steps)
        rayloom_runs.append(steps)
        results.append(result)
        print(f"turn {turn} of {TURNS}: Rayloom {speed(rayloom_runs[-1:]):.1f} tokens/s", flush=True)
    engine = f"{results[-1]['engine']['class']}, {results[-1]['precision']}"
    print("\ndemo configuration, 1 worker, tokens/s without padding, the median of each step")
    print(f"  bare PyTorch loop                    {speed(bare_runs):7.1f}")
    print(f"  Rayloom ({engine})        {speed(rayloom_runs):7.1f}")
    print(f"  ratio                                {speed(rayloom_runs) / speed(bare_runs):7.3f}   (at least 0.9)")
    print("\nseconds from `rayloom train` to the end of the first optimizer step, the median of each phase")
    phases = {
        name: median(result["seconds_to_first_step"][name] for result in results)
        for name in results[-1]["seconds_to_first_step"]
    }
    for name, seconds in phases.items():
        print(f"  {name:<12} {seconds:6.1f}")
    print(f"  {'in all':<12} {sum(phases.values()):6.1f}")


def speed(runs: list[Steps]) -> float:
    """Tokens per second after the warm-up, with the median of every step's seconds over the runs."""
    steps = list(zip(*runs, strict=True))[WARM_UP:]
    return sum(step[0][0] for step in steps) / sum(median(seconds for _, seconds in step) for step in steps)


def arguments(steps: int, output: str) -> list[str]:
    """The demo on one worker."""
    changes = {"train.workers": 1, "train.max_steps": steps, "train.logging_steps": 1, "name": "bench"}
    return [
        str(PROJECT / "jobs" / "demo.yaml"),
        *(f"{key}={value}" for key, value in changes.items()),
        f"output_dir={output}",
    ]


def run_rayloom(steps: int) -> tuple[Steps, dict]:
    """The steps of `rayloom train`, and its `result.json`."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "rayloom", "train", *arguments(steps, output)]
        subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
        run = Path(output) / "bench"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((run / "result.json").read_text())
    tokens = [row["tokens"] - before for row, before in zip(rows, [0, *(row["tokens"] for row in rows)], strict=False)]
    return [(count, count / row["tokens_per_second"]) for count, row in zip(tokens, rows, strict=True)], result


def run_bare(steps: int) -> Steps:
    """The steps of the bare loop, in a process of its own."""
    command = [sys.executable, __file__, "--bare", "--steps", str(steps)]
    output = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    return [(int(tokens), seconds) for tokens, seconds in json.loads(output.splitlines()[-1])]


def bare(steps: int) -> Steps:
    """The loop that one would write by hand: same model, same rows, AdamW, no framework around it."""
    import torch

    from rayloom.config.read import read_job
    from rayloom.data.deal import deal
    from rayloom.data.plan import Position
    from rayloom.data.rows import collate
    from rayloom.data.segment import EncodeSegment
    from rayloom.data.walk import Walk
    from rayloom.methods.attach import attach_method
    from rayloom.models.load import load_causal_lm
    from rayloom.models.precision import choose_precision, computes_bf16
    from rayloom.models.tokenizer import load_tokenizer, pad_token
    from rayloom.stages.prepare import prepare_data, segment_options

    file, *overrides = arguments(steps, "runs")
    job = read_job(file, overrides)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[
        choose_precision(job.train.precision, "cpu", bf16=computes_bf16("cpu"))
    ]
    plan, encoder = prepare_data(job)
    work = EncodeSegment(encoder, segment_options(job))
    blocks = (work(plan, segment) for segment in Walk(plan).segments(Position()))
    tables = list(itertools.islice(deal(blocks, 0, 1, job.train.batch_size), steps))
    padding = pad_token(load_tokenizer(job.model.path))
    model = attach_method(load_causal_lm(job.model.path, dtype), job.method).to(dtype).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.train.learning_rate)
    measured, before = [], time.perf_counter()
    for table in tables:
        batch = {name: torch.from_numpy(array) for name, array in collate(table, padding).items()}
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, job.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        measured.append((sum(len(ids) for ids in table["input_ids"]), now - before))
        before = now
    return measured


if __name__ == "__main__":
    main()
