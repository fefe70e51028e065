"""A reward adapter beside the policy's: its scores are those of the reward model by itself, one base for both, and the
policy is as it was."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.unit.test_experience import answers
from transformers import AutoModelForCausalLM

from rayloom.methods.attach import attach_method
from rayloom.methods.config import LoraConfig
from rayloom.models.value_head import attach_critic, save_value_head, value_head_for
from rayloom.train.batch import TrainedPositions, model_inputs
from rayloom.train.ppo_answers import make_answer_batch
from rayloom.train.reward_models import AdapterRewardModel, OwnRewardModel


@pytest.fixture
def reward_folder(tiny_model: Path, tmp_path: Path) -> Path:
    """What a job of stage reward saves: an adapter that changes something, and a head."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    wrapped.save_pretrained(tmp_path / "reward")
    save_value_head(value_head_for(model), tmp_path / "reward")
    return tmp_path / "reward"


def alone(tiny_model: Path, folder: Path) -> list[float]:
    """The scores, each answer by itself, by PEFT and a head of our own reading."""
    from safetensors.torch import load_file

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder).eval()
    head = load_file(folder / "value_head.safetensors")
    found = []
    for answer in answers():
        ids = torch.tensor([[*answer.asked.token_ids, *answer.rollout.token_ids]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[-1][0, -1].double()
        value = states @ head["v_head.summary.weight"][0].double() + head["v_head.summary.bias"].double()
        found.append(float(value))
    return found


def policy_with_reward(tiny_model: Path, folder: Path) -> tuple[Any, TrainedPositions, AdapterRewardModel]:
    model = attach_method(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(rank=4))
    attach_critic(model)
    model.load_adapter(str(folder), adapter_name="reward_adapter", is_trainable=False)
    positions = TrainedPositions(model)
    judge = AdapterRewardModel(model, "reward_adapter", positions, folder)
    return model, positions, judge


@pytest.mark.parametrize("packed", [False, True])
def test_scores_are_those_of_the_reward_model_alone(tiny_model: Path, reward_folder: Path, packed: bool) -> None:
    model, positions, judge = policy_with_reward(tiny_model, reward_folder)
    batch = make_answer_batch(answers(), pad_token=0, packed=packed)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    positions.choose(batch["positions"])
    before = model(**model_inputs(batch)).logits.detach()
    scores = judge.score(batch)
    assert scores.tolist() == pytest.approx(alone(tiny_model, reward_folder), abs=1e-5)
    positions.choose(batch["positions"])
    assert torch.equal(model(**model_inputs(batch)).logits, before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert all("reward" not in name for name in trained)


@pytest.mark.parametrize("packed", [False, True])
def test_a_whole_model_gives_the_same(tiny_model: Path, reward_folder: Path, packed: bool) -> None:
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), reward_folder)
    merged = loaded.merge_and_unload()
    judge = OwnRewardModel(merged, TrainedPositions(merged), reward_folder)
    batch = make_answer_batch(answers(), pad_token=0, packed=packed)
    scores = judge.score(batch)
    assert scores.tolist() == pytest.approx(alone(tiny_model, reward_folder), abs=1e-4)


def test_there_is_one_copy_of_the_base(tiny_model: Path, reward_folder: Path) -> None:
    """For policy, critic, reference (the adapter off) and reward."""
    gc.collect()
    base = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    gc.collect()
    count = lambda: sum(type(thing).__name__ == "LlamaModel" for thing in gc.get_objects())  # noqa: E731
    there = count()
    model, _, judge = policy_with_reward(tiny_model, reward_folder)
    assert count() == there + 1
    own = [p for name, p in model.named_parameters() if "lora_" not in name and "v_head" not in name]
    assert sum(p.numel() for p in own) == base
    assert judge.model is model
