"""What a worker of stage ppo needs besides the model that trains: engines, rewards, models that give rewards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rayloom.config.job import JobConfig
from rayloom.models.config import ModelConfig
from rayloom.models.load import load_causal_lm
from rayloom.models.precision import Precision
from rayloom.models.value_head import attach_critic
from rayloom.rollout.fleet import FleetClient
from rayloom.rollout.rewards.combine import RewardSum, reward_names
from rayloom.rollout.rewards.config import AdapterReward, ModelReward
from rayloom.stages.ppo_config import PpoConfig
from rayloom.train.batch import TrainedPositions
from rayloom.train.policy_sync import PolicySync
from rayloom.train.ppo_rounds import RankFleet
from rayloom.train.reward_models import AdapterRewardModel, OwnRewardModel, RewardModel

RewardModels = Callable[[TrainedPositions], dict[str, RewardModel]]
"""The models that give rewards, by the names of these, once the policy's positions can be chosen."""


def prepare_model(job: JobConfig, model: Any) -> None:
    """Add to the policy what trains or judges beside it: the critic, and adapters that give rewards."""
    assert isinstance(job.stage, PpoConfig)
    if job.stage.has_value_head:
        attach_critic(model)
    adapters = _named(job, AdapterReward)
    for name, source in adapters.items():
        model.load_adapter(source.path, adapter_name=_adapter_name(name), is_trainable=False)
    if adapters:
        model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])


def trainer_parts(
    job: JobConfig,
    client: FleetClient,
    model: Any,
    dtype: torch.dtype,
    precision: Precision,
    *,
    rank: int,
    ranks: int,
) -> dict[str, Any]:
    """What `PpoTrainer` takes besides what every trainer does."""
    stage, rollout = job.stage, job.rollout
    assert isinstance(stage, PpoConfig)
    assert job.rewards is not None  # `check_ppo` has seen to that
    engines = precision if rollout.precision == "auto" else rollout.precision  # `auto` may be finer, not coarser
    return {
        "fleet": RankFleet(client, rank, ranks, stage.answers, rollout.sampling(), job.train.seed),
        "sync": PolicySync(client, {precision, engines}, is_first_rank=rank == 0, shares_gpus=rollout.share_gpus),
        "rewards": RewardSum(job.rewards),
        "reward_models": partial(_reward_models, job, model, dtype),
        "per_rank": stage.prompts // ranks,
        "rollout": rollout,
    }


def _reward_models(
    job: JobConfig, policy: Any, dtype: torch.dtype, positions: TrainedPositions
) -> dict[str, RewardModel]:
    models: dict[str, RewardModel] = {}
    for name, source in _named(job, AdapterReward).items():
        models[name] = AdapterRewardModel(policy, _adapter_name(name), positions, Path(source.path))
    for name, source in _named(job, ModelReward).items():
        judge = load_causal_lm(ModelConfig(path=source.path), dtype)
        models[name] = OwnRewardModel(judge, TrainedPositions(judge), Path(source.path))
    return models


def _named(job: JobConfig, kind: type[Any]) -> dict[str, Any]:
    assert job.rewards is not None  # `check_ppo` has seen to that
    pairs = zip(reward_names(job.rewards), job.rewards.sources, strict=True)
    return {name: source for name, source in pairs if isinstance(source, kind)}


def _adapter_name(reward: str) -> str:
    """PEFT's name of a reward's adapter; module names have no dots in them."""
    return "reward_" + reward.replace(".", "_").replace("-", "_")
