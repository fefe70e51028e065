"""`rayloom tune`: a search over a job."""

from __future__ import annotations

import click

from rayloom.cli.options import JOB_FILE, OVERRIDES


@click.command()
@JOB_FILE
@OVERRIDES
@click.option("--resume", is_flag=True, help="Go on with a search that was ended: the same as resume=true.")
@click.option("-v", "--verbose", is_flag=True, help="Show what Ray and the trials log.")
def tune(job_file: str, overrides: tuple[str, ...], resume: bool, verbose: bool) -> None:
    """Search for better values of a job's keys, as its `search` says: many trials, each a whole job, or a pipeline.

    \b
    rayloom tune jobs/search/learning-rate.yaml search.samples=8
    rayloom tune jobs/pipelines/sft-dpo-search.yaml
    """
    from rich.console import Console

    from rayloom.config.read import read_job_document
    from rayloom.pipeline.read import is_pipeline, read_pipeline_document
    from rayloom.search.run import run_search
    from rayloom.search.show import show

    read = read_pipeline_document if is_pipeline(job_file) else read_job_document
    document = read(job_file, [*overrides, *["resume=true"] * resume])
    show(run_search(document, verbose=verbose), Console())
