"""What `cluster/monitoring.py` writes for Prometheus and Grafana, and how it tells of one that does not run. The whole
of it, with a real Prometheus, is in `tests/ray/test_monitoring.py`."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayloom.errors import JobError, RequestError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("monitoring", ROOT / "cluster" / "monitoring.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "monitoring", module)  # dataclasses look there
        spec.loader.exec_module(module)
        yield module


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus)")
def test_prometheus_takes_the_file(script, tmp_path):
    nodes = tmp_path / "ray" / "prom_metrics_service_discovery.json"
    nodes.parent.mkdir()
    nodes.write_text('[{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}]')
    file = script.write_prometheus(tmp_path, nodes.parent)
    command = ["promtool", "check", "config", str(file)]  # the rules and the list of nodes too
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (scrape,) = yaml.safe_load(file.read_text())["scrape_configs"]
    assert scrape["file_sd_configs"] == [{"files": [str(nodes)]}]
    assert scrape["honor_labels"], "the name of the training job is the label `job`"


def test_grafana_is_led_to_prometheus_and_the_dashboards(script, tmp_path):
    variables = script.write_grafana(tmp_path, "http://127.0.0.1:9090", 3001)
    assert variables["GF_SERVER_HTTP_PORT"] == "3001"
    folder = Path(variables["GF_PATHS_PROVISIONING"])
    (source,) = yaml.safe_load((folder / "datasources" / "rayloom.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    (provider,) = yaml.safe_load((folder / "dashboards" / "rayloom.yaml").read_text())["providers"]
    assert (Path(provider["options"]["path"]) / "rollouts.json").exists()


@pytest.mark.parametrize("home", ["grafana", "grafana/share/grafana"])
def test_where_grafana_is_at_home(script, tmp_path, home):
    program = tmp_path / "grafana" / "bin" / "grafana"
    defaults = tmp_path / home / "conf" / "defaults.ini"
    for file in (program, defaults):
        file.parent.mkdir(parents=True)
        file.touch()
    assert script.grafana_home(program) == tmp_path / home
    defaults.unlink()
    if not Path("/usr/share/grafana").exists():
        with pytest.raises(RequestError, match=r"conf/defaults.ini is neither in .* nor in /usr/share/grafana"):
            script.grafana_home(program)


def test_one_that_ends_is_told_with_its_log(script, tmp_path):
    with script.Process(["sh", "-c", "echo no space left; exit 3"], tmp_path / "log") as process:
        with pytest.raises(JobError, match=r"sh ended with exit status 3; the end of its log:\n  no space left"):
            process.wait_for("http://127.0.0.1:1/-/ready")


def test_one_that_is_silent_is_not_waited_for_for_ever(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "_START_SECONDS", 0.5)
    with script.Process(["sleep", "60"], tmp_path / "log") as process:
        with pytest.raises(JobError, match=r"waited 0.5 s for sleep at http://127.0.0.1:1/"):
            process.wait_for("http://127.0.0.1:1/-/ready")
    assert process._process.returncode is not None, "it is ended with its block"


def test_a_port_that_is_taken(script):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"--port: {port}: .*; choose another"):
            script.check_port(port, "--port")
    script.check_port(port, "--port")
