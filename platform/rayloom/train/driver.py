"""A job from its config to its result. Holds no model: it checks, plans, starts, listens and writes.

    check the request -> Ray -> check the cluster -> plan the stream -> Ray Train -> result

Everything that can be refused is refused before the run directory is made.
"""

from __future__ import annotations

import json
import logging
import platform
import signal
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median
from typing import Any

import pyarrow as pa

from rayloom import __version__
from rayloom.config.job import JobConfig
from rayloom.data.plan import Plan, Position
from rayloom.data.rows import COUNTERS, CUT, DROP_REASONS, HELD_OUT, TOKENS_CUT
from rayloom.data.segment import Encoder, EncodeSegment, SegmentOptions
from rayloom.data.walk import Walk
from rayloom.errors import JobError, RequestError
from rayloom.methods.optimizers.support import check_environment
from rayloom.methods.rules import check_combination
from rayloom.models.check import check_model
from rayloom.models.precision import choose_precision, computes_bf16
from rayloom.stages.prepare import make_encoder, plan_data, prepare_eval, segment_options, with_stores
from rayloom.stages.rules import check_stage
from rayloom.train.launch import Work, ray_trainer
from rayloom.train.ray_session import prepare_environment, ray_session
from rayloom.train.report import Reporter, mean_loss, plot_loss
from rayloom.train.run_dir import check_data, check_run_dir, open_run_dir

_POLL_SECONDS = 0.25
_SEGMENTS_AT_ONCE = 10_000
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")  # say on import which of their kernels are not there
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
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    run = check_run_dir(job)
    check_combination(job)
    check_stage(job)
    check_environment(job.optimizer, job.train.device)
    plan = plan_data(job)
    eval_plan = prepare_eval(job)
    if job.resume:
        check_data(run, plan.fingerprints)
    if job.train.device == "cpu":
        choose_precision(job.train.precision, "cpu", bf16=computes_bf16("cpu"))

    _check_model(job, job.train.device)
    _check_method(job)
    encoder = make_encoder(job)
    options = with_stores(job, plan, encoder, segment_options(job))
    first = _first_segment(job, plan, encoder, options)
    phases["checks"] = time.time()

    with Reporter() as reporter, ray_session(verbose=verbose) as own_cluster:
        from rayloom.train.resources import plan_resources, require_resources

        phases["ray"] = time.time()
        resources = plan_resources(job.train)
        choose_precision(job.train.precision, resources.device, bf16=resources.device == "gpu" or computes_bf16("cpu"))
        _check_model(job, resources.device)
        check_environment(job.optimizer, resources.device)
        require_resources(job.train, resources, wait=not own_cluster)
        run = open_run_dir(job, run)
        run.data_file.write_text(json.dumps(plan.fingerprints, indent=2) + "\n")
        work = Work(job, run, plan, eval_plan, encoder, options, first, resources, _SEGMENTS_AT_ONCE)
        reporter.say(f"{job.name}: {_describe(work)}")
        for data_set, store in zip(plan.sets, options.stores, strict=True):
            if store:
                reporter.say(f"{data_set.name}: prepared tokens are read from {store}")
        return _Execution(work, reporter, phases).run()


def _check_model(job: JobConfig, device: str) -> None:
    known = None if device == "auto" else device
    zero3 = job.train.deepspeed == "zero3"
    _, quantized = check_model(job.model, cutoff=job.data.cutoff, device=known, zero3=zero3)
    if quantized is not None and quantized.is_frozen and job.method.type in ("full", "freeze"):
        raise RequestError(
            f"method.type: {job.method.type} trains the model's own weights, and weights quantized with "
            f"{quantized.method} cannot; use lora, or leave model.quantization out"
        )
    on_load = getattr(job.model.quantization, "type", None)
    if on_load == "int8" and getattr(job.method, "dora", False) and device == "cpu":
        raise RequestError(
            "method.dora: it needs the sizes of the model's weights, and on CPU those in int8 are not known before the "
            "first batch; use model.quantization: nf4, or leave dora out"
        )


def _check_method(job: JobConfig) -> None:
    """Refuse a method that does not fit the model, from a model without weights. Imports torch."""
    if job.method.type == "full":
        return
    from rayloom.methods.check import check_method

    check_method(job)


class _Execution:
    """Ray Train at work in a thread; the main thread listens, writes, and hands signals on."""

    def __init__(self, work: Work, reporter: Reporter, phases: dict[str, float]) -> None:
        from rayloom.train.monitor import start_monitor

        self._work, self._reporter, self._phases = work, reporter, phases
        self._monitor = start_monitor()
        self._outcome: dict[str, Any] | BaseException | None = None
        self._refused: RequestError | None = None
        self._failed: str | None = None  # why, as the first worker that gave up says it
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
                summary = ray_trainer(self._work, self._monitor).fit().return_value
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
            elif event["kind"] == "failed":
                self._failed = self._failed or event["text"]
            elif event["kind"] == "say":
                for line in event["lines"]:
                    self._reporter.say(line)
            elif event["kind"] == "manifest":
                with self._work.run.manifest_file.open("a") as file:
                    file.write(json.dumps(event["row"]) + "\n")
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
        trace = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
        text = self._failed or trace[-4000:]
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
        summary["examples"] = dict(zip(names, summary["examples"], strict=True))
        summary |= _by_set(names, summary.pop("counts"))
        summary["model_dir"] = str(run.model) if summary["status"] == "finished" else None
        metrics = run.metrics()
        if rows := [row for row in metrics if "loss" in row]:
            summary["train_loss"] = mean_loss(rows)
            summary["tokens_per_second"] = median(row["tokens_per_second"] for row in rows)
            evaluations = [row for row in metrics if "eval_loss" in row]
            plot_loss(rows, evaluations, run.path / "loss.png", self._work.job.name)
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


def _first_segment(job: JobConfig, plan: Plan, encoder: Encoder, options: SegmentOptions) -> pa.Table:
    """Make the first segment here: the cheapest proof that the data can be trained on, and what the training begins
    with while the data tasks start."""
    segment, _ = Walk(plan).step(Position())
    table = EncodeSegment(encoder, options)(plan, segment)
    if any(len(ids) for ids in table["input_ids"]):
        return table
    counts = table["counts"][0].as_py()
    reasons = {name: sum(counts[i :: len(COUNTERS)]) for i, name in enumerate(COUNTERS)}
    said = ", ".join(f"{number} {name}" for name, number in reasons.items() if number)
    raise RequestError(
        f"data.cutoff: none of the first {len(segment)} examples can be trained on: {said} ({job.data.cutoff} tokens); "
        "raise data.cutoff or mend the data"
    )


def _by_set(names: list[str], counts: list[int]) -> dict[str, Any]:
    """What `result.json` says of the examples that were left out or cut, per data set."""
    of_set = {name: counts[i * len(COUNTERS) : (i + 1) * len(COUNTERS)] for i, name in enumerate(names)}
    return {
        "dropped": {name: dict(zip(DROP_REASONS, numbers, strict=False)) for name, numbers in of_set.items()},
        "held_out": {name: numbers[HELD_OUT] for name, numbers in of_set.items()},
        "cut": {name: {"examples": numbers[CUT], "tokens": numbers[TOKENS_CUT]} for name, numbers in of_set.items()},
    }


def _describe(work: Work) -> str:
    job, plan, device = work.job, work.plan, work.resources.device
    about = "" if plan.is_exact else "about "
    sets = ", ".join(
        f"{data_set.name} ({about if data_set.length is None else ''}{data_set.estimated_rows} rows)"
        for data_set in plan.sets
    )
    goal = f"{job.train.max_steps} steps" if job.train.max_steps else f"{job.train.epochs} epoch(s)"
    return (
        f"{job.stage.type} with {job.method.type} on {job.train.workers} {device.upper()} worker(s), "
        f"deepspeed {job.train.deepspeed}, {goal} of {about}{plan.estimated_epoch_length} examples from {sets}"
    )
