"""A job from its config to its result. Holds no model: it checks, plans, starts, listens and writes.

    check the request -> Ray -> check the cluster -> plan the stream -> Ray Train -> result

Everything that can be refused is refused before the run directory is made.
"""

from __future__ import annotations

import json
import platform
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any

from rayloom import __version__
from rayloom.config.job import JobConfig
from rayloom.data.plan import Plan, Position
from rayloom.data.rows import DROP_REASONS
from rayloom.data.segment import encode_segment
from rayloom.errors import JobError, RequestError
from rayloom.models.precision import choose_precision, computes_bf16
from rayloom.stages.prepare import prepare_data
from rayloom.stages.sft import SftEncoder
from rayloom.train.meter import StreamMeter
from rayloom.train.ray_session import prepare_environment, ray_session
from rayloom.train.report import Reporter, mean_loss, plot_loss
from rayloom.train.run_dir import CHECKPOINTS, RunDir, check_run_dir, open_run_dir

if TYPE_CHECKING:
    from rayloom.train.resources import Resources

_POLL_SECONDS = 0.25
_SEGMENTS_AT_ONCE = 10_000
# How often Ray Train may try again to start the workers; its default is for ever.
_NO_ENDLESS_RETRY: Any = {"controller_failure_limit": 0}
_VERSIONS = ("ray", "torch", "transformers", "peft", "accelerate", "deepspeed")


def run_job(job: JobConfig, *, started: float, verbose: bool = False) -> dict[str, Any]:
    """Run a job to its end, or to a checkpoint when it is told to stop. Returns what `result.json` holds.

    Args:
        started: time of day (seconds) at which the user asked for it, for the report of the start-up's phases.

    Raises:
        RequestError: the request was wrong; nothing was written.
        JobError: the job failed; the run directory says how far it came.
    """
    phases = {"start": started}
    prepare_environment()
    run = check_run_dir(job)
    plan, encoder = prepare_data(job)
    if job.train.device == "cpu":
        choose_precision(job.train.precision, "cpu", bf16=computes_bf16("cpu"))
    rows_per_segment = _rows_in_first_segment(job, plan, encoder)
    phases["checks"] = time.time()

    with Reporter() as reporter, ray_session(verbose=verbose) as own_cluster:
        from rayloom.train.resources import plan_resources, require_resources

        phases["ray"] = time.time()
        resources = plan_resources(job.train)
        choose_precision(job.train.precision, resources.device, bf16=resources.device == "gpu" or computes_bf16("cpu"))
        require_resources(job.train, resources, wait=not own_cluster)
        work = _Work(job, open_run_dir(job, run), plan, encoder, rows_per_segment, resources, _SEGMENTS_AT_ONCE)
        reporter.say(f"{job.name}: {_describe(work)}")
        return _Execution(work, reporter, phases).run()


@dataclass(frozen=True)
class _Work:
    """Everything that is settled before Ray Train starts."""

    job: JobConfig
    run: RunDir
    plan: Plan
    encoder: SftEncoder
    rows_per_segment: int
    """Token rows in the stream's first segment: a measure of how dense the data is."""
    resources: Resources
    segments_at_once: int
    """Most segments of one execution of the pipeline: Ray Data lists all its tasks up front."""

    def segments(self, start: Position) -> int:
        """How many segments to make from `start` on, in one execution of the pipeline.

        The rest of the epochs; or, by steps, a quarter more than the first segment's density suggests: what is made
        and not used costs time that the training wants. Where it was not enough, the job goes on from its checkpoint
        with the next segments.
        """
        left = self.plan.segments_left(start)
        if left is None:
            train = self.job.train
            rows = (train.max_steps or 0) * train.workers * train.batch_size * train.gradient_accumulation
            left = 2 + 5 * rows // (4 * self.rows_per_segment)
        return min(left, self.segments_at_once)

    def is_done(self, summary: dict[str, Any]) -> bool:
        """Whether the workers ended because there is nothing left to do, not because the pipeline had ended."""
        if summary["status"] == "stopped":
            return True
        if self.job.train.max_steps is not None:
            return bool(summary["steps"] >= self.job.train.max_steps)
        return bool(summary["epochs_done"] >= self.job.train.epochs)


class _Execution:
    """Ray Train at work in a thread; the main thread listens, writes, and hands signals on."""

    def __init__(self, work: _Work, reporter: Reporter, phases: dict[str, float]) -> None:
        from rayloom.train.monitor import start_monitor

        self._work, self._reporter, self._phases = work, reporter, phases
        self._monitor = start_monitor()
        self._outcome: dict[str, Any] | BaseException | None = None
        self._refused: RequestError | None = None
        self._trains = False

    def run(self) -> dict[str, Any]:
        """Train; return what `result.json` holds. On the way: metrics to file and screen, signals to the workers."""
        thread = threading.Thread(target=self._fit, daemon=True)
        try:
            with _Signals(self._ask_to_stop):
                thread.start()
                while thread.is_alive():
                    thread.join(_POLL_SECONDS)
                    self._collect()
            self._collect()
        except KeyboardInterrupt:
            if not self._trains:
                self._work.run.undo()
            raise
        if isinstance(self._outcome, dict):
            return self._finish(self._outcome)
        raise self._failure(self._outcome)

    def _fit(self) -> None:
        try:
            steps, summary = -1, None
            while summary is None or not self._work.is_done(summary):
                # Once more only where one execution of the pipeline was not enough: it goes on from the checkpoint.
                summary = _ray_trainer(self._work, self._monitor).fit().return_value
                if summary["steps"] == steps and not self._work.is_done(summary):
                    raise JobError(
                        f"no example of {self._work.segments_at_once} segments on end can "
                        "be trained on: all are longer than data.cutoff or have no answer"
                    )
                steps = summary["steps"]
            self._outcome = summary
        except BaseException as error:
            self._outcome = error

    def _ask_to_stop(self, name: str) -> None:
        self._reporter.say(f"{name}: saving a checkpoint after this step, then stopping; once more stops at once")
        self._monitor.request_stop.remote()

    def _collect(self) -> None:
        from rayloom.train.monitor import answer

        for event in answer(self._monitor.collect.remote(), "the driver"):
            if event["kind"] == "phase":
                self._phases.setdefault(event["name"], event["time"])
            elif event["kind"] == "refused":
                self._refused = RequestError(*event["messages"])
            else:
                if not self._trains:
                    self._trains = True
                    self._work.run.settle()
                with self._work.run.metrics_file.open("a") as file:
                    file.write(json.dumps(event["row"]) + "\n")
                self._reporter.show(event["row"])

    def _failure(self, error: BaseException | None) -> Exception:
        run = self._work.run
        if self._refused is not None:
            run.undo()
            return self._refused
        text = (str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}")[-4000:]
        if not self._trains and run.replaced is not None:
            run.undo()
            return JobError(f"{self._work.job.name} failed before its first step. {text}\nThe earlier run is kept")
        self._write({"status": "failed", "error": text})
        kept = run.latest_checkpoint() is not None
        hint = "\nThe last checkpoint is kept: resume=true goes on from it" if kept else ""
        return JobError(f"{self._work.job.name} failed. {text}{hint}")

    def _finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        run, names = self._work.run, [data_set.name for data_set in self._work.plan.sets]
        run.settle()
        dropped = summary.pop("dropped")
        summary["examples"] = dict(zip(names, summary["examples"], strict=True))
        summary["dropped"] = {
            name: dict(zip(DROP_REASONS, dropped[i * len(DROP_REASONS) :], strict=False))
            for i, name in enumerate(names)
        }
        summary["model_dir"] = str(run.model) if summary["status"] == "finished" else None
        if rows := run.metrics():
            summary["train_loss"] = mean_loss(rows)
            summary["tokens_per_second"] = median(row["tokens_per_second"] for row in rows)
            plot_loss(rows, run.path / "loss.png", self._work.job.name)
        return self._write(summary)

    def _write(self, summary: dict[str, Any]) -> dict[str, Any]:
        marks = sorted(self._phases.items(), key=lambda item: item[1])
        seconds = {name: round(time_ - marks[i][1], 2) for i, (name, time_) in enumerate(marks[1:])}
        result = {
            "name": self._work.job.name,
            **summary,
            "seconds": round(time.time() - self._phases["start"], 2),
            "seconds_to_first_step": seconds,
            "versions": {"rayloom": __version__, "python": platform.python_version()}
            | {name: version(name) for name in _VERSIONS},
        }
        self._work.run.write_result(result)
        return result


class _Signals:
    """SIGINT and SIGTERM ask once for a stop with a checkpoint; the second one interrupts."""

    def __init__(self, ask: Callable[[str], None]) -> None:
        self._ask = ask
        self._asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._ask(signal.Signals(number).name)


def _ray_trainer(work: _Work, monitor: Any) -> Any:
    job, run, resources = work.job, work.run, work.resources
    import ray.data
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from rayloom.data.deal import DealInOrder
    from rayloom.data.stream import build_stream
    from rayloom.train.worker import train_worker

    def stream() -> ray.data.Dataset:
        """Called at each start of the workers: the stream begins where the checkpoint that they load says."""
        checkpoint = run.latest_checkpoint()
        start = StreamMeter.load(checkpoint)[0].position if checkpoint else Position()
        return build_stream(
            work.plan,
            work.encoder,
            start,
            segments=work.segments(start),
            cutoff=job.data.cutoff,
            packing=job.data.packing,
            task_cpus=resources.task_cpus,
            concurrency=resources.task_concurrency,
        )

    worker: Any = train_worker
    return TorchTrainer(
        worker,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "monitor": monitor,
            "device": resources.device,
            "sets": len(work.plan.sets),
            "model_dir": str(run.model),
        },
        torch_config=TorchConfig(backend="gloo" if resources.device == "cpu" else "nccl"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.train.workers,
            use_gpu=resources.device == "gpu",
            resources_per_worker=resources.per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=CHECKPOINTS,
            storage_path=str(run.path),
            failure_config=ray.train.FailureConfig(max_failures=0, **_NO_ENDLESS_RETRY),
            **_worker_environment(resources),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=job.train.keep_checkpoints),
        ),
        datasets={"train": stream},
        dataset_config=DealInOrder(),
    )


def _worker_environment(resources: Resources) -> dict[str, Any]:
    """Ray gives a worker OMP_NUM_THREADS=1. To raise the number later, in the process, leaves parts of the math
    libraries at one thread (tests/bench/NOTES.md)."""
    if resources.device == "gpu":
        return {}
    return {"worker_runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(resources.threads)}}}


def _rows_in_first_segment(job: JobConfig, plan: Plan, encoder: SftEncoder) -> int:
    """Make the first segment here: the cheapest proof that the data can be trained on, and a measure of its density."""
    table = encode_segment(plan, 0, 0, encoder, cutoff=job.data.cutoff, packing=job.data.packing)
    if any(len(ids) for ids in table["input_ids"]):
        return table.num_rows
    dropped = table["dropped"][0].as_py()
    longer, untrained = sum(dropped[::2]), sum(dropped[1::2])
    raise RequestError(
        f"data.cutoff: none of the first {longer + untrained} examples can be trained on: {longer} are longer than the "
        f"cutoff of {job.data.cutoff} tokens, {untrained} have no token to train; raise data.cutoff or mend the data"
    )


def _describe(work: _Work) -> str:
    job, plan, device = work.job, work.plan, work.resources.device
    sets = ", ".join(f"{data_set.name} ({data_set.length} rows)" for data_set in plan.sets)
    goal = f"{job.train.max_steps} steps" if job.train.max_steps else f"{job.train.epochs} epoch(s)"
    return (
        f"{job.stage.type} with {job.method.type} on {job.train.workers} {device.upper()} worker(s), "
        f"deepspeed {job.train.deepspeed}, {goal} of {plan.mixture.epoch_length} examples from {sets}"
    )
