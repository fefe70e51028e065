"""Bytes of optimizer state, counted from the tensors, on a small model of 30 layers."""

from __future__ import annotations

import pytest
import torch
from tests.optimizer_cases import small_model, train_step

from rayloom.methods.optimizers.badam import BAdam
from rayloom.methods.optimizers.build import Setting, make_optimizer
from rayloom.methods.optimizers.config import AdamMiniConfig, ApolloConfig, BadamConfig, GaloreConfig
from rayloom.methods.optimizers.memory import state_bytes

SIZES = {"hidden_size": 32, "intermediate_size": 96}


def test_bytes_of_tensors_at_any_depth_each_once():
    shared = torch.zeros(10, dtype=torch.float64)
    state = {0: {"step": 3, "a": torch.zeros(4, dtype=torch.uint8)}, 1: [{"b": shared}, (shared, None)], "lr": 0.1}
    assert state_bytes(state) == 4 + 80
    assert state_bytes({}) == 0


def adamw_bytes() -> int:
    model = small_model(30, **SIZES)
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer, 0)
    size = state_bytes(optimizer.state_dict())
    weights = sum(weight.numel() for weight in model.parameters())
    assert size == pytest.approx(2 * 4 * weights, rel=1e-2)  # and a step count for each weight
    return size


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (GaloreConfig(rank=4), 0.40),
        (ApolloConfig(rank=1, scale_type="tensor"), 0.25),
        (BadamConfig(), 1 / 8),
        (BadamConfig(mode="ratio", update_ratio=0.05), 1 / 8),
        (AdamMiniConfig(), 0.55),
    ],
)
def test_share_of_the_state_of_adamw(config, most):
    model = small_model(30, **SIZES)
    optimizer = make_optimizer(config, Setting(model, 1e-3, 0.0, set(), 0))
    assert optimizer is not None
    if isinstance(optimizer, BAdam):
        optimizer.begin()
    train_step(model, optimizer, 0)
    assert 0 < state_bytes(optimizer.state_dict()) <= most * adamw_bytes()
    if isinstance(optimizer, BAdam) and config.mode == "layer":
        assert sum(weight.requires_grad for weight in model.parameters()) == 9  # of one layer
