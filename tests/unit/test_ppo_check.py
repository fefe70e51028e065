"""Reward models, lengths and heads that do not fit the policy are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pytest
from tests.unit.test_ppo_rules import FUNCTION, job
from transformers import AutoModelForCausalLM, LlamaConfig

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.models.value_head import save_value_head, value_head_for
from rayloom.train.engines import engines_of
from rayloom.train.ppo_check import check_lengths_and_heads, check_reward_functions, check_reward_models


@pytest.fixture
def reward_folder(tiny_model: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    (tmp_path / "reward").mkdir()
    save_value_head(value_head_for(model), tmp_path / "reward")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def with_reward(tiny_model: Path, kind: str, folder: Path) -> JobConfig:
    return job(model={"path": str(tiny_model)}, rewards={"sources": [{"type": kind, "path": str(folder)}]})


def test_a_reward_adapter_of_this_base(tiny_model: Path, reward_folder: Path) -> None:
    check_reward_models(with_reward(tiny_model, "adapter", reward_folder))


def test_a_reward_adapter_of_another_base(tiny_model: Path, reward_folder: Path) -> None:
    file = reward_folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "another/model"}))
    with pytest.raises(RequestError, match=r"rewards.sources\[0\].path: .* was trained on another/model"):
        check_reward_models(with_reward(tiny_model, "adapter", reward_folder))


def test_a_reward_function_that_is_not_there() -> None:
    check_reward_functions(job())
    with pytest.raises(RequestError, match=r"rewards.sources\[0\].path: .*it has no function 'wrong'; it has .*right"):
        check_reward_functions(job(rewards={"sources": [{"type": "function", "path": f"{FUNCTION}:wrong"}]}))


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_folder_without_a_head(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(RequestError, match=r"rewards.sources\[0\].path: .* has no value_head.safetensors"):
        check_reward_models(with_reward(tiny_model, kind, tmp_path))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": {"cutoff": 2000}, "rollout": {"max_tokens": 100}}, "pass the model's length of 2048"),
        (
            {"rollout": {"tensor_parallel": 3}},
            "parallel: 3 does not divide the model's 2 heads; it may be 1, 2",
        ),
    ],
)
def test_lengths_and_heads(tiny_model: Path, parts: dict[str, Any], message: str) -> None:
    check_lengths_and_heads(job(model={"path": str(tiny_model)}))
    with pytest.raises(RequestError, match=message):
        check_lengths_and_heads(job(model={"path": str(tiny_model)}, **parts))


@pytest.mark.parametrize(("parallel", "is_right"), [(1, True), (2, True), (4, True), (3, False), (8, False)])
def test_heads_for_keys_and_values_are_shared_too(tmp_path: Path, parallel: int, is_right: bool) -> None:
    config = LlamaConfig(num_attention_heads=12, num_key_value_heads=2, hidden_size=48)
    config.save_pretrained(tmp_path)
    asked = job(model={"path": str(tmp_path)}, rollout={"tensor_parallel": parallel})
    if is_right:
        check_lengths_and_heads(asked)
    else:
        with pytest.raises(RequestError, match=r"12 heads \(2 for keys and values\); it may be 1, 2, 4, 6, 12"):
            check_lengths_and_heads(asked)


def test_an_adapter_is_no_reward_model_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("value_head.safetensors", "adapter_config.json"):
        (tmp_path / name).touch()
    with pytest.raises(RequestError, match=r"rewards.sources\[0\].path: .* holds an adapter; say type: adapter"):
        check_reward_models(with_reward(tiny_model, "model", tmp_path))


def test_tensor_parallel_engines_on_a_cluster_without_gpus() -> None:
    asked = job(rollout={"tensor_parallel": 2})  # `train.device: auto`: before the cluster is known, it may have some
    with pytest.raises(RequestError, match=r"rollout.tensor_parallel: 2 is for GPUs, and the cluster has none"):
        engines_of(asked, "cpu", "fp32", pa.table({"input_ids": [[1]]})).__enter__()
