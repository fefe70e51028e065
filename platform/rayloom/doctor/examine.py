"""All checks in turn, and how their findings are shown. Changes nothing, takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayloom.config.job import JobConfig
from rayloom.doctor.cluster import ClusterCheck
from rayloom.doctor.finding import Finding, State
from rayloom.doctor.machine import check_cpu, check_gpu, check_memory, check_shared_memory, usable_cpus
from rayloom.doctor.software import check_compiler, check_optional_packages, check_packages, check_python
from rayloom.doctor.storage import check_model_cache, check_run_directories, check_temporary_files
from rayloom.errors import RequestError
from rayloom.models.precision import choose_precision, computes_bf16
from rayloom.models.source import check_model_path

_STYLES: dict[State, str] = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def examine(job: JobConfig | None = None) -> list[Finding]:
    """Look at Python, the machine, Ray and storage; with a job, also whether it could run here.

    Takes a few seconds, at most about 10: no network answer is waited for longer than 5 s.
    """
    cluster = ClusterCheck()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("Python", check_python),
        ("packages", check_packages),
        ("optional packages", check_optional_packages),
        ("CPU", check_cpu),
        ("memory", check_memory),
        ("GPU", check_gpu),
        ("compiler", lambda: check_compiler(job is not None and _builds_kernel(job))),
        ("shared memory", check_shared_memory),
        ("temporary files", check_temporary_files),
        ("model cache", check_model_cache),
        ("run directories", lambda: check_run_directories(job)),
    ]
    if job is not None:
        checks.append(("job", lambda: _job(job)))
    findings: list[Finding] = []
    for topic, check in [*checks, ("Ray", cluster.findings)]:
        try:
            findings += check()
        except Exception as error:  # one broken corner of the machine must not hide the others
            state: State = "bad" if isinstance(error, ImportError) else "warn"
            findings.append(Finding(topic, state, f"could not be examined: {type(error).__name__}: {error}"))
    return findings


def is_fit(findings: Sequence[Finding]) -> bool:
    """Whether nothing is bad."""
    return all(finding.state != "bad" for finding in findings)


def show_findings(findings: Sequence[Finding], console: Console) -> None:
    """A table, and a last line that sums it up; without a terminal, one whole line for each finding."""
    if console.is_terminal:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        before = ""
        for item in findings:
            topic = "" if item.topic == before else item.topic
            table.add_row(Text(item.state, _STYLES[item.state]), Text(topic, "bold"), Text(item.text))
            before = item.topic
        console.print(table)
    else:
        width = max(len(item.topic) for item in findings)
        for item in findings:
            console.print(Text(f"{item.state:4}  {item.topic:{width}}  {item.text}"), soft_wrap=True)
    bad, warned = (sum(item.state == state for item in findings) for state in ("bad", "warn"))
    console.print()
    if bad:
        console.print(Text(f"{bad} problem{'s' * (bad > 1)} to solve before jobs can run", _STYLES["bad"]))
    elif warned:
        console.print(Text(f"jobs can run; {warned} warning{'s' * (warned > 1)}", _STYLES["warn"]))
    else:
        console.print(Text("all is well", _STYLES["ok"]))


def _job(job: JobConfig) -> Iterator[Finding]:
    faults: list[str] = []
    try:
        check_model_path(job.model)
    except RequestError as error:
        faults += error.messages
    for data_set in job.data.train:
        if not Path(data_set.path).expanduser().is_file():
            faults.append(f"data.train: no such file: {data_set.path}")
    if _runs_here():
        faults += _local_faults(job)
    for fault in faults:
        yield Finding("job", "bad", fault)
    if not faults:
        resources = "are enough" if _runs_here() else "of the cluster are looked at when it starts"
        yield Finding("job", "ok", f"{job.name}: model and data files are there; CPUs and GPUs {resources}")


def _runs_here() -> bool:
    return os.environ.get("RAY_ADDRESS", "local") == "local"


def _builds_kernel(job: JobConfig) -> bool:
    return _runs_here() and job.train.deepspeed != "none" and _device(job) == "cpu"


def _local_faults(job: JobConfig) -> Iterator[str]:
    """What a Ray on this machine has not got for the job."""
    import torch

    train, device, gpus = job.train, _device(job), torch.cuda.device_count()
    if train.device == "gpu" and not gpus:
        yield "train.device: gpu: this machine has no GPU that torch can use; use cpu or auto"
        return
    try:
        choose_precision(train.precision, device, bf16=computes_bf16(device))
    except RequestError as error:
        yield from error.messages
    cpus, wanted = int(usable_cpus()), train.workers * train.cpus_per_worker
    if wanted > cpus:
        yield f"train.workers: {train.workers} x {train.cpus_per_worker:g} CPUs; this machine has {cpus}"
    if device == "gpu" and train.workers > gpus:
        yield f"train.workers: {train.workers} workers take a GPU each; this machine has {gpus}"


def _device(job: JobConfig) -> str:
    """What the job's workers would compute on here."""
    import torch

    return "gpu" if job.train.device != "cpu" and torch.cuda.is_available() else "cpu"
