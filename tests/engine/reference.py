"""What transformers and PEFT say about the tiny model: the independent implementation that the engines are compared
with, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from rayloom.rollout.adapter_folders import pack
from rayloom.rollout.digest import digest_of
from rayloom.rollout.request import Probe, Prompt, Weights, probe_prompt

PROBE = probe_prompt(tuple(range(10, 30)))
TOLERANCE = 1e-3


def base(folder: Path) -> Any:
    """The model, in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(folder: Path, seed: int, rank: int = 4) -> PeftModel:
    """The model with an adapter of random, not small weights on all its linear layers."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base(folder), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def noisy(folder: Path, seed: int) -> Any:
    """The model with all weights changed a little."""
    model = base(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """As PEFT saves them."""
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def adapter_weights(model: PeftModel, version: int) -> tuple[Weights, dict[str, torch.Tensor]]:
    """What a trainer would send, and the tensors that it refers to."""
    tensors = adapter_tensors(model)
    config = model.peft_config["default"].to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    config |= {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    return Weights(version, "adapter", None, len(tensors), digest_of(tensors), config), tensors


def full_weights(model: Any, version: int) -> tuple[Weights, dict[str, torch.Tensor]]:
    """All weights of a model, as transformers names them."""
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Weights(version, "full", None, len(tensors), digest_of(tensors), None), tensors


def referring(weights: Weights, tensors: dict[str, torch.Tensor]) -> Weights:
    """Those of an adapter with its file in Ray's object store."""
    return replace(weights, tensors=ray.put(pack(tensors)))


def prompts(count: int, samples: int = 1) -> list[Prompt]:
    """Prompts of different length; ids that are no special tokens."""
    return [
        Prompt(
            number, tuple(3 + (7 * number + 5 * place) % 300 for place in range(3 + 11 * number % 70)), number, samples
        )
        for number in range(count)
    ]


@torch.no_grad()
def greedy(model: Any, token_ids: Sequence[int], most: int, end: Sequence[int]) -> tuple[int, ...]:
    """The likeliest answer, token after token without a cache."""
    ids = list(token_ids)
    for _ in range(most):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in end:
            break
    return tuple(ids[len(token_ids) :])


@torch.no_grad()
def log_probs(
    model: Any, token_ids: Sequence[int], answer: Sequence[int], temperature: float = 1.0
) -> tuple[float, ...]:
    """Of each token of an answer."""
    logits = model(torch.tensor([[*token_ids, *answer]])).logits[0, len(token_ids) - 1 : -1].double() / temperature
    return tuple(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist())


@torch.no_grad()
def next_log_probs(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """(vocab,) of what comes behind a text."""
    found: torch.Tensor = model(torch.tensor([list(token_ids)])).logits[0, -1].double().log_softmax(-1)
    return found


def agrees(model: Any, probe: Probe) -> bool:
    """What a trainer asks after each sync: does the engine compute with my weights?"""
    expected = next_log_probs(model, PROBE)[list(probe.token_ids)].tolist()
    return all(abs(one - other) < TOLERANCE for one, other in zip(expected, probe.log_probs, strict=True))
