"""DeepSpeed drops a step whose gradient is no number, and a job hears of it: a real engine, transformers' Trainer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, torch, transformers
from rayloom.train.guard import gradient_guards

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x):
        # the root's slope at 0 is infinite, its value is not
        return {"loss": ((self.weight * x).abs().sqrt()).sum()}

def stop():
    raise SystemExit(f"told at step {trainer.state.global_step + 1}")

rows = [{"x": torch.ones(4)}, {"x": torch.ones(4)}, {"x": torch.zeros(4)}, {"x": torch.ones(4)}]
if sys.argv[2] == "none":
    rows[2]["x"] = torch.ones(4)
arguments = transformers.TrainingArguments(
    sys.argv[3], deepspeed={"zero_optimization": {"stage": int(sys.argv[1])}, "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True}, max_steps=4, use_cpu=True, report_to=[], per_device_train_batch_size=1,
    save_strategy="no", max_grad_norm=1.0, remove_unused_columns=False, disable_tqdm=True,
    train_sampling_strategy="sequential", logging_steps=1, optim="adamw_torch",
)
trainer = transformers.Trainer(Model(), arguments, train_dataset=rows)
class Guard:
    take_bad_gradients = staticmethod(stop)

for guard in gradient_guards(arguments, trainer, Guard):
    trainer.add_callback(guard)
trainer.train()
print("all steps made")
"""


def _run(stage: int, rows: str, folder: Path) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(stage), rows, str(folder)],
        env={**os.environ, **one, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return found.stdout + found.stderr


@pytest.mark.parametrize("stage", [2, 3])
def test_a_dropped_step_is_told_at_once(stage: int, tmp_path: Path) -> None:
    text = _run(stage, "infinite", tmp_path)
    assert "told at step 3" in text, text[-3000:]
    assert "all steps made" not in text


def test_good_steps_are_not(tmp_path: Path) -> None:
    text = _run(2, "none", tmp_path)
    assert "all steps made" in text, text[-3000:]
    assert "told" not in text
