"""`rayloom submit` and `rayloom jobs`: Rayloom's jobs on a cluster."""

from __future__ import annotations

import sys
from typing import Any

import click

from rayloom.cli.options import ADDRESS, JOB_FILE, OVERRIDES
from rayloom.errors import RequestError


@click.command()
@JOB_FILE
@OVERRIDES
@ADDRESS
@click.option("--working-dir", metavar="DIR", help="What the job finds as its current directory. Default: this one.")
@click.option(
    "-f/-n",
    "--follow/--no-wait",
    default=None,
    help="Show the job's log until it ends, and end with its exit status; or return at once. [default: no-wait]",
)
@click.option(
    "--retries",
    metavar="N",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Submit a job that failed again, to go on in its run directory, at most N times. Follows it.",
)
@click.option("--driver-cpus", metavar="N", type=click.FloatRange(min=0), help="CPUs that Ray reserves for the driver.")
@click.option("--driver-memory", metavar="GIB", type=click.FloatRange(min=0), help="The same for memory, in GiB.")
@click.option(
    "--driver-resource", metavar="NAME=N", multiple=True, help="The same for a resource of the cluster's own."
)
def submit(
    job_file: str,
    overrides: tuple[str, ...],
    address: str | None,
    working_dir: str | None,
    follow: bool | None,
    retries: int,
    driver_cpus: float | None,
    driver_memory: float | None,
    driver_resource: tuple[str, ...],
) -> None:
    """Run a job on a cluster, as a Ray job: the same as `train`, from a copy of the working directory.

    A run has one job at a time: while one is at work in its run directory, another one is refused.

    \b
    rayloom submit jobs/demo.yaml --address http://HOST:8265 --follow
    rayloom submit jobs/demo.yaml output_dir=/shared/runs --retries 2
    """
    from rayloom.jobs.client import connect
    from rayloom.jobs.retry import run_to_end
    from rayloom.jobs.submit import DriverResources, Submission, prepared, send

    if retries and follow is False:
        raise RequestError("--retries needs somebody who waits for the job's end: leave --no-wait out")
    custom = dict(map(_resource, driver_resource))
    client = connect(address)
    driver = DriverResources(driver_cpus, driver_memory, custom)

    def tell(submission: Submission) -> None:
        click.echo(f"submitted {submission.id} ({submission.package_bytes / 2**20:.1f} MiB)")

    with prepared(job_file, overrides, working_dir=working_dir, driver=driver) as job:
        for note in job.notes:
            click.echo(f"note: {note}")
        if not (follow or retries):
            submission = send(client, job)
            tell(submission)
            click.echo(f"see it with: rayloom jobs logs --follow {submission.id}")
            return

        def show(submission: Submission) -> None:
            tell(submission)
            _show_log(client, submission.id)

        _end_as(run_to_end(client, job, retries=retries, follow=show, say=click.echo))


@click.group()
def jobs() -> None:
    """See and stop the jobs of a cluster."""


@jobs.command("list")
@ADDRESS
def list_(address: str | None) -> None:
    """List the cluster's jobs, the newest last."""
    from rich.console import Console
    from rich.table import Column, Table

    from rayloom.jobs.client import connect, list_jobs

    names = ("job", "status", "stage", "started", "run directory")
    table = Table(*(Column(name, overflow="fold") for name in names), box=None, pad_edge=False)
    for job in list_jobs(connect(address)):
        started = job.started.strftime("%Y-%m-%d %H:%M:%S") if job.started else "-"
        table.add_row(job.id, job.status, job.stage or "-", started, job.run_dir or "-")
    Console().print(table)


@jobs.command()
@click.argument("job_id")
@ADDRESS
def status(job_id: str, address: str | None) -> None:
    """Say how a job is. Ends with status 1 when it failed."""
    from rayloom.jobs.client import connect, job_status

    job = job_status(connect(address), job_id)
    click.echo(f"{job.id}  {job.status}")
    told = {
        "run directory": job.run_dir,
        "stage": job.stage,
        "commit": job.commit,
        "config": job.config_hash,
        "attempt": str(job.attempt) if job.attempt > 1 else "",
        "command": job.entrypoint,
        "message": job.message,
    }
    for name, value in told.items():
        if value:
            click.echo(f"{name}: {value.strip()}")
    if job.status == "FAILED":
        sys.exit(1)


@jobs.command()
@click.argument("job_id")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends, and end with its exit status.")
@ADDRESS
def logs(job_id: str, follow: bool, address: str | None) -> None:
    """Print what a job has written."""
    from rayloom.jobs.client import connect, job_logs

    client = connect(address)
    if follow:
        _follow(client, job_id)
    else:
        click.echo(job_logs(client, job_id), nl=False)


@jobs.command()
@click.argument("job_id")
@click.option("--wait", default=660.0, show_default=True, metavar="SECONDS", help="How long to wait for its end.")
@ADDRESS
def stop(job_id: str, wait: float, address: str | None) -> None:
    """Stop a job. It saves a checkpoint first; submit it again with resume=true to go on."""
    from rayloom.jobs.client import connect, stop_job

    job = stop_job(connect(address), job_id, wait=wait)
    click.echo(f"{job.id}  {job.status}")


def _follow(client: Any, job_id: str) -> None:
    """Show a job's log to its end; a job that did not succeed ends this command with the job's own exit status."""
    from rayloom.jobs.client import job_status

    _show_log(client, job_id)
    _end_as(job_status(client, job_id))


def _show_log(client: Any, job_id: str) -> None:
    from rayloom.jobs.client import follow_logs
    from rayloom.train.report import Reporter

    with Reporter() as reporter:
        for line in follow_logs(client, job_id):
            reporter.line(line)


def _end_as(job: Any) -> None:
    if job.status != "SUCCEEDED":
        click.echo(f"{job.id}  {job.status}", err=True)
        sys.exit(job.exit_code if job.exit_code and job.exit_code > 0 else 1)


def _resource(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    try:
        if name and float(amount) > 0:
            return name, float(amount)
    except ValueError:
        pass
    raise RequestError(f"--driver-resource {text}: write it as NAME=N, N above 0, for example driver=1")
