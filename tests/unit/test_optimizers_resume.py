"""Stopped at a step and resumed from files: bit for bit what an uninterrupted run gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.optimizer_cases import CASES, batch, config_of, optimizer_of, small_model, train_step

from rayloom.train.optimizer_trainer import OptimizerTrainer

IN_BF16 = ["adam-mini", "badam", "badam-ratio", "galore"]
STOP, STEPS = 3, 7  # within a period of two steps, and over several


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float32) for case in CASES), *((case, torch.bfloat16) for case in IN_BF16)]
)
def test_stop_and_resume_by_files(case, dtype, tmp_path):
    whole = small_model(dtype=dtype)
    start = {name: weight.detach().clone() for name, weight in whole.named_parameters()}
    optimizer = optimizer_of(case, whole)
    for step in range(STEPS):
        train_step(whole, optimizer, step)

    first = small_model(dtype=dtype)
    optimizer = optimizer_of(case, first)
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does when it wraps an optimizer
    for step in range(STOP):
        train_step(first, optimizer, step)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = small_model(dtype=dtype, seed=1)
    second.load_state_dict(saved["model"])
    optimizer = optimizer_of(case, second)
    optimizer.load_state_dict(saved["optimizer"])
    for step in range(STOP, STEPS):
        train_step(second, optimizer, step)

    for (name, one), other in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert any(not torch.equal(start[name], weight) for name, weight in whole.named_parameters())


class Trainer(OptimizerTrainer):
    """With data and a schedule of transformers' own."""

    create_scheduler = transformers.Trainer.create_scheduler

    def __init__(self, case: str, **kw: Any) -> None:
        super().__init__(**kw)
        self._optimizer_config = config_of(case)


@pytest.mark.parametrize("case", ["galore-8bit", "badam", "apollo"])
def test_stop_and_resume_by_transformers(case, tmp_path):
    rows = [{name: tensor[0] for name, tensor in batch(number).items()} for number in range(24)]

    def trainer(folder: str, seed: int = 0) -> Trainer:
        args = transformers.TrainingArguments(
            tmp_path / folder,
            max_steps=6,
            per_device_train_batch_size=4,
            save_steps=3,
            neftune_noise_alpha=5.0,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(case, model=small_model(seed=seed), args=args, train_dataset=rows)

    whole, resumed = trainer("whole"), trainer("resumed", seed=1)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other[1]), name
