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
from importlib.metadata import version
from statistics import median
from typing import Any

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

_POLL_SECONDS = 0.25
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
    segments = _segments_needed(job, plan, _rows_in_first_segment(job, plan, encoder))
    phases["checks"] = time.time()

    with Reporter() as reporter, ray_session(verbose=verbose) as own_cluster:
        from rayloom.train.resources import plan_resources, require_resources

        phases["ray"] = time.time()
        resources = plan_resources(job.train)
        choose_precision(job.train.precision, resources.device, bf16=resources.device == "gpu" or computes_bf16("cpu"))
        require_resources(job.train, resources, wait=not own_cluster)
        run = open_run_dir(job, run)
        reporter.say(f"{job.name}: {_describe(job, plan, resources.device)}")
        try:
            summary = _Run(job, run, plan, encoder, segments, resources, reporter, phases).go()
        except RequestError:
            run.undo()
            raise
    return summary


class _Run:
    """One execution of Ray Train, with the driver's main thread listening to it."""

    def __init__(
        self,
        job: JobConfig,
        run: RunDir,
        plan: Plan,
        encoder: SftEncoder,
        segments: Callable[[Position], int],
        resources: Any,
        reporter: Reporter,
        phases: dict[str, float],
    ) -> None:
        from rayloom.train.monitor import start_monitor

        self.job, self.run, self.plan, self.reporter, self.phases = job, run, plan, reporter, phases
        self.monitor = start_monitor()
        self._trainer = _ray_trainer(job, run, plan, encoder, segments, resources, self.monitor)
        self._outcome: list[Any] = []
        self._refused: RequestError | None = None

    def go(self) -> dict[str, Any]:
        """Train; return the summary. On the way: metrics to file and screen, signals to the workers."""
        thread = threading.Thread(target=self._fit, daemon=True)
        with _Signals(self._ask_to_stop):
            thread.start()
            while thread.is_alive():
                thread.join(_POLL_SECONDS)
                self._collect()
        self._collect()
        (outcome,) = self._outcome
        if isinstance(outcome, BaseException):
            raise self._failure(outcome)
        return self._finish(outcome)

    def _fit(self) -> None:
        try:
            self._outcome.append(self._trainer.fit().return_value)
        except BaseException as error:
            self._outcome.append(error)

    def _ask_to_stop(self, name: str) -> None:
        self.reporter.say(f"{name}: saving a checkpoint after this step, then stopping; once more stops at once")
        self.monitor.request_stop.remote()

    def _collect(self) -> None:
        import ray

        for event in ray.get(self.monitor.collect.remote(), timeout=60):
            if event["kind"] == "phase":
                self.phases[event["name"]] = event["time"]
            elif event["kind"] == "refused":
                self._refused = RequestError(*event["messages"])
            else:
                with self.run.metrics_file.open("a") as file:
                    file.write(json.dumps(event["row"]) + "\n")
                self.reporter.show(event["row"])

    def _failure(self, error: BaseException) -> Exception:
        if self._refused is not None:
            return self._refused
        text = f"{type(error).__name__}: {error}"
        self._write({"status": "failed", "error": text[-4000:]})
        hint = ""
        if self.run.latest_checkpoint() is not None:
            hint = "\nThe last checkpoint is kept: resume=true goes on from it"
        return JobError(f"{self.job.name} failed. {text[-4000:]}{hint}")

    def _finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        names = [data_set.name for data_set in self.plan.sets]
        dropped = summary.pop("dropped")
        summary["examples"] = dict(zip(names, summary["examples"], strict=True))
        summary["dropped"] = {
            name: dict(zip(DROP_REASONS, dropped[i * len(DROP_REASONS) :], strict=False))
            for i, name in enumerate(names)
        }
        summary["model_dir"] = str(self.run.model) if summary["status"] == "finished" else None
        if rows := self.run.metrics():
            summary["train_loss"] = mean_loss(rows)
            summary["tokens_per_second"] = median(row["tokens_per_second"] for row in rows)
            plot_loss(rows, self.run.path / "loss.png", self.job.name)
        self._write(summary)
        return self.run.result()

    def _write(self, summary: dict[str, Any]) -> None:
        marks = sorted(self.phases.items(), key=lambda item: item[1])
        seconds = {name: round(time_ - marks[i][1], 2) for i, (name, time_) in enumerate(marks[1:])}
        self.run.write_result(
            {
                "name": self.job.name,
                **summary,
                "seconds": round(time.time() - self.phases["start"], 2),
                "seconds_to_first_step": seconds,
                "versions": {"rayloom": __version__, "python": platform.python_version()}
                | {name: version(name) for name in _VERSIONS},
            }
        )


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


def _ray_trainer(
    job: JobConfig,
    run: RunDir,
    plan: Plan,
    encoder: SftEncoder,
    segments: Callable[[Position], int],
    resources: Any,
    monitor: Any,
) -> Any:
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
            plan,
            encoder,
            start,
            segments=segments(start),
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
            "sets": len(plan.sets),
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
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=job.train.keep_checkpoints),
        ),
        datasets={"train": stream},
        dataset_config=DealInOrder(),
    )


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


def _segments_needed(job: JobConfig, plan: Plan, rows_per_segment: int) -> Callable[[Position], int]:
    """From a position on: the rest of the epochs; or, by steps, twice what the first segment's density suggests."""

    def needed(start: Position) -> int:
        if plan.epochs is not None:
            return plan.epochs * plan.segments - (start.epoch * plan.segments + start.segment)
        train = job.train
        rows = (train.max_steps or 0) * train.workers * train.batch_size * train.gradient_accumulation
        return min(rows, 2 * (rows // rows_per_segment) + 16)

    return needed


def _describe(job: JobConfig, plan: Plan, device: str) -> str:
    sets = ", ".join(f"{data_set.name} ({data_set.length} rows)" for data_set in plan.sets)
    goal = f"{job.train.max_steps} steps" if job.train.max_steps else f"{job.train.epochs} epoch(s)"
    return (
        f"{job.stage.type} with {job.method.type} on {job.train.workers} {device.upper()} worker(s), "
        f"deepspeed {job.train.deepspeed}, {goal} of {plan.mixture.epoch_length} examples from {sets}"
    )
