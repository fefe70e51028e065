"""A job at work: Ray Train in a thread; the main thread listens, writes, hands signals on, and goes on after faults.

    fit -> a fault, or a node that will be taken away -> the workers that fit now -> fit, from the last checkpoint

What is a fault, and what would only happen again, is in `rayloom.train.faults`.
"""

from __future__ import annotations

import json
import platform
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from ray.util import remove_placement_group

from rayloom import __version__
from rayloom.data.rows import COUNTERS, CUT, DROP_REASONS, HELD_OUT, TOKENS_CUT
from rayloom.errors import JobError, RequestError
from rayloom.train.checkpoints import keep_snapshot
from rayloom.train.engines import engine_bundles
from rayloom.train.faults import draining_nodes, fault_of
from rayloom.train.gauges import Gauges, JobGauges
from rayloom.train.host import Host
from rayloom.train.launch import Work, ray_trainer
from rayloom.train.monitor import answer, start_monitor
from rayloom.train.report import Reporter, mean_loss, plot_loss, plot_reward
from rayloom.train.resources import room_for_more, settle_workers
from rayloom.train.signals import Signals
from rayloom.train.track import Trackers

_POLL_SECONDS = 0.25
_WATCH_SECONDS = 2.0  # between two looks at the nodes
_GROW_SECONDS = 60.0  # between two tries to get more workers
_SHOW_SECONDS = 2.0  # between two updates of Ray's gauges
_VERSIONS = ("ray", "torch", "transformers", "peft", "accelerate", "deepspeed")


class Execution:
    """What the driver does from the first worker to `result.json`."""

    def __init__(self, work: Work, reporter: Reporter, phases: dict[str, float], host: Host | None = None) -> None:
        self._work, self._reporter, self._phases, self._host = work, reporter, phases, host
        self._asked = work.asked
        self._trackers: Trackers | None = None  # from the first row of metrics on
        self._gauges = JobGauges(Gauges(work.job.name), work.fleet)
        self._monitor = start_monitor()
        self._nodes: set[str] = set()  # where workers are
        self._group: Any = None  # the placement group that the workers hold
        self._outcome: dict[str, Any] | BaseException | None = None
        self._refused: RequestError | None = None
        self._failed: str | None = None  # why, as the first worker that gave up says it
        self._trains = False
        self._is_starting = True  # no row of metrics yet since the workers were started last
        self._checkpoint_time: float | None = None  # of the last one that counts, or of the first row
        self._collecting = threading.Lock()
        self._breaks: list[dict[str, Any]] = []  # faults and moves, for `result.json`
        self._stop_asked = False
        self._move: str | None = None  # why the workers were told to stop, if not for good
        self._watched = self._tried_to_grow = self._shown = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Train; return what `result.json` holds. On the way: metrics to file and screen, signals to the workers.

        Raises:
            RequestError: a worker refused the request: nothing was written, or what was trained before is kept.
            JobError: the job failed.
        """
        thread = threading.Thread(target=self._fit, daemon=True)
        try:
            with Signals(self._ask_to_stop):
                thread.start()
                while thread.is_alive():
                    thread.join(_POLL_SECONDS)
                    if self._host is not None and self._host.stop.is_set() and not self._stop_asked:
                        self._ask_to_stop("told to end")
                    self._collect()
                    self._watch()
                    self._show()
            self._collect()
        except KeyboardInterrupt:
            if not self._trains:
                self._work.run.undo()
            raise
        finally:
            if self._trackers is not None:
                self._trackers.close()
        if isinstance(self._outcome, dict):
            return self._finish(self._outcome)
        raise self._failure(self._outcome)

    # --- in the thread: Ray Train, again and again -----------------------------------------------------------------

    def _fit(self) -> None:
        try:
            steps, summary = -1, None
            while summary is None or not self._work.is_done(summary):
                try:
                    # Once more also where one execution of the pipeline was not enough.
                    summary = ray_trainer(self._work, self._monitor).fit().return_value
                except Exception as error:
                    self._break(error)
                    summary = None
                    continue
                if isinstance(checkpoints := self._work.run.checkpoints, Path):
                    keep_snapshot(checkpoints)
                if summary["status"] == "stopped" and self._move and not self._stop_asked:
                    self._go_on("moved", self._move)
                    summary = None
                    continue
                if summary["steps"] == steps and not self._work.is_done(summary):
                    raise JobError(
                        f"no example of {self._work.segments_at_once} segments on end can "
                        "be trained on: all are longer than data.cutoff or have no answer"
                    )
                steps = summary["steps"]
            self._outcome = summary
        except BaseException as error:
            self._outcome = error

    def _break(self, error: Exception) -> None:
        """Raise what would happen again; after a fault of a machine or a process, go on."""
        self._collect()
        what = fault_of(error)
        faults = sum(item["kind"] == "fault" for item in self._breaks)
        if self._refused or self._failed or what is None:
            raise error
        if faults >= self._work.job.train.max_failures:
            raise JobError(f"{what}. It was failure {faults + 1}; train.max_failures is {faults}") from error
        self._go_on("fault", what)

    def _go_on(self, kind: str, what: str) -> None:
        """Begin again at the last checkpoint, with the workers that fit now.

        With another monitor: what a worker says that has outlived its controller is of no interest.
        """
        with self._collecting:
            self._monitor, self._nodes, self._move = start_monitor(), set(), None
            self._is_starting = True
        if self._stop_asked:
            self._monitor.request_stop.remote()
        if self._work.fleet is not None:
            self._work.fleet.abandon()
        if self._group is not None:
            remove_placement_group(self._group)  # a controller that was killed has left it
            self._group = None
        step = self._work.run.cut_back()
        self._breaks.append({"kind": kind, "what": what, "time": time.time(), "from_step": step})
        self._reporter.say(f"{what}; goes on from step {step}")
        train, resources = settle_workers(
            self._asked,
            wait=True,
            jobs=self._host.jobs if self._host else 1,
            held=sum(engine["CPU"] for engine in engine_bundles(self._work.job, self._work.resources.device)),
            gpus=self._work.job.rollout.gpus_per_worker,
        )
        job = self._work.job.model_copy(update={"train": train})
        self._work = replace(self._work, job=job, resources=resources)
        self._tried_to_grow = time.monotonic()

    # --- in the main thread: what the workers say, what the nodes do -----------------------------------------------

    def _ask_to_stop(self, name: str) -> None:
        self._stop_asked = True
        self._reporter.say(f"{name}: saving a checkpoint after this step, then stopping; once more stops at once")
        self._monitor.request_stop.remote()

    def _watch(self) -> None:
        """Ask the workers to save and leave where a node will be taken away, or where more of them fit now."""
        now = time.monotonic()
        if self._move or self._stop_asked or not self._trains or now < self._watched + _WATCH_SECONDS:
            return
        self._watched = now
        workers = self._work.job.train.workers
        if leaving := draining_nodes() & self._nodes:
            self._ask_to_move(f"{len(leaving)} node(s) will be taken away")
        elif workers < self._asked.workers and now > self._tried_to_grow + _GROW_SECONDS:
            self._tried_to_grow = now
            if more := room_for_more(self._asked, workers, self._work.resources):
                self._ask_to_move(f"there is room for {more} workers")

    def _ask_to_move(self, why: str) -> None:
        self._move = why
        self._reporter.say(f"{why}: saving a checkpoint after this step")
        self._monitor.request_stop.remote()

    def _show(self) -> None:
        """Give Ray's gauges what is in no row of metrics."""
        if (now := time.monotonic()) < self._shown + _SHOW_SECONDS:
            return
        self._shown = now
        state = "stopping" if self._stop_asked or self._move else "starting" if self._is_starting else "training"
        self._gauges.show(state, [item["kind"] for item in self._breaks], self._checkpoint_time)

    def _collect(self) -> None:
        with self._collecting:
            for event in answer(self._monitor.collect.remote(), "the driver"):
                self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        run = self._work.run
        if event["kind"] == "phase":
            self._phases.setdefault(event["name"], event["time"])
        elif event["kind"] == "refused":
            self._refused = RequestError(*event["messages"])
        elif event["kind"] == "failed":
            self._failed = self._failed or event["text"]
        elif event["kind"] == "say":
            for line in event["lines"]:
                self._reporter.say(line)
        elif event["kind"] == "node":
            self._nodes.add(event["id"])
        elif event["kind"] == "placement group":
            self._group = event["group"]
        elif event["kind"] == "checkpoint":
            self._checkpoint_time = event["time"]
        elif event["kind"] == "pinned":
            if self._host is not None:
                self._host.pinned(Path(event["place"]))
        elif event["kind"] == "manifest":
            with run.manifest_file.open("a") as file:
                file.write(json.dumps(event["row"]) + "\n")
        else:
            if not self._trains:
                self._trains = True
                run.settle()
            self._is_starting = False
            self._checkpoint_time = self._checkpoint_time or time.time()
            if self._breaks:
                self._breaks[-1].setdefault("seconds", round(time.time() - self._breaks[-1]["time"], 2))
            with run.metrics_file.open("a") as file:
                file.write(json.dumps(event["row"]) + "\n")
            self._reporter.show(event["row"])
            if self._trackers is None:
                self._trackers = Trackers(self._work.job, run.path, self._reporter.say)
            self._trackers.log(event["row"])
            if self._host is not None:
                self._host.take(event["row"])

    # --- the end ------------------------------------------------------------------------------------------------------

    def _failure(self, error: BaseException | None) -> Exception:
        run = self._work.run
        if self._refused is not None:
            if not self._trains and (run.existed or not self._has_checkpoint(unknown=True)):
                run.undo()
                return self._refused
            self._failed = str(self._refused)  # a row far behind the part that is checked before, say
        trace = str(error) if isinstance(error, JobError | RequestError) else f"{type(error).__name__}: {error}"
        text = self._failed or trace[-4000:]
        if not self._trains and run.replaced is not None:
            run.undo()
            return JobError(f"{self._work.job.name} failed before its first step. {text}\nThe earlier run is kept")
        hint = (
            "\nThe last checkpoint is kept: resume=true goes on from it" if self._has_checkpoint(unknown=False) else ""
        )
        try:
            self._write({"status": "failed", "error": text})
        except JobError as error_of_storage:
            hint += f"\n{error_of_storage}"
        if self._refused is not None:
            return RequestError(*self._refused.messages, f"What was trained until then is kept in {run.place}{hint}")
        return JobError(f"{self._work.job.name} failed. {text}{hint}")

    def _has_checkpoint(self, *, unknown: bool) -> bool:
        """Args:
        unknown: the answer where a storage that refuses cannot be asked either.
        """
        try:
            return self._work.run.latest_checkpoint() is not None
        except RequestError:
            return unknown

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
            if self._work.fleet is not None:
                of_rewards = [row for row in metrics if "eval_reward" in row]
                plot_reward(rows, of_rewards, run.path / "reward.png", self._work.job.name)
        return self._write(summary)

    def _engines(self) -> dict[str, Any]:
        """Of stage ppo: what the engines did, and which of them broke."""
        if self._work.fleet is None:
            return {}
        try:
            return {"engines": self._work.fleet.metrics(), "engine_breaks": self._work.fleet.events()}
        except JobError as error:  # it may be why the job has failed
            return {"engines": None, "engine_breaks": [{"what": str(error)}]}

    def _write(self, summary: dict[str, Any]) -> dict[str, Any]:
        marks = sorted(self._phases.items(), key=lambda item: item[1])
        seconds = {name: round(time_ - marks[i][1], 2) for i, (name, time_) in enumerate(marks[1:])}
        result = {
            "name": self._work.job.name,
            **summary,
            "breaks": self._breaks,
            **self._engines(),
            "seconds": round(time.time() - self._phases["start"], 2),
            "seconds_to_first_step": seconds,
            "versions": {"rayloom": __version__, "python": platform.python_version()}
            | {name: version(name) for name in _VERSIONS},
        }
        self._work.run.write_result(result)
        self._work.run.finish()
        return result


def _by_set(names: list[str], counts: list[int]) -> dict[str, Any]:
    """What `result.json` says of the examples that were left out or cut, per data set."""
    of_set = {name: counts[i * len(COUNTERS) : (i + 1) * len(COUNTERS)] for i, name in enumerate(names)}
    return {
        "dropped": {name: dict(zip(DROP_REASONS, numbers, strict=False)) for name, numbers in of_set.items()},
        "held_out": {name: numbers[HELD_OUT] for name, numbers in of_set.items()},
        "cut": {name: {"examples": numbers[CUT], "tokens": numbers[TOKENS_CUT]} for name, numbers in of_set.items()},
    }
