"""Transformers' `Trainer`, fed by the stream.

What is overridden, and why:
- the loader: batches come from the worker's Ray Data shard, already dealt to this rank;
- gathering a step's batches: one collective call counts the tokens that all ranks train (the loss is averaged over
  them), finds the position after the step, and carries the wish to stop;
- the optimizer and the learning rate (`rayloom.train.optimizer_trainer`);
- saving: every rank reports its own files to Ray Train, with the stream's position.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from rayloom.data.rows import row_name
from rayloom.errors import JobError
from rayloom.methods.optimizers.layerwise import LayerWise
from rayloom.methods.optimizers.support import SUPPORT
from rayloom.methods.prompts import stands_before_rows, virtual_tokens
from rayloom.methods.save import load_trained, save_trained
from rayloom.models.packed_attention import packs_cheaply
from rayloom.remote import Remote
from rayloom.train.batch import Batch, TrainedPositions, make_batch
from rayloom.train.best import BestRule
from rayloom.train.checkpoints import CheckpointWriter
from rayloom.train.clock import RowClock, StepClock
from rayloom.train.config import TrainConfig
from rayloom.train.evaluate import evaluate
from rayloom.train.frozen_head import FrozenHeadLoss
from rayloom.train.guard import MadeSteps, StepGuard, bad_step, gradient_guards
from rayloom.train.meter import BatchCount, StepCount, StreamMeter
from rayloom.train.monitor import answer
from rayloom.train.optimizer_trainer import OptimizerTrainer, WhenWrapped
from rayloom.train.reshard import fitting_checkpoint
from rayloom.train.row_threads import RowThreads, divides_rows
from rayloom.train.schedule import learning_rate_factor


class StreamTrainer(OptimizerTrainer):
    """One trainer for every stage that learns from token rows."""

    def __init__(
        self,
        *,
        tables: Iterable[pa.Table],
        meter: StreamMeter,
        stage: Any,
        settings: TrainConfig,
        optimizer_config: Any,
        monitor: Any,
        pad_token: int,
        manifest: bool,
        eval_tables: Callable[[], list[pa.Table]] | None,
        set_names: Sequence[str],
        eval_names: Sequence[str],
        checkpoints: Path | Remote,
        **kw: Any,
    ) -> None:
        super().__init__(**kw)
        self._tables = tables
        self.meter = meter
        self._stage = stage
        self._settings = settings
        self._optimizer_config = optimizer_config
        self._monitor = monitor
        self._pad_token = pad_token
        self._manifest = manifest
        self._read_eval_tables = eval_tables
        self._set_names = set_names
        self._eval_names = eval_names
        self._trained_positions = TrainedPositions(kw["model"], skip=virtual_tokens(kw["model"]))
        self.row_threads: RowThreads | None = None
        noise, loss = self.args.neftune_noise_alpha is not None, self.compute_loss_func
        spares = self.args.gradient_checkpointing  # memory; threads take some hundred MB more
        if isinstance(loss, FrozenHeadLoss) and not spares and divides_rows(kw["model"], self.args.device, noise=noise):
            self.row_threads = RowThreads(kw["model"], loss, self._trained_positions)
        may_join = not noise and packs_cheaply(kw["model"], self.args.device) and not stands_before_rows(kw["model"])
        self._side_by_side = (self.row_threads.cores if self.row_threads else 1) if may_join else None
        self._saved_step = -1
        self._clock = StepClock()
        self._row_clock = RowClock(self._clock)
        self.add_callback(self._clock)
        self._taken: list[tuple[int, int]] = []  # set and row of this rank's examples in the step
        self._grad_norm: tuple[int, float | None] = (0, None)  # the step that was logged last, and its gradient's norm
        self._evaluated: tuple[int, dict[str, float]] | None = None  # the last evaluation's step and metrics
        self._writer = CheckpointWriter(checkpoints, self._tell_failed)
        self._best = BestRule.of(settings)
        self._guard = StepGuard(
            settings.max_loss,
            stage.large_loss,
            stops=settings.on_bad_step == "stop",
            meter=meter,
            rank=self.args.process_index,
            ranks=self.args.world_size,
            device=self.args.device,
            step=lambda: self.state.global_step,
            rows=self._row_names,
            describe=self._describe_bad_step,
            say=lambda text: self._post("say", lines=[text]),
        )
        self._made_steps = MadeSteps(lambda: self._guard.left_out_last, lambda: [self._tr_loss, *self._measured()])
        for callback in (self._made_steps, *gradient_guards(self.args, self, self._guard), WhenWrapped(self._begin)):
            self.add_callback(callback)
        self.stopped = False  # because it was told to
        self.stopped_early = False  # because evaluations got no better

    def _arrange(self, optimizer: Any) -> None:
        if isinstance(optimizer, LayerWise):
            optimizer.on_bad = self._guard.take_bad_gradients

    def _begin(self) -> None:
        """The model is wrapped, and the checkpoint is loaded."""
        if self.state.global_step:
            self._saved_step = self.state.global_step  # written again, it could break off, and be lost

    # --- data --------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        return self._tables

    def get_batch_samples(
        self, epoch_iterator: Iterator[pa.Table], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """The batches of one optimizer step, and the number of tokens that all ranks train in it."""
        stop = bool(self.is_world_process_zero() and answer(self._monitor.stop_requested.remote(), "rank 0"))
        before = self._progress()
        while True:
            count = BatchCount(len(self.meter.examples))
            with self._clock.part("data"):
                tables = list(itertools.islice(epoch_iterator, 0 if stop or self._is_over else num_batches))
            for table in tables:
                count.add(table)
            step = count.share(device, stop)
            if step.stop or step.batches == 0:  # told to stop, or the stream has ended
                self.stopped = step.stop
                self._end()
                return [], None
            self._row_clock.start(self.meter.tokens, self.state.global_step)
            step.add_to(self.meter)
            self._taken = list(count.names)
            if self._manifest:
                self._post_manifest()
            if step.trained_tokens:
                break  # else all of these examples were left out: take the next ones
        batches = [self._batch(table) for table in tables]
        while len(batches) < num_batches:  # the stream ended within a step: fill it up with what trains nothing
            batches.append(self._batch(tables[-1].slice(0, 0)))
        assert self._schedule is not None  # made before the first step
        middle = (before + self._progress(1)) / 2
        self._schedule.set(learning_rate_factor(middle, self._settings.scheduler, self._settings.warmup))
        return batches, torch.tensor(self._items(step), device=device)

    def _batch(self, table: pa.Table) -> Batch:
        """What the model is called with, and `positions`, for some rows of the stream."""
        return make_batch(table, self._pad_token, self._side_by_side)

    def _items(self, step: StepCount) -> int:
        """What the losses of a step are averaged over, of all ranks."""
        return step.trained_tokens

    def _post_manifest(self) -> None:
        """Tell the driver which rows this rank takes in the coming step."""
        row = {
            "step": self.state.global_step + 1,
            "rank": self.args.process_index,
            "examples": [[self._set_names[number], row_name(row)] for number, row in self._taken],
        }
        self._post("manifest", row=row)

    def _progress(self, ahead: int = 0) -> float:
        if self._settings.max_steps:
            return (self.state.global_step + ahead) / self._settings.max_steps
        return self.meter.epochs_done / self._settings.epochs

    @property
    def _is_over(self) -> bool:
        """Whether the last checkpoint was that of the last step: then no step is left, only the model to save."""
        return self._settings.max_steps is not None and self.state.global_step >= self._settings.max_steps

    def _end(self) -> None:
        """Leave the loop; what was not logged or saved yet is, on the way out."""
        self.control.should_training_stop = True
        self.control.should_log = True
        self.control.should_save = self.state.global_step > max(0, self._saved_step)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._clock.part("backward"):  # but for the forward pass in it
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The stage's loss at the trained positions, or the model's own."""
        with self._clock.part("forward"):
            loss: Any = self._loss(model, inputs, *args, **kwargs)
        return self._guard.watch(loss, is_last=self.accelerator.sync_gradients)

    def _loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        threads = self.row_threads
        if threads is not None and threads.parts(inputs) > 1:
            divided = super().compute_loss(model, inputs, *args, **kwargs)
            self._clock.move(threads.backward_seconds, "forward", "backward")
            return divided
        loss = self.compute_loss_func
        take = loss.take if isinstance(loss, FrozenHeadLoss) else None
        self._trained_positions.choose(inputs.pop("positions"), take=take)
        if loss is not None:
            del inputs["shift_labels"]  # without labels the model computes no loss of its own
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _measured(self) -> list[torch.Tensor]:
        """Sums, since the last row of metrics, of what each batch adds to."""
        return []

    def _describe_bad_step(self, what: str, rows: Sequence[str], whose: str) -> str:
        in_backward = SUPPORT[self._optimizer_config.type].in_backward
        return bad_step(self.state.global_step + 1, what, rows, whose, self._grad_norm, in_backward=in_backward)

    def _row_names(self) -> list[str]:
        """Of this rank's examples in the step."""
        return [f"{self._set_names[number]} {row_name(row)}" for number, row in self._taken]

    # --- evaluation ------------------------------------------------------------------------------------------------

    @cached_property
    def _eval_tables(self) -> list[pa.Table]:
        assert self._read_eval_tables is not None  # asked for only where there is an evaluation
        return self._read_eval_tables()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on this rank's rows of the evaluation stream and post a row of metrics to the driver."""
        if self._evaluated is not None and self._evaluated[0] == self.state.global_step:
            return self._evaluated[1]  # the last step's evaluation is the training's
        with self._row_clock.left_out():
            self._use_averages()
            metrics = self._eval_metrics(self._eval_tables)
            row = {"step": self.state.global_step, "epoch": self.meter.epochs_done, "progress": self._progress()}
            if self.is_world_process_zero():
                self._post("metrics", row={**row, **metrics})
        self._evaluated = (self.state.global_step, metrics)
        if self._best is not None:
            self._compare(self._best, metrics)
        return metrics

    def _compare(self, rule: BestRule, metrics: dict[str, float]) -> None:
        """Keep what is the best so far; end where nothing better has come for long."""
        value, step = rule.value(metrics), self.state.global_step
        if rule.is_better(value, self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = value, step
            self.control.should_save = True
        elif rule.is_over(step, self.state.best_global_step or 0):
            self.stopped_early = self.control.should_training_stop = True

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation so far, for `result.json`."""
        if self._best is None or self.state.best_metric is None:
            return None
        best = {"metric": self._best.metric, "value": self.state.best_metric, "step": self.state.best_global_step}
        return {**best, "of_steps": self.state.global_step}

    def load_best(self) -> None:
        """Take the weights of the best evaluation back from its checkpoint, where they are not the present ones."""
        best = self.best
        if best is None or best["step"] == self.state.global_step:
            return
        self._writer.wait()
        folder = self._writer.read(best["step"], Path(str(self.args.output_dir)) / "stored")
        if self.is_deepspeed_enabled:
            config: Any = self.args.deepspeed
            own = Path(str(self.args.output_dir)) / "best"
            fitting = fitting_checkpoint(folder, own, self.args.process_index, self.args.world_size, config)
            deepspeed_load_checkpoint(
                self.model_wrapped, str(fitting), load_module_strict=not hasattr(self.model, "peft_config")
            )
        else:
            self._load_from_checkpoint(str(folder), self.model)
        self.restore_own(folder)

    def _eval_metrics(self, tables: list[pa.Table]) -> dict[str, float]:
        return evaluate(
            self.model_wrapped,
            tables,
            self._eval_names,
            self._trained_positions,
            self._pad_token,
            self.args.device,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model: for use, or, when transformers calls it, as a part of a checkpoint."""
        if not _internal_call:
            self._use_averages()
        super().save_model(output_dir, _internal_call)

    # --- metrics, checkpoints -------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Post a row of metrics to the driver."""
        if "loss" not in logs:  # transformers' closing summary; `result.json` says it better
            return
        loss = self._made_steps.mean(logs["loss"])
        if loss is None:  # no step was made since the last row
            return
        row: dict[str, Any] = {
            "step": self.state.global_step,
            "epoch": self.meter.epochs_done,
            "progress": self._progress(),
            "loss": loss,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm") if self._has_norm else None,
            **self._row_clock.read(self.meter.tokens, self.state.global_step),
            "tokens": self.meter.tokens,
            "examples_seen": sum(self.meter.examples),
            "examples": dict(zip(self._set_names, self.meter.examples, strict=True)),
            "position": self.meter.position.as_dict(),
            **self._stage_metrics(),
        }
        self._grad_norm = (self.state.global_step, row["grad_norm"])
        if self.is_world_process_zero():
            self._post("metrics", row=row)

    @property
    def _has_norm(self) -> bool:
        """Of the last step's gradient. A layer-wise optimizer takes each as it comes and leaves none to measure."""
        return not self._guard.left_out_last and not self._optimizer_config.type.endswith("layerwise")

    def _stage_metrics(self) -> Mapping[str, float | None]:
        """What a stage measures besides the loss, since the last row; None: there was nothing to measure. Every rank
        calls it."""
        return {}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Virtual tokens from our own file; all others as PEFT and transformers load them."""
        if not load_trained(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _saved_meter(self) -> StreamMeter:
        """The meter as a checkpoint has it."""
        return self.meter

    def save_own(self, folder: Path) -> None:
        """Write what a stage must know to go on, besides model, optimizer and position. On rank 0."""

    def restore_own(self, folder: Path) -> None:
        """Read what `save_own` wrote. On every rank, before training."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save into this rank's own folder and hand it to Ray Train, which puts the ranks' files together."""
        if self.state.global_step == self._saved_step:
            return
        try:
            with self._clock.part("checkpoint"):
                super()._save_checkpoint(model, trial)
        except OSError as error:
            raise JobError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {self.args.output_dir}, from "
                f"where it would be copied: {error.strerror or error}"
            ) from error
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(exist_ok=True)
        if self.is_world_process_zero():
            if not self.is_deepspeed_enabled:  # which keeps all of its state itself
                save_trained(self.model, folder)
            self._saved_meter().save(folder, self.state.global_step)
            self.save_own(folder)
        score = None
        if self._best is not None and self.state.best_global_step == self.state.global_step and self._evaluated:
            score = self._best.score(self._evaluated[1][self._best.metric])
        with self._clock.part("checkpoint"):
            self._writer.write(folder, self.state.global_step, score=score, is_first_rank=self.is_world_process_zero())
        self._saved_step = self.state.global_step

    def finish_saving(self) -> None:
        """Return when every checkpoint is in the storage. Every rank calls it, at the end."""
        self._writer.wait()

    def _tell_failed(self, text: str) -> None:
        self._post("failed", text=text)

    def _post(self, kind: str, **said: Any) -> None:
        """Tell the driver."""
        answer(self._monitor.post.remote({"kind": kind, **said}), f"rank {self.args.process_index}")
