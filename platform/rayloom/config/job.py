"""`JobConfig`: the whole job file, composed of the parts that each room owns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from rayloom.config.part import ConfigPart
from rayloom.data.config import DataConfig
from rayloom.methods.config import LoraConfig, MethodConfig
from rayloom.methods.optimizers.config import AdamWConfig, OptimizerConfig, refusals
from rayloom.models.config import ModelConfig
from rayloom.remote import is_remote
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.rewards.config import RewardsConfig
from rayloom.search.config import SearchConfig
from rayloom.stages.config import SftConfig, StageConfig
from rayloom.train.config import TrainConfig


class JobConfig(ConfigPart):
    """One fine-tuning job."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; with `output_dir` it is the run directory. Letters, digits, dot, dash and underscore."""
    output_dir: str = Field(default="runs", min_length=1)
    """Folder that holds run directories; on several machines it must be one that all of them share. Or an address that
    fsspec knows, such as `s3://bucket/runs`: then nothing that a run leaves is on the machine itself."""
    resume: bool = False
    """Go on from the last checkpoint in the run directory."""
    overwrite: bool = False
    """Delete what an earlier run of this name left, and start anew."""
    model: ModelConfig
    method: MethodConfig = LoraConfig()
    """Which weights train, told by its `type`."""
    data: DataConfig
    stage: StageConfig = SftConfig()
    """The training approach, told by its `type`."""
    rewards: RewardsConfig | None = None
    """For stage ppo: what an answer is worth."""
    rollout: RolloutConfig = RolloutConfig()
    """For stage ppo: the engines that answer prompts."""
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    """What turns gradients into steps, told by its `type`; `train` has the learning rate and the weight decay."""
    search: SearchConfig | None = None
    """For `rayloom tune`: trials of this job with other values."""

    @field_validator("method", mode="before")
    @classmethod
    def _lora_unless_said(cls, value: Any) -> Any:
        return {"type": "lora", **value} if isinstance(value, dict) else value

    @field_validator("stage", mode="before")
    @classmethod
    def _sft_unless_said(cls, value: Any) -> Any:
        return {"type": "sft", **value} if isinstance(value, dict) else value

    @field_validator("optimizer", mode="before")
    @classmethod
    def _adamw_unless_said(cls, value: Any) -> Any:
        return {"type": AdamWConfig().type, **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _optimizer_fits(self) -> JobConfig:
        if faults := refusals(self.optimizer, self.train, self.method):
            raise ValueError("; ".join(f"optimizer.type: {fault}" for fault in faults))
        return self

    @model_validator(mode="after")
    def _lengths_are_grouped_once(self) -> JobConfig:
        if self.packs and self.data.group_by_length:
            raise ValueError(
                "data.group_by_length: packed rows are full, whatever the examples' lengths; leave it out, or set "
                "data.packing: false"
            )
        return self

    @property
    def packs(self) -> bool:
        """Whether several examples share a row; two answers to one prompt are a row of their own."""
        return self.data.packing and self.stage.rows in ("texts", "conversations")

    @property
    def groups_by_length(self) -> bool:
        """Whether rows of one example each have neighbours of nearly their length."""
        wish = self.data.group_by_length
        return self.stage.rows in ("pairs", "judgements") if wish is None else wish

    @property
    def output_folder(self) -> Path | None:
        """`output_dir`, absolute; None where it is an address."""
        return None if is_remote(self.output_dir) else Path(self.output_dir).expanduser().absolute()

    @property
    def run_dir(self) -> Path:
        """The run directory, absolute. Only where `output_dir` is no address."""
        assert self.output_folder is not None
        return self.output_folder / self.name

    @property
    def run_place(self) -> str:
        """The run directory's path or address."""
        return f"{self.output_dir.rstrip('/')}/{self.name}" if self.output_folder is None else str(self.run_dir)
