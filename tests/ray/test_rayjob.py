"""What is in a rendered RayJob runs: its entrypoint, runtime environment and metadata."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from tests.ray.machines import Machine, wait_for_nodes
from tests.ray.small_jobs import job, write_rows
from tests.ray.test_machines import machine

from rayloom.config.read import dump_job
from rayloom.jobs.client import connect, follow_logs, job_status, list_jobs
from rayloom.jobs.local_head import LocalHead
from rayloom.k8s.check import check_documents
from rayloom.k8s.documents import load_documents
from rayloom.k8s.leave import leave
from rayloom.k8s.overlay import OVERLAYS
from rayloom.k8s.ray_pods import Places, dump
from rayloom.k8s.render import render

__all__ = ["machine"]

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(400)


def test_the_manifest_runs(head: LocalHead, tiny_model: Path, tmp_path: Path) -> None:
    """Twice: a second attempt finds the finished run and leaves it as it is."""
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    train = {"workers": 1, "max_steps": 3, "cpus_per_worker": 3}
    config = job(tiny_model, tmp_path / "shared", [{"path": str(rows)}], name="manifest", train=train)
    places = Places(root=str(tmp_path), storage=str(tmp_path / "shared"), job=str(tmp_path / "mounted"))
    file = tmp_path / "manifest.yaml"
    file.write_text(dump(render(config, OVERLAYS["cpu"], places)))

    documents = load_documents(file)
    check_documents(documents)
    config_map, ray_job = (document.body for document in documents)
    (tmp_path / "mounted").mkdir()
    for name, text in config_map["data"].items():  # as the volume would show it
        (tmp_path / "mounted" / name).write_text(text)
    spec = ray_job["spec"]
    client = connect(head.address, environment=head.environment)
    submission: dict[str, Any] = {
        "entrypoint": spec["entrypoint"],
        "runtime_env": yaml.safe_load(spec["runtimeEnvYAML"]),
        "metadata": spec["metadata"],
    }

    first = client.submit_job(**submission)
    lines = list(follow_logs(client, first))
    status = job_status(client, first)
    assert (status.status, status.exit_code) == ("SUCCEEDED", 0), lines
    run_dir = tmp_path / "shared" / "manifest"
    assert (run_dir / "model").is_dir()
    (listed,) = (item for item in list_jobs(client) if item.id == first)
    assert (listed.name, listed.stage, listed.run_dir) == ("manifest", "sft", str(run_dir))

    second = client.submit_job(**submission)
    lines = list(follow_logs(client, second))
    assert job_status(client, second).exit_code == 2
    assert any("holds a finished run and is kept as it is" in line for line in lines), lines


@pytest.mark.slow
@pytest.mark.usefixtures("connected")
def test_an_idle_node_leaves_at_once(head: LocalHead, machine: Machine) -> None:
    with ray.init(address=head.cluster_address, namespace="test", logging_level="ERROR", log_to_driver=False):
        node_id = machine.node_id()
    assert leave(head.cluster_address, node_id, 60)
    wait_for_nodes(head, 1)
    gone = subprocess.run([sys.executable, "-m", "rayloom.k8s.leave", "--help"], capture_output=True, check=False)
    assert gone.returncode == 0


@pytest.mark.slow
def test_the_scheduled_command_submits_a_run_of_the_date(head: LocalHead, tiny_model: Path, tmp_path: Path) -> None:
    """The CronJob's own shell command, with another job file and storage; a second one of the day finds the run."""
    manifest = yaml.safe_load((ROOT / "k8s" / "scheduled" / "nightly.yaml").read_text())
    (container,) = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    config = job(tiny_model, tmp_path / "runs", [{"path": str(rows)}], train={"max_steps": 2, "cpus_per_worker": 3})
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "job.yaml").write_text(dump_job(config))
    (text,) = container["args"]
    for old, new in (("jobs/demo.yaml", "job.yaml"), ("output_dir=/shared/runs", f"output_dir={tmp_path}/runs")):
        assert old in text
        text = text.replace(old, new)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **head.environment, "PATH": path}
    assert {one["name"] for one in container["env"]} <= head.environment.keys()
    done = [
        subprocess.run([*container["command"], text], cwd=tmp_path / "work", env=environment, timeout=180,
                       capture_output=True, text=True, check=False)
        for _ in range(2)
    ]  # fmt: skip
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"nightly-\d{4}-\d\d-\d\d", run.name)
    assert done[0].returncode == 0, done[0].stderr
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
    assert done[1].returncode == 2
    assert "holds a finished run and is kept as it is" in done[1].stdout + done[1].stderr
