"""The `rayloom` command. Heavy imports stay inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
import time

import click

from rayloom import __version__
from rayloom.errors import JobError, RequestError

STARTED = time.time()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="rayloom")
def cli() -> None:
    """Fine-tune language models on a Ray cluster: one YAML file is one job."""


@cli.command()
@click.argument("job_file", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("-v", "--verbose", is_flag=True, help="Show what Ray and the workers log.")
def train(job_file: str, overrides: tuple[str, ...], verbose: bool) -> None:
    """Run a job here: on the cluster that RAY_ADDRESS names, else on a private local Ray."""
    from rayloom.config.read import read_job
    from rayloom.train.driver import run_job

    result = run_job(read_job(job_file, overrides), started=STARTED, verbose=verbose)
    kept = [override for override in overrides if not override.startswith(("overwrite=", "resume="))]
    command = " ".join(["rayloom train", job_file, *kept])
    if result["status"] == "stopped":
        raise JobError(f"stopped after step {result['steps']}, with a checkpoint; to go on: {command} resume=true")
    click.echo(f"finished: {result['steps']} steps in {result['seconds']:.0f} s; the model is in {result['model_dir']}")


def main() -> None:
    """Entry point: the exit status is 0 done, 1 the job failed, 2 the request was wrong."""
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except RequestError as error:
        for message in error.messages:
            click.echo(f"error: {message}", err=True)
        sys.exit(2)
    except JobError as error:
        click.echo(str(error), err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(1)
