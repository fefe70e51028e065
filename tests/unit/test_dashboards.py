"""Dashboards and alerts: Prometheus parses every expression, and every metric in them exists. That they have data is
seen in `tests/ray/test_monitoring.py`."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from rayloom.train.gauges import HELP

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "dashboards"
PROMETHEUS = DASHBOARDS / "prometheus"
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus)")


def promtool(*arguments: str) -> None:
    command = ["promtool", *arguments]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def maker() -> Iterator[Any]:
    """The module that makes them."""
    spec = importlib.util.spec_from_file_location("make_dashboards", DASHBOARDS / "make_dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "make_dashboards", module)  # dataclasses look there
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def made(maker: Any) -> dict[str, dict[str, Any]]:
    """The dashboards as the code makes them, by name."""
    return {dashboard.name: maker.as_json(dashboard) for dashboard in maker.DASHBOARDS}


def expressions(made: dict[str, dict[str, Any]]) -> list[str]:
    panels = [panel for dashboard in made.values() for panel in dashboard["panels"]]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_files_are_what_the_code_makes(made):
    files = {file.stem: json.loads(file.read_text()) for file in (DASHBOARDS / "grafana").glob("*.json")}
    assert files == made, "python dashboards/make_dashboards.py"


def test_kubernetes_has_the_same(maker, made):
    alerts = (PROMETHEUS / "alerts.yaml").read_text()
    rule = (ROOT / "k8s" / "base" / "prometheus-rule.yaml").read_text()
    assert rule == maker.as_rule(alerts), "python dashboards/make_dashboards.py"
    (pages,) = yaml.safe_load((DASHBOARDS / "kustomization.yaml").read_text())["configMapGenerator"]
    assert pages["files"] == [f"grafana/{name}.json" for name in sorted(made)]


def test_panels_do_not_overlap_and_variables_are_defined(made):
    for dashboard in made.values():
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
        assert len(set(places)) == len(places)
        variables = {variable["name"] for variable in dashboard["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
        assert used <= variables


def test_every_metric_exists(made):
    rules = yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"][0]["rules"]
    text = " ".join([*expressions(made), *(rule["expr"] for rule in rules)])
    ours = set(re.findall(r"ray_rayloom_(\w+)", text))
    rays = set(re.findall(r"\bray_(?!rayloom)\w+", text))
    assert {name for name in ours if name.removeprefix("eval_") not in HELP} == set()
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    shown = "".join(file.read_text() for file in folder.glob("*.py"))
    assert {name for name in rays if name not in shown} == set()


@needs_promtool
def test_prometheus_parses_every_expression(made, tmp_path):
    rules = [
        {"record": f"r{index}", "expr": expression.replace("$job", ".*")}
        for index, expression in enumerate(expressions(made))
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(file))


@needs_promtool
def test_prometheus_takes_the_configuration():
    promtool("check", "config", "--syntax-only", "prometheus.yaml")
    promtool("check", "rules", "alerts.yaml")


@needs_promtool
def test_alerts_fire_when_they_should():
    promtool("test", "rules", "alerts_test.yaml")
