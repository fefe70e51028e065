"""Training speed of the demo's configuration against a bare PyTorch loop on the same batches, and its start-up.

Order of the runs: bare, Rayloom, bare; the ratio is taken against the mean of the two bare runs, so that a machine that
slows down meanwhile does not decide it. Nothing else should run on the machine.
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
from statistics import mean

PROJECT = Path(__file__).resolve().parents[2]
WARM_UP = 2  # steps that are not counted: memory is laid out and kernels are chosen in them


def main() -> None:
    """Run the three measurements and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of each run")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(options.steps)))
        return
    before = run_bare(options.steps)
    rayloom, result = run_rayloom(options.steps)
    after = run_bare(options.steps)
    print("\ndemo configuration, 1 worker, tokens/s without padding")
    print(f"  bare PyTorch loop, before / after   {before:7.1f} / {after:.1f}")
    print(f"  Rayloom ({result['engine']['class']}, {result['precision']})       {rayloom:7.1f}")
    print(f"  ratio                               {rayloom / mean([before, after]):7.2f}   (at least 0.9)")
    print("\nseconds from `rayloom train` to the end of the first optimizer step")
    phases = result["seconds_to_first_step"]
    for name, seconds in phases.items():
        print(f"  {name:<12} {seconds:6.1f}")
    print(f"  {'in all':<12} {sum(phases.values()):6.1f}")


def speed(tokens: list[int], times: list[float]) -> float:
    """Tokens per second over the steps after the warm-up; `times[i]` is the clock at the end of step i."""
    return (tokens[-1] - tokens[WARM_UP - 1]) / (times[-1] - times[WARM_UP - 1])


def arguments(steps: int, output: str) -> list[str]:
    """The demo on one worker."""
    changes = {"train.workers": 1, "train.max_steps": steps, "train.logging_steps": 1, "name": "bench"}
    return [
        str(PROJECT / "jobs" / "demo.yaml"),
        *(f"{key}={value}" for key, value in changes.items()),
        f"output_dir={output}",
    ]


def run_rayloom(steps: int) -> tuple[float, dict]:
    """Tokens per second of `rayloom train`, and its `result.json`."""
    with tempfile.TemporaryDirectory() as output:
        subprocess.run([sys.executable, "-m", "rayloom", "train", *arguments(steps, output)], cwd=PROJECT, check=True)
        run = Path(output) / "bench"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP - 1 :]
        result = json.loads((run / "result.json").read_text())
    tokens = [row["tokens"] for row in rows]
    seconds = [
        (row["tokens"] - before["tokens"]) / row["tokens_per_second"] for before, row in itertools.pairwise(rows)
    ]
    return (tokens[-1] - tokens[0]) / sum(seconds), result


def run_bare(steps: int) -> float:
    """Tokens per second of the bare loop, in a process of its own."""
    command = [sys.executable, __file__, "--bare", "--steps", str(steps)]
    output = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def bare(steps: int) -> float:
    """The loop that one would write by hand: same model, same rows, AdamW, no framework around it."""
    import torch

    from rayloom.config.read import read_job
    from rayloom.data.deal import deal
    from rayloom.data.rows import collate
    from rayloom.data.segment import encode_segment
    from rayloom.methods.attach import attach_method
    from rayloom.models.load import load_causal_lm, load_tokenizer, pad_token
    from rayloom.models.precision import choose_precision, computes_bf16
    from rayloom.stages.prepare import prepare_data

    file, *overrides = arguments(steps, "runs")
    job = read_job(file, overrides)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[
        choose_precision(job.train.precision, "cpu", bf16=computes_bf16("cpu"))
    ]
    plan, encoder = prepare_data(job)
    blocks = (encode_segment(plan, 0, k, encoder, cutoff=job.data.cutoff, packing=True) for k in range(plan.segments))
    tables = list(itertools.islice(deal(blocks, 0, 1, job.train.batch_size), steps))
    padding = pad_token(load_tokenizer(job.model.path))
    model = attach_method(load_causal_lm(job.model.path, dtype), job.method).to(dtype).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.train.learning_rate)
    tokens, times, total = [], [], 0
    for table in tables:
        batch = {name: torch.from_numpy(array) for name, array in collate(table, padding).items()}
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, job.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        total += sum(len(ids) for ids in table["input_ids"])
        tokens.append(total)
        times.append(time.perf_counter())
    return speed(tokens, times)


if __name__ == "__main__":
    main()
