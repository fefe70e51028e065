"""The `train` part of the job file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayloom.config.part import ConfigPart, Number, Whole


class TrainConfig(ConfigPart):
    """How long, how fast and on what the job trains."""

    workers: Whole = Field(default=1, ge=1)
    """Ray Train workers, one GPU each where there are GPUs; at least 1."""
    min_workers: Whole | None = Field(default=None, ge=1)
    """The fewest workers to train with, where the cluster has no room for `workers`; at least 1. The job begins with
    what fits, goes on with fewer when it loses a machine, and with more when there is room. Needs `global_batch_size`,
    so that a step takes the same rows whatever their number. Left out: `workers`, no fewer."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What a worker computes on. `auto`: GPUs when the cluster has any."""
    cpus_per_worker: Number = Field(default=1.0, gt=0)
    """CPUs that Ray reserves for each worker; above 0. On CPU a worker computes with its share of its node's cores."""
    batch_size: Whole = Field(default=4, ge=1)
    """Rows in one worker's batch; at least 1."""
    gradient_accumulation: Whole = Field(default=1, ge=1)
    """Batches of each worker in one optimizer step; at least 1."""
    global_batch_size: Whole | None = Field(default=None, ge=1)
    """Rows in one optimizer step, of all workers together: a multiple of workers times `batch_size`, from which
    `gradient_accumulation` follows. A step takes the same rows whatever the number of workers. Left out: workers times
    `batch_size` times `gradient_accumulation`."""
    learning_rate: Number = Field(default=1e-4, gt=0)
    """Peak learning rate; above 0."""
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: Number = Field(default=0.03, ge=0, lt=1)
    """Share of the training over which the learning rate rises from 0; 0 to below 1."""
    weight_decay: Number = Field(default=0.0, ge=0)
    """Weight decay, decoupled from the gradient where the optimizer decouples it (AdamW); not on norms and biases."""
    max_grad_norm: Number | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global L2 norm; above 0. `null`: they are left as they are."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What happens at a loss or a gradient that is no number, or a loss above `max_loss`: `stop` ends the job and names
    the rows; `skip` makes no step with it, says which it was, and goes on (`result.json` says how often), for
    `deepspeed: none` and optimizers that do not step within the backward pass. In fp16 it is the loss's scale that
    answers to gradients that are no numbers: it goes down, and no step is made; 40 on end are bad, too."""
    max_loss: Number | None = Field(default=None, gt=0)
    """The largest mean loss of a step, above 0. Left out: ten times that of the training's first step, and no less than
    20 (in stages `pretrain` and `sft`) or 100; in stage `ppo` any, as it has the scale of the rewards."""
    collective_timeout: Number = Field(default=600.0, gt=0)
    """Seconds that a worker waits for the others, above 0. Then it gives up, and the job goes on from its last
    checkpoint (`max_failures`)."""
    epochs: Whole = Field(default=1, ge=1)
    """Passes over the mixed stream; at least 1."""
    max_steps: Whole | None = Field(default=None, ge=1)
    """Optimizer steps to make, whatever `epochs` says; the stream goes on into further epochs as needed."""
    deepspeed: Literal["none", "zero1", "zero2", "zero3"] = "none"
    """What DeepSpeed shards over the workers: `zero1` optimizer state, `zero2` also gradients, `zero3` also weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in the memory of the host: `optimizer`, its state and step; `all`, under `zero3` also the
    weights."""
    deepspeed_json: str | None = Field(default=None, min_length=1)
    """A DeepSpeed JSON of your own, which has the last word over what `deepspeed` and `offload` say; its stage must be
    that of `deepspeed`. Batch sizes, precision, clipping, optimizer and schedule are the job's: leave them out, or
    `auto`."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "pure_bf16"] = "auto"
    """What the model computes in. `auto`: bf16 where the device computes it, else fp16 on a GPU, else fp32. In bf16 and
    fp16 the weights that train stand in fp32; in `pure_bf16` these, their gradients and the optimizer are bf16 too."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=[], max_length=3)
    """Where else the metrics go: `tensorboard`, files in the run directory; `wandb` and `mlflow`, which read their own
    environment variables (WANDB_MODE, MLFLOW_TRACKING_URI ...). Needs the extras of these names."""
    logging_steps: Whole = Field(default=10, ge=1)
    """Optimizer steps between two rows of metrics. A row ends at each evaluation and checkpoint, too."""
    eval_steps: Whole | None = Field(default=None, ge=1)
    """Optimizer steps between two evaluations, where `data.eval` or `data.held_out` says on what. Left out: only at
    the end."""
    best_metric: str | None = Field(default=None, min_length=1)
    """What tells the best evaluation: `eval_loss`, `eval_perplexity`, `eval_accuracy` or `eval_rewards/margin`, each
    also of one set (`eval_loss/SET`). An evaluation that is the best so far is followed by a checkpoint, which is kept,
    and `model/` is what the best one was made with. Needs `eval_steps`. Left out: the model as it is at the end."""
    early_stopping: Whole | None = Field(default=None, ge=1)
    """With `best_metric`: end after so many evaluations on end that are no better than the best; at least 1."""
    save_steps: Whole = Field(default=500, ge=1)
    """Optimizer steps between two checkpoints. One more is written at the end and when the job is told to stop."""
    keep_checkpoints: Whole = Field(default=2, ge=1)
    """How many checkpoints stay: the newest, or with `best_metric` the newest one and the best ones."""
    max_failures: Whole = Field(default=3, ge=0)
    """How often the job goes on from its last checkpoint by itself, after a worker, a machine or Ray Train's controller
    has died; 0 or above. An error of the training itself ends the job at once."""
    seed: Whole = Field(default=42, ge=0)
    """Seed of the data order and of every random number."""
    wait_for_resources: Number = Field(default=45.0, ge=0, le=86400)
    """Seconds to wait for busy resources before the job is given up. What the cluster has not got at all is refused
    at once."""

    @property
    def possible_workers(self) -> list[int]:
        """Numbers of workers that it may train with, the largest first."""
        numbers = range(self.workers, (self.min_workers or self.workers) - 1, -1)
        return [n for n in numbers if not (self.global_batch_size or 0) % (n * self.batch_size)]

    def with_workers(self, workers: int) -> TrainConfig:
        """The same with another number of workers; of `global_batch_size` another accumulation follows."""
        own = self.gradient_accumulation if self.global_batch_size is None else 1
        return self.model_copy(update={"workers": workers, "gradient_accumulation": own})

    @property
    def accumulation(self) -> int:
        """Batches of each worker in one optimizer step."""
        if self.global_batch_size is None:
            return self.gradient_accumulation
        return self.global_batch_size // (self.workers * self.batch_size)

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step, of all workers together."""
        return self.workers * self.batch_size * self.accumulation

    @model_validator(mode="after")
    def _global_batch_divides(self) -> TrainConfig:
        together, total = self.workers * self.batch_size, self.global_batch_size
        if total is None:
            return self
        if total % together:
            possible = [size for size in range(1, total + 1) if total % (self.workers * size) == 0]
            right = f"batch_size may be {', '.join(map(str, possible))}" if possible else "no batch_size makes it fit"
            raise ValueError(
                f"global_batch_size {total} is no multiple of workers ({self.workers}) times batch_size "
                f"({self.batch_size}); with {self.workers} workers {right}"
            )
        if self.gradient_accumulation not in (1, self.accumulation):
            raise ValueError(
                f"gradient_accumulation {self.gradient_accumulation} does not go with global_batch_size {total}, of "
                f"which {self.accumulation} follows; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_is_used(self) -> TrainConfig:
        if self.deepspeed == "none" and self.offload != "none":
            raise ValueError(f"offload {self.offload} is DeepSpeed's; say deepspeed: zero2 or zero3")
        if self.deepspeed == "none" and self.deepspeed_json is not None:
            raise ValueError("deepspeed_json needs deepspeed to say which stage it is: zero1, zero2 or zero3")
        if self.deepspeed != "none" and self.on_bad_step == "skip":
            raise ValueError("on_bad_step skip: DeepSpeed makes its steps itself; use deepspeed: none, or stop")
        if self.offload == "all" and self.deepspeed != "zero3":
            raise ValueError(
                f"offload all: {self.deepspeed} does not shard the weights; use zero3, or offload optimizer"
            )
        return self

    @model_validator(mode="after")
    def _best_is_told(self) -> TrainConfig:
        if self.best_metric is not None and self.eval_steps is None:
            raise ValueError("best_metric needs eval_steps: without it there is one evaluation, at the end")
        if self.early_stopping is not None and self.best_metric is None:
            raise ValueError("early_stopping needs best_metric: eval_loss, say")
        return self

    @model_validator(mode="after")
    def _fewer_workers_do_the_same(self) -> TrainConfig:
        if self.min_workers is None:
            return self
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} is more than workers ({self.workers})")
        if self.global_batch_size is None:
            raise ValueError("min_workers needs global_batch_size: else fewer workers would take fewer rows in a step")
        return self

    @model_validator(mode="after")
    def _precision_fits_device(self) -> TrainConfig:
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision fp16 needs a GPU; on CPU use bf16, fp32 or auto")
        if self.precision == "pure_bf16" and self.deepspeed != "none":
            raise ValueError(
                f"precision pure_bf16: DeepSpeed ({self.deepspeed}) trains copies in fp32; use bf16, or deepspeed none"
            )
        return self
