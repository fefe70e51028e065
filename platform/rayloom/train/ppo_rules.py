"""What of stage ppo does not go together with the rest of the job: told from the job file and the files it names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import regex  # type: ignore[import-untyped]

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.config import FullConfig, LoraConfig
from rayloom.methods.optimizers.config import LibraryConfig
from rayloom.rollout.adapter_folders import adapter_rank_limit
from rayloom.rollout.config import RolloutConfig
from rayloom.rollout.rewards.combine import reward_names
from rayloom.rollout.rewards.config import (
    AdapterReward,
    FormatReward,
    FunctionReward,
    LengthReward,
    ModelReward,
    RewardsConfig,
)
from rayloom.rollout.rewards.function import split_path
from rayloom.stages.ppo_config import PpoConfig


def check_ppo(job: JobConfig) -> None:
    """Refuse what cannot be.

    Raises:
        RequestError: a fault of each kind that there is.
    """
    if not isinstance(job.stage, PpoConfig):
        faults = list(_left_over(job))
    else:
        faults = [*_rounds(job, job.stage), *engine_faults(job), *_head(job, job.stage)]
        if job.rewards is None:
            faults.append("rewards: stage ppo learns from rewards, and there are none; name at least one source")
        else:
            faults += _rewards(job, job.rewards)
    if faults:
        raise RequestError(*faults)


def steps_per_round(job: JobConfig, stage: PpoConfig) -> int:
    """Optimizer steps of a whole round."""
    return stage.epochs * stage.prompts * stage.answers // job.train.rows_per_step


def stream_rows(job: JobConfig, steps: int) -> int:
    """Rows of the stream that so many optimizer steps take; of stage ppo prompts, with those that are asked ahead."""
    rows = steps * job.train.rows_per_step
    if not isinstance(job.stage, PpoConfig):
        return rows
    learnt = -(-rows // (job.stage.epochs * job.stage.answers))
    return learnt + job.rollout.max_staleness * job.stage.prompts


def _left_over(job: JobConfig) -> Iterator[str]:
    """Parts that the stage does not read."""
    if job.rewards is not None:
        yield f"rewards: they are for stage ppo, and this is {job.stage.type}; leave them out"
    if job.rollout != RolloutConfig() and job.stage.type != "spin":
        yield f"rollout: engines are for the stages ppo and spin, and this is {job.stage.type}; leave it out"


def _rounds(job: JobConfig, stage: PpoConfig) -> Iterator[str]:
    train, answers = job.train, stage.prompts * stage.answers
    for workers in train.possible_workers:
        if stage.prompts % workers:
            yield f"stage.prompts: {stage.prompts} prompts cannot be dealt evenly to {workers} workers (train.workers)"
            return
    if answers % train.rows_per_step:
        yield (
            f"stage.prompts: {stage.prompts} prompts with {stage.answers} answer(s) each are {answers} answers, no "
            f"multiple of the {train.rows_per_step} of an optimizer step (workers times batch_size times "
            "gradient_accumulation, or global_batch_size)"
        )
    elif train.early_stopping and train.eval_steps and train.eval_steps % (steps := steps_per_round(job, stage)):
        yield (
            f"train.eval_steps: {train.eval_steps}: evaluations wait for the end of a round, which has {steps} steps; "
            f"with early_stopping say a multiple, such as {-(-train.eval_steps // steps) * steps}"
        )
    elif train.max_steps is not None and train.max_steps % (steps := steps_per_round(job, stage)):
        below = train.max_steps // steps * steps
        right = f"{below} or {below + steps}" if below else f"{steps}"
        yield (
            f"train.max_steps: {train.max_steps} steps end within a round, which has {steps} (stage.epochs times its "
            f"answers by those of a step); say {right}"
        )


def engine_faults(job: JobConfig) -> Iterator[str]:
    """What the engines could not serve."""
    method, model = job.method, job.model
    if isinstance(method, LoraConfig):
        try:
            adapter_rank_limit(method.rank)
        except RequestError as error:
            yield from error.messages
        if method.dora:
            yield "method.dora: the engines serve plain LoRA; leave it out"
        if method.init.startswith(("pissa", "olora", "loftq")):
            yield f"method.init: {method.init} changes the base, and the engines have the model's own; use default"
        if method.merged:
            yield (
                "method.adapters: merged adapters change the base, and the engines have the model's own; name one "
                "adapter, which goes on, or as model.path a model into which they were merged"
            )
        if method.extra_modules:
            yield "method.extra_modules: the engines serve adapters only; leave it out, or use method.type: full"
    elif not isinstance(method, FullConfig):
        yield f"method.type: {method.type}: stage ppo trains with lora or full, whose weights the engines can take"
    for key in (
        "quantization", "rope_scaling", "add_tokens", "add_special_tokens", "train_from_scratch", "shifted_attention"
    ):  # fmt: skip
        if getattr(model, key):
            yield f"model.{key}: the engines load the model as it is; leave it out in stage {job.stage.type}"
    if job.rollout.share_gpus and job.stage.type == "ppo":
        yield from _shared_gpus(job)
    if job.train.device == "cpu" and job.rollout.tensor_parallel > 1:
        yield f"rollout.tensor_parallel: {job.rollout.tensor_parallel} is for GPUs; on CPU it is 1"


def _shared_gpus(job: JobConfig) -> Iterator[str]:
    train, engines = job.train, job.rollout.engines
    if train.device == "cpu":
        yield "rollout.share_gpus: on CPU engines and workers share the cores anyway; leave it out"
    elif train.min_workers is not None:
        yield "rollout.share_gpus: each worker shares its GPU with an engine; leave train.min_workers out"
    elif engines != train.workers:
        yield f"rollout.share_gpus: each worker shares its GPU with an engine; say rollout.engines: {train.workers}"


def _head(job: JobConfig, stage: PpoConfig) -> Iterator[str]:
    if job.optimizer.type.startswith("schedule_free"):
        yield (
            f"optimizer.type: {job.optimizer.type} evaluates other weights than it trains, and engines would answer "
            "with either; take another optimizer in stage ppo"
        )
    if stage.value_learning_rate is not None and not isinstance(job.optimizer, LibraryConfig):
        yield f"stage.value_learning_rate: optimizer {job.optimizer.type} has one rate for all; leave it out"


def _rewards(job: JobConfig, rewards: RewardsConfig) -> Iterator[str]:
    twice = [name for name, count in Counter(reward_names(rewards)).items() if count > 1]
    if twice:
        yield f"rewards.sources: two are called {twice[0]!r}; give each a `name` of its own"
    for number, source in enumerate(rewards.sources):
        key = f"rewards.sources[{number}]"
        if isinstance(source, FunctionReward):
            try:
                split_path(source.path, f"{key}.path")
            except RequestError as error:
                yield from error.messages
        elif isinstance(source, FormatReward):
            try:
                regex.compile(source.pattern)
            except regex.error as error:
                yield f"{key}.pattern: {source.pattern!r} is no regular expression: {error}"
        elif isinstance(source, LengthReward) and source.longest <= source.free:
            yield f"{key}.longest: {source.longest} must be above free ({source.free})"
        elif isinstance(source, ModelReward) and job.train.deepspeed == "zero3":
            yield f"{key}.type: model: zero3 would not shard the reward model; use zero2, or type: adapter"
        elif isinstance(source, AdapterReward) and not isinstance(job.method, LoraConfig):
            yield f"{key}.type: adapter: with method.type {job.method.type} the base itself changes; use type: model"
