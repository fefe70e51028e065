"""A search from its job file to its best job.

<run directory>/search.json     every trial: values, metric, status
                best.yaml       a job that repeats the best trial
                search.png      the trials, and the best of them over time
                trials/         a run directory for each
                population/     of a population: checkpoints that are kept for others to take over
                tune/           Ray Tune's own state, from which a search that was ended goes on
                tune.log        what Ray Tune has to say, if anything

Ray Tune proposes, starts and stops; what it tells of the trials is written down by `rayloom.search.ledger`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

from rayloom.collector import collector_off
from rayloom.config.document import Document
from rayloom.config.job import JobConfig
from rayloom.errors import JobError, RequestError
from rayloom.search.pipeline_plan import PipelineSearchPlan, plan_pipeline_search
from rayloom.search.plan import SearchPlan, plan_search
from rayloom.search.population import history
from rayloom.search.results import Ledger, best_trial, read_ledger, trials_left, write_ledger
from rayloom.search.takeover import POPULATION
from rayloom.stages.prepare import plan_data, prepare_eval
from rayloom.train.driver import check_model_and_method
from rayloom.train.ray_session import own_ray, prepare_environment, ray_session
from rayloom.train.run_dir import RunDir, check_run_dir, open_run_dir
from rayloom.train.signals import Signals

TUNE, LOG = "tune", "tune.log"
# Tune's own files of results would say again what a trial's metrics.jsonl says; not every row has the metric; and
# Ctrl-C is told to the trials first.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # whose `verbose=0` still prints a banner
}
_DRIVER_SHARE = 0.001


def run_search(document: Document, *, verbose: bool = False) -> dict[str, Any]:
    """Run a job's search to its end. Returns what `search.json` holds, with the best trial as `best`.

    Raises:
        RequestError: the request was wrong, or the job does not report the metric; nothing was written.
        JobError: the search was stopped, or every trial failed.
    """
    prepare_environment()
    os.environ.update(_ENVIRONMENT)
    plan, jobs = plan_pipeline_search(document) if "steps" in document.data else plan_search(document)
    run = _check_folder(plan)
    with own_ray() as own:
        for job in jobs[: plan.jobs_each]:
            plan_data(job)
            prepare_eval(job)
            with collector_off():
                check_model_and_method(job, job.train.device)
        with ray_session(verbose=verbose, own=own):
            at_once = min([_jobs_that_fit(jobs), plan.trials, *filter(None, [plan.search.concurrent])])
            if not plan.job.resume:
                run = open_run_dir(plan.job, run)
                (plan.folder / "job.yaml").write_text(plan.text(), encoding="utf-8")
            print(f"{plan.job.name}: {plan.trials} trials, {at_once} at a time, by {plan.search.metric}", flush=True)
            _tune(plan, at_once)
    return _finish(plan, run)


def _check_folder(plan: SearchPlan) -> RunDir:
    """Refuse to write over a run or another search, and to go on with what is not there.

    Raises:
        RequestError: naming `resume`, `overwrite` or `output_dir`.
    """
    job, folder = plan.job, plan.folder
    if not job.resume:
        return check_run_dir(job)
    if not (folder / "search.json").exists() and not (folder / TUNE).exists():
        raise RequestError(f"resume: there is no search in {folder}; start without resume=true")
    if changed := plan.changed_since(folder / "job.yaml"):
        raise RequestError(
            f"resume: {', '.join(changed)} differs from the search's own ({folder / 'job.yaml'}); "
            "it must stay as it was"
        )
    if not trials_left(read_ledger(folder), plan.trials):
        raise RequestError(f"resume: the search in {folder} is finished; nothing is left to do")
    return RunDir(folder, existed=True)


def _jobs_that_fit(jobs: list[JobConfig]) -> int:
    """How many trials the cluster holds at a time, whichever they are.

    Raises:
        RequestError: one asks for more than there is.
    """
    from rayloom.train.engines import engine_bundles
    from rayloom.train.resources import jobs_that_fit

    if any(job.rollout.share_gpus for job in jobs):
        return 1  # else Ray might put a worker beside the engine of another trial
    different = {json.dumps([_what_it_takes(job)]): job for job in jobs}
    return min(
        jobs_that_fit(job.train, partial(engine_bundles, job), job.rollout.gpus_per_worker)
        for job in different.values()
    )


def _what_it_takes(job: JobConfig) -> list[Any]:
    train, rollout = job.train, job.rollout
    engines = [rollout.engines, rollout.cpus_per_engine, rollout.gpus_per_engine]
    return [train.possible_workers, train.cpus_per_worker, train.device, *engines]


def _tune(plan: SearchPlan, at_once: int) -> None:
    """Run Ray Tune until all trials have ended, or the search was told to stop."""
    import logging

    import ray
    from ray import tune

    from rayloom.search.algorithms import scheduler_of, searcher_of, space_of
    from rayloom.search.ledger import LedgerWriter, StopWhenRefused
    from rayloom.search.member import MemberRun
    from rayloom.search.pipeline_trial import PipelineTrialRun
    from rayloom.search.trial import TrialRun, TrialTask
    from rayloom.search.turns import start_turns
    from rayloom.train.monitor import start_monitor

    # What it has to say to a person, the ledger says.
    log = logging.getLogger("ray.tune")
    log.propagate = False
    log.handlers = [logging.FileHandler(plan.folder / LOG, delay=True)]
    monitor = start_monitor()
    is_population = plan.search.scheduler == "population"
    turns = start_turns(plan.folder, at_once) if is_population else None
    kind = PipelineTrialRun if isinstance(plan, PipelineSearchPlan) else MemberRun if is_population else TrialRun
    task = TrialTask(plan, at_once, str(Path.cwd()), monitor, turns)
    # On this very node, and of next to nothing: a trial's own workers take what they need.
    here = {f"node:{ray.util.get_node_ip_address()}": _DRIVER_SHARE, "CPU": 0}
    trainable = tune.with_resources(tune.with_parameters(kind, task=task), tune.PlacementGroupFactory([here]))
    state = str(plan.folder / TUNE)

    def stop(name: str) -> None:
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            raise KeyboardInterrupt  # Tune has not begun
        print(f"{name}: the trials save a checkpoint and stop; once more stops at once", flush=True)
        monitor.request_stop.remote()

    if plan.job.resume and tune.Tuner.can_restore(state):
        tuner = tune.Tuner.restore(state, trainable, resume_unfinished=True)
    else:
        name = partial(_trial_name, plan.job.name, 1 if plan.points is not None else 0)
        tuner = tune.Tuner(
            trainable,
            param_space=space_of(plan),
            tune_config=tune.TuneConfig(
                metric=plan.search.metric,
                mode=plan.search.mode,
                search_alg=searcher_of(plan.search),
                scheduler=scheduler_of(plan.search),
                num_samples=plan.trials if plan.points is None else 1,
                max_concurrent_trials=plan.trials if is_population else at_once,  # which takes turns itself
                trial_name_creator=name,
                trial_dirname_creator=name,
            ),
            run_config=tune.RunConfig(
                name=TUNE,
                storage_path=str(plan.folder),
                stop=StopWhenRefused(),
                callbacks=[LedgerWriter(plan)],
                # A trial is a job, which keeps its own; by default Tune asks for one when a trial ends.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
            ),
        )
    with Signals(stop):
        tuner.fit()


def _trial_name(search: str, offset: int, trial: Any) -> str:
    """`NAME-0001`: Tune's tag of a trial begins with its number, which searchers count from 1 and lists from 0."""
    return f"{search}-{int(trial.experiment_tag.split('_')[0]) + offset:04d}"


def _heading(ledger: Ledger, best: dict[str, Any]) -> str:
    """What `best.yaml` begins with."""
    lines = [f"Trial {best['name']} of {ledger['name']}."]
    parts = history(ledger, best["name"])
    if len(parts) > 1:
        lines += [
            "It took over checkpoints of other trials, with changed values, which no job file can repeat. This job has",
            f"the values of the end for all of its steps. What the trial has trained is in {best['run_dir']}/model.",
        ]
        for part in parts:
            shown = ", ".join(f"{key} {value}" for key, value in part["values"].items())
            lines.append(f"  from step {part['step']}, in {part['trial']}: {shown}")
    return "\n".join(f"# {line}" for line in lines)


def _finish(plan: SearchPlan, run: RunDir) -> dict[str, Any]:
    from rayloom.search.show import draw

    ledger = read_ledger(plan.folder)
    if refused := ledger.get("refused"):
        shutil.rmtree(plan.folder / TUNE, ignore_errors=True)
        run.undo()
        raise RequestError(refused)
    run.settle()
    best = best_trial(ledger)
    ledger["best"] = best and best["name"]
    write_ledger(plan.folder, ledger)
    if best is not None:
        text = plan.best_text(best["point"])
        (plan.folder / "best.yaml").write_text(f"{_heading(ledger, best)}\n{text}", encoding="utf-8")
        draw(ledger, plan.folder / "search.png")
    if left := trials_left(ledger, plan.trials):
        raise JobError(f"stopped with {left} trials to go; resume=true goes on with the search in {plan.folder}")
    shutil.rmtree(plan.folder / POPULATION, ignore_errors=True)
    if best is None:
        reasons = list(dict.fromkeys(trial["error"] for trial in ledger["trials"] if trial["error"]))
        raise JobError(f"every trial failed: {'; '.join(reasons[:3])}")
    return ledger
