"""What of stage ppo is refused, and what of it no other stage may have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.config.read import validate_job
from rayloom.errors import RequestError
from rayloom.stages.rules import check_stage
from rayloom.train.ppo_rules import check_ppo, steps_per_round, stream_rows

FUNCTION = Path(__file__).resolve().parents[2] / "jobs" / "ppo" / "sums.py"


def job(**parts: Any) -> JobConfig:
    document: dict[str, Any] = {
        "name": "ppo",
        "model": {"path": "somewhere"},
        "data": {"train": ["a.jsonl"], "cutoff": 64},
        "stage": {"type": "ppo", "prompts": 8},
        "rewards": {"sources": [{"type": "function", "path": f"{FUNCTION}:right"}]},
        "train": {"batch_size": 4},
    }
    for key, value in parts.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_job(Document("test", document))


def source(**fields: Any) -> dict[str, Any]:
    return {"sources": [fields]}


def test_a_job_that_can_be() -> None:
    check_ppo(job())
    check_ppo(job(stage={"advantage": "grpo"}, train={"max_steps": 16}))
    check_ppo(job(method={"type": "full"}, stage={"reference": "copy"}))
    check_ppo(job(method={"type": "full"}, stage={"kl": {"coefficient": 0.0}}))


def test_steps_of_a_round() -> None:
    ppo = job(stage={"prompts": 8, "samples": 3, "epochs": 2}, train={"batch_size": 2, "gradient_accumulation": 2})
    assert ppo.stage.type == "ppo"
    assert steps_per_round(ppo, ppo.stage) == 2 * 8 * 3 // 4
    assert stream_rows(ppo, 24) == 16  # two rounds of twelve steps
    assert stream_rows(ppo.model_copy(update={"train": ppo.train.with_workers(2)}), 12) == 16


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"rewards": None}, "rewards: stage ppo learns from rewards, and there are none"),
        ({"stage": {"prompts": 9}}, "stage.prompts: 9 prompts with 1 answer.* no multiple of the 4 of an optimizer"),
        ({"train": {"workers": 3, "batch_size": 1}}, r"stage.prompts: 8 prompts cannot be dealt evenly to 3 workers"),
        ({"train": {"max_steps": 6}}, "train.max_steps: 6 steps end within a round, which has 4 .*say 4 or 8"),
        ({"method": {"type": "oft"}}, "method.type: oft: stage ppo trains with lora or full"),
        ({"method": {"rank": 1024}}, "method.rank: 1024: the engines serve adapters up to rank 512"),
        ({"method": {"dora": True}}, "method.dora: the engines serve plain LoRA"),
        ({"method": {"init": "pissa"}}, "method.init: pissa changes the base"),
        ({"method": {"extra_modules": ["lm_head"]}}, "method.extra_modules: the engines serve adapters only"),
        ({"method": {"adapters": ["a", "b"]}, "stage": {"reference": "copy"}}, "method.adapters: merged adapters"),
        ({"model": {"quantization": "nf4"}}, "model.quantization: the engines load the model as it is"),
        ({"rollout": {"tensor_parallel": 2}, "train": {"device": "cpu"}}, "rollout.tensor_parallel: 2 is for GPUs"),
        (
            {"rollout": {"share_gpus": True, "gpu_memory": 0.5}, "train": {"device": "cpu"}},
            "rollout.share_gpus: on CPU engines and workers",
        ),
        (
            {"rollout": {"share_gpus": True, "gpu_memory": 0.5, "engines": 2}},
            "rollout.share_gpus: .*; say rollout.engines: 1",
        ),
        (
            {"rollout": {"share_gpus": True, "gpu_memory": 0.5}, "train": {"min_workers": 1, "global_batch_size": 8}},
            "rollout.share_gpus: .*leave train.min_workers out",
        ),
        ({"optimizer": {"type": "schedule_free_adamw"}, "train": {"scheduler": "constant"}}, "optimizer.type: sche"),
        (
            {"data": {"held_out": 0.1}, "train": {"eval_steps": 6, "best_metric": "eval_reward", "early_stopping": 1}},
            "train.eval_steps: 6: evaluations wait for the end of a round, which has 4 steps; .* such as 8",
        ),
        ({"model": {"train_from_scratch": True}, "method": {"type": "full"}}, "model.train_from_scratch: the engines"),
        (
            {"rewards": source(type="model", path="r"), "train": {"deepspeed": "zero3"}},
            r"rewards.sources\[0\].type: model: zero3 would not shard the reward model",
        ),
        ({"optimizer": {"type": "muon"}, "stage": {"value_learning_rate": 1e-3}}, "stage.value_learning_rate: opt"),
        ({"rewards": source(type="function", path="no.py:score")}, r"rewards.sources\[0\].path: no such file"),
        ({"rewards": source(type="format", pattern="(")}, r"rewards.sources\[0\].pattern: '\(' is no regular"),
        ({"rewards": source(type="length", free=9, longest=9)}, r"longest: 9 must be above free \(9\)"),
        (
            {"rewards": source(type="adapter", path="r"), "method": {"type": "full"}, "stage": {"reference": "copy"}},
            r"rewards.sources\[0\].type: adapter: with method.type full",
        ),
        (
            {"rewards": {"sources": [{"type": "unfinished"}, {"type": "unfinished"}]}},
            "rewards.sources: two are called 'unfinished'",
        ),
        ({"stage": {"type": "sft", "prompts": None}}, "rewards: they are for stage ppo, and this is sft"),
        ({"stage": {"type": "sft"}, "rewards": None, "rollout": {"engines": 2}}, "rollout: engines are for the stages"),
    ],
)
def test_what_is_refused(parts: dict[str, Any], message: str) -> None:
    if parts.get("stage", {}).get("type") == "sft":
        parts = {**parts, "stage": None}
        document = job().model_dump(mode="json", exclude_unset=True)
        document |= {key: value for key, value in parts.items() if key != "stage"} | {"stage": {"type": "sft"}}
        config = validate_job(Document("test", document))
    else:
        config = job(**parts)
    with pytest.raises(RequestError, match=message):
        check_ppo(config)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"tensor_parallel": 2}, "share_gpus: an engine shares the one GPU of a worker, and tensor_parallel is 2"),
        ({"gpu_memory": 0.85}, "share_gpus: gpu_memory 0.85 leaves too little"),
        ({"max_staleness": 1}, "share_gpus: the engines sleep .* and max_staleness 1 would have them answer meanwhile"),
    ],
)
def test_engines_that_sleep(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        job(rollout={"share_gpus": True, "gpu_memory": 0.5, **rollout})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"method": {"adapters": ["a"]}},
            "adapter_off: stage ppo would compare with the model as it was before",
        ),
        (
            {"method": {"type": "full"}},
            "adapter_off: stage ppo compares with the model with its adapter off, and there is none; say stage.refer",
        ),
        (
            {"stage": {"reference": "copy"}, "train": {"deepspeed": "zero3"}},
            "stage.reference: copy: zero3 would not shard the copy; use zero2, or adapter_off",
        ),
    ],
)
def test_references_that_cannot_be(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_stage(job(**parts))


def test_prompts_without_answers() -> None:
    prompts = {"path": "b.jsonl", "prompts_only": True}
    check_stage(job(data={"train": ["a.jsonl", prompts]}))
    document = {"name": "sft", "model": {"path": "somewhere"}, "data": {"train": ["a.jsonl", prompts]}}
    with pytest.raises(RequestError, match=r"data\.train\[1\]\.prompts_only: stage sft learns from the answers"):
        check_stage(validate_job(Document("test", document)))
    document["data"] = {"train": [{**prompts, "ranking": True}]}
    with pytest.raises(RequestError, match=r"`prompts_only` \(no answer\) and `ranking`"):
        validate_job(Document("test", document))


def test_references_that_can_be() -> None:
    check_stage(job())
    check_stage(job(method={"adapters": ["a"], "new_adapter": True}))
    check_stage(job(method={"type": "full"}, stage={"reference": "copy"}))
    check_stage(job(method={"type": "full"}, stage={"kl": {"coefficient": 0.0}}))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"stage": {"advantage": "grpo", "samples": 1}}, "samples 1: grpo compares several answers"),
        ({"stage": {"advantage": "rloo", "value_learning_rate": 1e-3}}, "value_learning_rate is for advantage gae"),
        ({"stage": {"advantage": "grpo", "kl": {"estimator": "k1"}}}, "kl.estimator k1 in the loss has a gradient"),
        ({"rollout": {"max_tokens": 0}}, "max_tokens"),
        ({"rollout": {"max_tokens": 4, "min_tokens": 5}}, "min_tokens 5 is more than max_tokens"),
        ({"rollout": {"temperature": 0.0}}, "temperature"),
        ({"rewards": {"sources": []}}, "rewards.sources"),
        ({"stage": {"kl": {"coefficient": -0.1}}}, "kl.coefficient"),
        ({"stage": {"kl": {"coefficient": 0.0, "target": 6.0}}}, "0 stays 0"),
    ],
)
def test_what_the_config_refuses(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        job(**parts)
