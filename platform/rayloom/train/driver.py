"""A job from its config to its result. Holds no model: it checks, plans, starts, listens and writes.

    check the request -> Ray -> check the cluster -> plan the stream -> Ray Train -> result

Everything that can be refused is refused before the run directory is made.
"""

from __future__ import annotations

import json
import logging
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from rayloom.collector import collector_off
from rayloom.config.job import JobConfig
from rayloom.data.plan import Plan, Position
from rayloom.data.rows import COUNTERS
from rayloom.data.segment import Encoder, EncodeSegment, SegmentOptions
from rayloom.data.walk import Walk
from rayloom.errors import RequestError
from rayloom.methods.optimizers.support import check_environment
from rayloom.methods.rules import check_combination
from rayloom.models.check import check_model
from rayloom.models.precision import choose_precision, computes_bf16
from rayloom.stages.prepare import make_encoder, plan_data, prepare_eval, segment_options, with_stores
from rayloom.stages.reference import reference_place
from rayloom.stages.rules import check_stage
from rayloom.train.deepspeed import read_deepspeed_json
from rayloom.train.host import Host
from rayloom.train.launch import Work
from rayloom.train.ppo_rules import check_ppo
from rayloom.train.ray_session import own_ray, prepare_environment, ray_session
from rayloom.train.report import Reporter
from rayloom.train.run_dir import check_data, check_run_dir, open_run_dir
from rayloom.train.track import check_trackers

_SEGMENTS_AT_ONCE = 10_000
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")  # say on import which of their kernels are not there


def run_job(job: JobConfig, *, started: float, verbose: bool = False, host: Host | None = None) -> dict[str, Any]:
    """Run a job to its end, or to a checkpoint when it is told to stop. Returns what `result.json` holds.

    Args:
        started: time of day (seconds) at which the user asked for it, for the report of the start-up's phases.
        host: who runs it from within a Ray session, and listens; None: the job has a session of its own.

    Raises:
        RequestError: the request was wrong; nothing was written.
        JobError: the job failed; the run directory says how far it came.
    """
    phases = {"start": started}
    if host is None:
        prepare_environment()
    with own_ray() if host is None else nullcontext() as own:  # it starts while the job is checked
        run = check_run_dir(job)
        plan, eval_plan, encoder, options, first, deepspeed = check_job(job)
        if job.resume:
            check_data(run, plan.fingerprints)
        phases["checks"] = time.time()

        session = ray_session(verbose=verbose, own=own) if host is None else nullcontext(False)
        asked = job.train if host is None else host.patient(job.train)
        with Reporter() as reporter, session as own_cluster:
            # These load Ray, which reads what `prepare_environment` has set.
            from rayloom.train.engines import engine_bundles, engines_of
            from rayloom.train.execution import Execution
            from rayloom.train.resources import settle_workers

            phases["ray"] = time.time()
            train, resources = settle_workers(
                asked,
                wait=not own_cluster,
                beside=partial(engine_bundles, job),
                jobs=host.jobs if host else 1,
                gpus=job.rollout.gpus_per_worker,
            )
            has_bf16 = resources.device == "gpu" or computes_bf16("cpu")
            precision = choose_precision(job.train.precision, resources.device, bf16=has_bf16)
            _check_model(job, resources.device)
            check_environment(job.optimizer, resources.device)
            run = open_run_dir(job, run)
            run.data_file.write_text(json.dumps(plan.fingerprints, indent=2) + "\n")
            try:
                run.follow(reporter.say)
            except RequestError:
                run.undo()
                raise
            settled = job.model_copy(update={"train": train})
            work = Work(
                job=settled,
                asked=asked,
                run=run,
                plan=plan,
                eval_plan=eval_plan,
                encoder=encoder,
                options=options,
                first=first,
                resources=resources,
                segments_at_once=_SEGMENTS_AT_ONCE,
                deepspeed=deepspeed,
                own_cluster=own_cluster,
                reference=reference_place(job, plan, eval_plan, encoder, precision, resources.device),
                pins=host.pins if host is not None else None,
            )
            reporter.say(f"{job.name}: {_describe(work)}")
            for data_set, store in zip(plan.sets, options.stores, strict=True):
                if store:
                    reporter.say(f"{data_set.name}: prepared tokens are read from {store}")
            if work.reference is not None and work.reference.is_whole:
                reporter.say(f"reference log-probabilities are read from {work.reference.folder}")
            with ExitStack() as stack:
                try:
                    fleet = stack.enter_context(engines_of(job, resources.device, precision, first))
                except BaseException:
                    run.undo()
                    raise
                if fleet is not None:
                    phases["engines"] = time.time()
                return Execution(replace(work, fleet=fleet), reporter, phases, host).run()


class CheckedJob(NamedTuple):
    """A job that nothing speaks against before there is a cluster, and what was read of it on the way."""

    plan: Plan
    eval_plan: Plan | None
    encoder: Encoder
    options: SegmentOptions
    first: pa.Table
    """The rows of the stream's first segment."""
    deepspeed: dict[str, Any]
    """What `train.deepspeed_json` says."""


def check_job(job: JobConfig) -> CheckedJob:
    """Refuse all that can be refused without a cluster. Loads no weights, and looks at no run directory.

    Raises:
        RequestError: naming the key and what would be right.
    """
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    check_parts(job)
    deepspeed = read_deepspeed_json(job.train)
    plan = plan_data(job)
    eval_plan = prepare_eval(job)
    if job.train.device == "cpu":
        choose_precision(job.train.precision, "cpu", bf16=computes_bf16("cpu"))

    with collector_off():  # these import torch and transformers
        check_model_and_method(job, job.train.device)
        if job.stage.type == "ppo":
            from rayloom.train.ppo_check import (  # these load torch
                check_lengths_and_heads,
                check_reward_functions,
                check_reward_models,
            )

            check_reward_functions(job)
            check_lengths_and_heads(job)
            check_reward_models(job)
        encoder = make_encoder(job)
    options = with_stores(job, plan, encoder, segment_options(job))
    return CheckedJob(plan, eval_plan, encoder, options, _first_segment(job, plan, encoder, options), deepspeed)


def check_parts(job: JobConfig) -> None:
    """Refuse what the job's parts say against each other; reads no data and no model.

    Raises:
        RequestError: naming the key and what would be right.
    """
    check_combination(job)
    check_stage(job)
    check_ppo(job)
    check_environment(job.optimizer, job.train.device)
    check_trackers(job)


def check_model_and_method(job: JobConfig, device: str) -> None:
    """Refuse what does not go with the model, whose weights are not read. Imports torch.

    Raises:
        RequestError: naming the key and what would be right.
    """
    _check_model(job, device)
    _check_method(job)


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
