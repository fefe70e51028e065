"""`rayloom k8s`: manifests from job files, and manifests checked."""

from __future__ import annotations

import click

from rayloom.cli.options import JOB_FILE, OVERRIDES


@click.group()
def k8s() -> None:
    """Kubernetes: a job as a KubeRay manifest, and manifests checked without a cluster."""


@k8s.command()
@JOB_FILE
@OVERRIDES
@click.option(
    "--overlay",
    type=click.Choice(["cpu", "gpu", "kueue", "dev"]),
    default="cpu",
    show_default=True,
    help="What kind of cluster it is for.",
)
@click.option("--service", is_flag=True, help="A RayService that answers with what the job has trained.")
@click.option("--name", help="Of the RayJob or RayService. Default: the job's name.")
@click.option("--image", help="Container image with a version. Default: the overlay's.")
@click.option("--queue", help="Kueue's LocalQueue. Default: the overlay's.")
@click.option("--storage-path", metavar="DIR", default="/shared", show_default=True, help="Where the claim is mounted.")
@click.option("--claim", default="rayloom-shared", show_default=True, help="The ReadWriteMany claim.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write to this file. Default: print it.")
def render(
    job_file: str,
    overrides: tuple[str, ...],
    overlay: str,
    service: bool,
    name: str | None,
    image: str | None,
    queue: str | None,
    storage_path: str,
    claim: str,
    output: str | None,
) -> None:
    """Write a job as a RayJob of KubeRay, and the ConfigMap that holds its job file; or, with --service, the RayService
    that answers with the job's model afterwards, behind an OpenAI API.

    Relative paths of the job are taken from the image's checkout; relative output_dir from the shared storage.

    \b
    rayloom k8s render jobs/demo.yaml --overlay gpu -o demo.yaml && kubectl apply -f demo.yaml
    rayloom k8s render jobs/demo.yaml --overlay gpu --service | kubectl apply -f -
    """
    from dataclasses import replace
    from pathlib import Path

    from rayloom.config.read import read_job
    from rayloom.k8s.check import check_documents
    from rayloom.k8s.overlay import OVERLAYS
    from rayloom.k8s.ray_pods import Places, dump
    from rayloom.k8s.render import render as render_job
    from rayloom.k8s.service import render_service

    chosen = OVERLAYS[overlay]
    chosen = replace(chosen, image=image or chosen.image, queue=queue or chosen.queue)
    places = Places(storage=storage_path, claim=claim)
    write = render_service if service else render_job
    documents = write(read_job(job_file, overrides), chosen, places, name=name)
    check_documents([document for document in documents if document.kind != "ConfigMap"])
    if output:
        Path(output).write_text(dump(documents), encoding="utf-8")
    else:
        click.echo(dump(documents), nl=False)


@k8s.command("check")
@click.argument("paths", nargs=-1, required=True, metavar="DIR|FILE...", type=click.Path(exists=True))
def check_(paths: tuple[str, ...]) -> None:
    """Check manifests without a cluster: KubeRay's schemas, what its operator refuses, and Rayloom's policy.

    A folder with a kustomization.yaml is built by kubectl.

    \b
    rayloom k8s check k8s/overlays/gpu demo.yaml
    """
    from rayloom.k8s.check import check

    for path in paths:
        click.echo(f"{path}: {len(check(path))} manifests are in order")
