"""Optimizers of every kind that Rayloom makes itself, small enough for small models, and such a model."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import LlamaConfig, LlamaForCausalLM

from rayloom.methods.optimizers.build import Setting, make_optimizer
from rayloom.methods.optimizers.config import OptimizerConfig

CASES: dict[str, dict[str, Any]] = {
    "galore": {"type": "galore_adamw", "rank": 4, "update_proj_gap": 2},
    "galore-8bit": {"type": "galore_adamw_8bit", "rank": 4, "update_proj_gap": 2},
    "galore-adafactor": {"type": "galore_adafactor", "rank": 4, "update_proj_gap": 2, "proj_type": "full"},
    "galore-layerwise": {"type": "galore_adamw_layerwise", "rank": 4, "update_proj_gap": 2},
    "apollo": {"type": "apollo_adamw", "rank": 4, "update_proj_gap": 2},
    "apollo-mini": {"type": "apollo_adamw", "rank": 1, "update_proj_gap": 2, "scale": 128.0, "scale_type": "tensor"},
    "badam": {"type": "badam", "switch_interval": 2, "switch_mode": "random", "outside_layers": True},
    "badam-ratio": {"type": "badam", "mode": "ratio", "switch_interval": 2, "mask_mode": "scatter"},
    "muon": {"type": "muon"},
    "adam-mini": {"type": "adam_mini"},
}


def config_of(case: str) -> Any:
    """The config of a case."""
    return TypeAdapter(OptimizerConfig).validate_python(CASES[case])


def small_model(layers: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> LlamaForCausalLM:
    """A random Llama with layers of 16 by 16, the same for the same seed."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32, **sizes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, use_cache=False, **shape)).to(dtype)


def optimizer_of(case: str, model: Any, learning_rate: float = 1e-2) -> torch.optim.Optimizer:
    """The optimizer of a case, with weight decay on what is no norm."""
    decayed = {name for name, _ in model.named_parameters() if "norm" not in name}
    optimizer = make_optimizer(config_of(case), Setting(model, learning_rate, 0.1, decayed, 3))
    assert optimizer is not None
    return optimizer


def batch(step: int, rank: int = 0) -> dict[str, torch.Tensor]:
    """Four rows of eight tokens."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    ids = torch.randint(0, 32, (4, 8), generator=generator)
    return {"input_ids": ids, "labels": ids}


def train_step(model: Any, optimizer: torch.optim.Optimizer, step: int, rank: int = 0) -> None:
    """One step on that step's batch, at a rate that falls."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 / (1 + step)
    model(**batch(step, rank)).loss.backward()
    optimizer.step()
    model.zero_grad()
