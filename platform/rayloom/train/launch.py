"""From settled work to a Ray Train trainer: the streams, the workers, their resources and their storage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rayloom.collector import collector_off
from rayloom.config.job import JobConfig
from rayloom.data.plan import Plan, Position
from rayloom.data.segment import Encoder, EncodeSegment, SegmentOptions
from rayloom.remote import Remote
from rayloom.stages.prepare import eval_options
from rayloom.stages.reference import ReferencePlace
from rayloom.train.config import TrainConfig
from rayloom.train.meter import StreamMeter
from rayloom.train.pins import Pins
from rayloom.train.ppo_rules import stream_rows
from rayloom.train.run_dir import CHECKPOINTS, RunDir

if TYPE_CHECKING:
    from rayloom.train.resources import Resources

# How often Ray Train may try again to start the workers; its default is for ever. `rayloom.train.execution` goes on
# after faults, with streams that begin at the checkpoint.
_NO_ENDLESS_RETRY: Any = {"controller_failure_limit": 0}


@dataclass(frozen=True)
class Work:
    """Everything that is settled before Ray Train starts."""

    job: JobConfig
    """With the number of workers that it trains with now."""
    asked: TrainConfig
    """What the job file says, with the most and the fewest workers."""
    run: RunDir
    plan: Plan
    eval_plan: Plan | None
    """The stream that is evaluated on, if any."""
    encoder: Encoder
    options: SegmentOptions
    first: pa.Table
    """The token rows of the stream's first segment; their number measures how dense the data is."""
    resources: Resources
    segments_at_once: int
    """Most segments of one execution of the pipeline: Ray Data lists all its tasks up front."""
    deepspeed: dict[str, Any]
    """What the user's DeepSpeed JSON says."""
    own_cluster: bool
    """Whether Ray is a local one of the job's own."""
    fleet: Any = None
    """The engines of stage ppo, as workers call them."""
    reference: ReferencePlace | None = None
    """Where the reference's log-probabilities are kept, if they are."""
    pins: Pins | None = None
    """Which checkpoints the job's host wants to have pinned, if any."""

    def segments(self, start: Position) -> int:
        """How many segments to make from `start` on, in one execution of the pipeline.

        A quarter more than the estimate, which comes from the sets' lengths or, by steps, from the first segment's
        density: what is made and not used costs time that the training wants; behind the last epoch there is nothing.
        Where it was not enough, the job goes on from its checkpoint with the next segments.
        """
        left = self.plan.segments_left(start)
        if left is None:
            left = stream_rows(self.job, self.job.train.max_steps or 0) // self.first.num_rows
        return min(2 + 5 * left // 4, self.segments_at_once)

    def eval_segments(self) -> int:
        """How many segments of the evaluation stream hold the examples that are evaluated on, with room to spare."""
        assert self.eval_plan is not None
        wanted = self.job.data.eval_samples / (self.job.data.held_out or 1.0)
        return min(2 + int(1.5 * wanted) // self.eval_plan.window, 2 + (self.eval_plan.segments_left(Position()) or 0))

    def is_done(self, summary: dict[str, Any]) -> bool:
        """Whether the workers ended because there is nothing left to do, not because the pipeline had ended."""
        if summary["status"] == "stopped" or summary["stopped_early"]:
            return True
        if self.job.train.max_steps is not None:
            return bool(summary["steps"] >= self.job.train.max_steps)
        return bool(summary["epochs_done"] >= self.job.train.epochs)


def ray_trainer(work: Work, monitor: Any) -> Any:
    """The Ray Train trainer of one execution, which begins where the last checkpoint ends."""
    job, run, resources = work.job, work.run, work.resources
    import ray.train

    from rayloom.train.checkpoint_news import CheckpointNews, take_pin
    from rayloom.train.data_parallel import ProcessGroupConfig, StreamDataParallelTrainer

    worker: Any = _train_worker
    if work.pins is not None and (latest := run.latest_checkpoint()) is not None:
        take_pin(work.pins, latest, monitor)  # an attempt before this one may have ended between the two
    news: Any = CheckpointNews(monitor, work.pins)  # of a kind that Ray's annotation leaves out
    return StreamDataParallelTrainer(
        worker,
        monitor=monitor,
        own_cluster=work.own_cluster,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "monitor": monitor,
            "dealers": _dealers(work),
            "chat_template": getattr(work.encoder, "template", None),
            "device": resources.device,
            "deepspeed": work.deepspeed,
            "fleet": work.fleet,
            "reference": work.reference,
            "sets": [data_set.name for data_set in work.plan.sets],
            "eval_sets": [data_set.name for data_set in work.eval_plan.sets] if work.eval_plan else [],
            "model_dir": run.model,
            "checkpoints": run.checkpoints,
            "folder": str(Path.cwd()),
        },
        backend_config=ProcessGroupConfig(
            "gloo" if resources.device == "cpu" else "nccl",
            math.ceil(job.train.collective_timeout),
            threads=resources.threads if resources.device == "cpu" else None,
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.train.workers,
            use_gpu=resources.device == "gpu",
            resources_per_worker=resources.per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            **_storage(run.place),
            callbacks=[news],
            failure_config=ray.train.FailureConfig(max_failures=0, **_NO_ENDLESS_RETRY),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=job.train.keep_checkpoints,
                checkpoint_score_attribute="score" if job.train.best_metric else None,
            ),
        ),
    )


def _dealers(work: Work) -> dict[str, Any]:
    """Who deals the streams to the workers: `train`, which begins where the last checkpoint ends, `eval`, and
    `reference`, the rows of `train` once more.

    Not Ray Train's own `datasets`, which start their actors one after the other once the workers are there.
    """
    from rayloom.data.deal import StreamOrder, start_dealer

    job, resources = work.job, work.resources
    checkpoint = work.run.latest_checkpoint()
    start = StreamMeter.load(checkpoint)[0].position if checkpoint else Position()
    given = [work.first] if start == Position() else []
    names = ["train"]
    if work.reference is not None and not work.reference.is_whole:
        names.append("reference")  # the same rows, before the training
    dealers = {}
    for name in names:
        stream = StreamOrder(
            work.plan,
            EncodeSegment(work.encoder, work.options),
            start,
            segments=work.segments(start),
            task_cpus=resources.task_cpus,
            concurrency=resources.task_concurrency,
            made=len(given),
        )
        dealers[name] = start_dealer(stream, job.train.workers, *given)
    if work.eval_plan is not None:
        eval_stream = StreamOrder(
            work.eval_plan,
            EncodeSegment(work.encoder, eval_options(job)),
            Position(),
            segments=work.eval_segments(),
            task_cpus=resources.task_cpus,
            concurrency=1,
        )
        dealers["eval"] = start_dealer(eval_stream, job.train.workers)
    return dealers


def _train_worker(config: dict[str, Any]) -> dict[str, Any] | None:
    """What Ray Train runs. Its controller and this driver must load it too, so the libraries that it needs are imported
    in the worker only: some seconds of each."""
    with collector_off():
        from rayloom.train.worker import train_worker

    return train_worker(config)


def _storage(place: Path | Remote) -> dict[str, Any]:
    if isinstance(place, Remote):
        return {"storage_path": place.path, "storage_filesystem": place.arrow}
    return {"storage_path": str(place)}
