"""A real Prometheus beside the shared cluster, while a job trains: every panel's expression is understood, and those of
the job's own dashboards have data."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import pytest
from tests.ray.small_jobs import job, write_rows
from tests.ray.test_ppo import ppo_job

from rayloom.config.document import dump_document
from rayloom.config.job import JobConfig
from rayloom.config.read import dump_job
from rayloom.jobs.local_head import LocalHead

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "cluster" / "monitoring.py")]
ENDLESS = 100_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("connected"),
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian: prometheus)"),
]


class Prometheus:
    """One that runs, as a client sees it."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with build_opener(ProxyHandler({})).open(url, timeout=30) as answer:
            body = json.load(answer)
        assert body["status"] == "success", body
        return body["data"]

    def series(self, expression: str) -> list[dict[str, Any]]:
        """What an expression has now."""
        return list(self.ask("query", query=expression)["result"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def panels(dashboard: str) -> dict[str, str]:
    """The panel of each expression of a dashboard, for all jobs."""
    page = json.loads((ROOT / "dashboards" / "grafana" / f"{dashboard}.json").read_text())
    return {
        target["expr"].replace("$job", ".*"): f"{dashboard}: {panel['title']}"
        for panel in page["panels"]
        for target in panel["targets"]
    }


def end(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(240)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def prometheus(head: LocalHead) -> Iterator[Prometheus]:
    """What `cluster/monitoring.py` starts, as its user does."""
    port = free_port()
    options = ["--ray-folder", str(head.folder), "--port", str(port)]
    process = subprocess.Popen([*COMMAND, *options], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = f"http://127.0.0.1:{port}"
        assert process.stdout.readline() == f"Prometheus: {address}\n"
        yield Prometheus(address)
    finally:
        assert end(process) == 0
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, "Prometheus outlived its starter"


@contextmanager
def training(config: JobConfig, folder: Path) -> Iterator[Path]:
    """The job at work in a process of its own; stopped afterwards. Yields its log."""
    file, log = folder / "job.yaml", folder / "job.log"
    file.write_text(dump_job(config))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "rayloom", "train", str(file)], stdout=output, stderr=subprocess.STDOUT, text=True
        )
    try:
        yield log
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        end(process)


def wait_for_data(prometheus: Prometheus, expressions: dict[str, str], log: Path) -> None:
    """Ask again until each of the expressions has had data."""
    missing, deadline = set(expressions), time.monotonic() + 300
    while missing := {expression for expression in missing if not prometheus.series(expression)}:
        if time.monotonic() > deadline:
            names = [f"{expressions[expression]}: {expression}" for expression in sorted(missing)]
            raise AssertionError("\n".join([*names, log.read_text()[-2000:]]))
        time.sleep(2)


def rows_of(config: JobConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_rows_of_a_job_are_seen(prometheus: Prometheus, tiny_model: Path, tmp_path: Path) -> None:
    sets = [{"path": str(write_rows(tmp_path / "rows.jsonl", 200)), "name": "rows"}]
    train = {"max_steps": ENDLESS, "eval_steps": 20, "save_steps": 20}
    config = job(tiny_model, tmp_path, sets, "watched", data={"held_out": 0.1}, train=train)
    with training(config, tmp_path) as log:
        wait_for_data(prometheus, {**panels("training"), **panels("data")}, log)
        files = sorted(file.stem for file in (ROOT / "dashboards" / "grafana").glob("*.json"))
        for expression in (expression for name in files for expression in panels(name)):
            prometheus.series(expression)  # an expression that is not understood is an error
        # The numbers are those of metrics.jsonl, under the job's name.
        (step,) = prometheus.series('ray_rayloom_step{job="watched"}')
        seconds, value = step["value"]
        (loss,) = prometheus.ask("query", query='ray_rayloom_loss{job="watched"}', time=str(seconds))["result"]
        known = {row["step"]: row["loss"] for row in rows_of(config) if "loss" in row}
        # Ray may tell the two on either side of a step.
        near = [known[number] for number in range(int(value) - 1, int(value) + 2) if number in known]
        assert min(abs(float(loss["value"][1]) - one) for one in near) < 1e-6
        (age,) = prometheus.series('time() - ray_rayloom_checkpoint_time{job="watched"}')
        assert 0 < float(age["value"][1]) < 300
        (state,) = prometheus.series('ray_rayloom_state{job="watched"} == 1')
        assert state["metric"]["of"] == "training"
        # Ray's own dashboards are asked of it too; these have data on a machine without a GPU.
        cluster = {key: name for key, name in panels("cluster").items() if "gpu" not in key}
        wait_for_data(prometheus, cluster, log)
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} >= {"RayloomStandsStill", "RayloomPolicyLag"}
    assert {rule["health"] for rule in rules} == {"ok"}


def test_a_job_of_stage_ppo(prometheus: Prometheus, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"instruction": f"word {n}?", "output": str(n)}) + "\n" for n in range(200))
    )
    (tmp_path / "rewards.py").write_text(
        "def vowels(prompts, answers, references):\n    return [float('a' in answer) for answer in answers]\n"
    )
    train = {"max_steps": ENDLESS, "eval_steps": 8}
    config = ppo_job(tiny_model, tmp_path, tmp_path, "watched-ppo", data={"held_out": 0.1}, train=train)
    mine = {key.replace('job=~".*"', 'job="watched-ppo"'): name for key, name in panels("rollouts").items()}
    with training(config, tmp_path) as log:
        wait_for_data(prometheus, mine, log)
        (rate,) = prometheus.series('rate(ray_rayloom_engine_tokens{job="watched-ppo"}[5m])')
        assert float(rate["value"][1]) > 0
        (restarts,) = prometheus.series('ray_rayloom_engine_restarts{job="watched-ppo"}')
        assert float(restarts["value"][1]) == 0


def test_a_search(prometheus: Prometheus, tiny_model: Path, tmp_path: Path) -> None:
    """A population, whose trials are jobs under its name."""
    sets = [{"path": str(write_rows(tmp_path / "rows.jsonl", 200)), "name": "rows"}]
    train = {"max_steps": ENDLESS, "logging_steps": 5, "eval_steps": 10}
    config = job(tiny_model, tmp_path, sets, "sought", data={"held_out": 0.1}, train=train)
    search = {"metric": "loss", "scheduler": "population", "samples": 2, "interval": 20 / ENDLESS}
    search["space"] = {"train.learning_rate": "loguniform(1e-6, 1e-2)"}
    file, log = tmp_path / "job.yaml", tmp_path / "search.log"
    file.write_text(dump_document({**config.model_dump(mode="json"), "search": search}))
    with log.open("w") as output:
        command = [sys.executable, "-m", "rayloom", "tune", str(file)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_data(prometheus, panels("search"), log)
        (running,) = prometheus.series('ray_rayloom_search_trials{job="sought", of="running"}')
        assert float(running["value"][1]) == 2
        (best,) = prometheus.series('ray_rayloom_search_best{job="sought"}')
        assert best["metric"]["of"] == "loss"
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        end(process)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray-folder", "/no/such/folder"], "--ray-folder: /no/such/folder holds no prom_metrics"),
        (["--port", "TAKEN"], "--port: TAKEN: [Errno 98] Address already in use; choose another"),
    ],
)
def test_a_wrong_request(head: LocalHead, options: list[str], said: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = [word.replace("TAKEN", port) for word in ["--ray-folder", str(head.folder), *options]]
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said.replace("TAKEN", port) in done.stderr


def test_without_prometheus(head: LocalHead, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [*COMMAND, "--ray-folder", str(head.folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "prometheus is not on the PATH; on Debian: apt-get install prometheus" in done.stderr
