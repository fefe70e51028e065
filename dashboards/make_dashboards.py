"""Grafana's dashboards as code: `python dashboards/make_dashboards.py` writes `grafana/*.json`, and for Kubernetes
`k8s/base/prometheus-rule.yaml` with the rules of `prometheus/alerts.yaml`.

Only what is measured is shown: `ray_rayloom_*` is in `platform/rayloom/train/gauges.py`, the rest is Ray's own. All of
a dashboard is told by its panels; the JSON around them is the same for each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_HERE = Path(__file__).resolve().parent
_FOLDER = _HERE / "grafana"
_RULE = _HERE.parent / "k8s" / "base" / "prometheus-rule.yaml"
_WIDTH, _HEIGHT = 12, 8
JOB = 'job=~"$job"'


@dataclass(frozen=True)
class Panel:
    """A graph."""

    title: str
    expressions: tuple[tuple[str, str], ...]
    """(PromQL, legend)"""
    unit: str = "short"


@dataclass(frozen=True)
class Dashboard:
    """A page of graphs."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    variable: str | None = None
    """PromQL whose values of the label `job` may be chosen from."""


def _of_job(metric: str, legend: str = "{{job}}") -> tuple[str, str]:
    return f"max by (job, of) (ray_rayloom_{metric}{{{JOB}}})", legend


def _of_trials(metric: str, legend: str = "{{job}}") -> tuple[str, str]:
    """Of each trial of a search, which has the search's name and a number."""
    return f'max by (job, of) (ray_rayloom_{metric}{{job=~"($job)-[0-9]+"}})', legend


def _rate(metric: str, legend: str = "{{job}}") -> tuple[str, str]:
    """Of a count that grows."""
    return f"max by (job, of) (rate(ray_rayloom_{metric}{{{JOB}}}[5m]))", legend


DASHBOARDS = (
    Dashboard(
        "training",
        "Rayloom: training",
        (
            Panel("Loss", (_of_job("loss"), _of_job("eval_loss", "{{job}} evaluation {{of}}"))),
            Panel("Tokens per second", (_of_job("tokens_per_second"),)),
            Panel("Learning rate", (_of_job("learning_rate"),)),
            Panel("Gradient norm", (_of_job("grad_norm"),)),
            Panel("Progress", (_of_job("progress"),), "percentunit"),
            Panel("Seconds of a step by part", (_of_job("step_seconds", "{{job}} {{of}}"),), "s"),
            Panel("What the job does", ((
                f"max by (job, of) (ray_rayloom_state{{{JOB}}}) == 1", "{{job}} {{of}}"),)),
            Panel("Faults and moves to other nodes", (_of_job("breaks", "{{job}} {{of}}"),)),
            Panel("Age of the last checkpoint", ((
                f"time() - max by (job) (ray_rayloom_checkpoint_time{{{JOB}}})", "{{job}}"),), "s"),
        ),
        "ray_rayloom_state",
    ),
    Dashboard(
        "rollouts",
        "Rayloom: rollouts",
        (
            Panel("Reward of an answer", (
                _of_job("reward", "{{job}} {{of}}"), _of_job("eval_reward", "{{job}} evaluation {{of}}"))),
            Panel("Divergence of an answer from the reference, in nats", (
                _of_job("kl"), _of_job("kl_coefficient", "{{job}} its weight"))),
            Panel("Tokens per second of all engines", (_rate("engine_tokens"),)),
            Panel("Share of the time that an engine answers", (
                _rate("engine_busy_seconds", "{{job}} engine {{of}}"),), "percentunit"),
            Panel("Tokens of an answer", (_of_job("answer_tokens"),)),
            Panel("Share of the answers that were cut off", (_of_job("unfinished"),), "percentunit"),
            Panel("Policy versions", (
                _of_job("policy_version", "{{job}} trainer"), _of_job("engine_version", "{{job}} engines"))),
            Panel("Age of the answers that are learnt from, in versions", (_of_job("staleness"),)),
            Panel("Difference of engine and trainer, in nats a token", (
                _of_job("mismatch"), _of_job("mismatch_kl", "{{job}} divergence"),
                _of_job("probe_difference", "{{job}} probe"))),
            Panel("Seconds of a sync of weights", (_of_job("sync_seconds"),), "s"),
            Panel("Share of the tokens that were clipped", (_of_job("clipped"),), "percentunit"),
            Panel("Entropy of the policy, in nats a token", (_of_job("entropy"),)),
            Panel("Losses of policy and value head", (
                _of_job("policy_loss", "{{job}} policy"), _of_job("value_loss", "{{job}} value head"))),
            Panel("Engines that were started again", (_of_job("engine_restarts"),)),
        ),
        "ray_rayloom_engine_version",
    ),
    Dashboard(
        "data",
        "Rayloom: data stream",
        (
            Panel("Share of a step that waits for data", ((
                f'max by (job) (ray_rayloom_step_seconds{{of="data", {JOB}}})'
                f" / sum by (job) (ray_rayloom_step_seconds{{{JOB}}})", "{{job}}"),), "percentunit"),
            Panel("Examples per second by data set", ((
                f"max by (job, of) (deriv(ray_rayloom_examples{{{JOB}}}[5m]))", "{{job}} {{of}}"),)),
            Panel("Tokens trained on", (_of_job("tokens"),)),
            Panel("Epoch", (_of_job("epoch"),)),
        ),
        "ray_rayloom_step",
    ),
    Dashboard(
        "search",
        "Rayloom: search",
        (
            Panel("Trials by status", (_of_job("search_trials", "{{job}} {{of}}"),)),
            Panel("Best value so far", (_of_job("search_best", "{{job}} {{of}}"),)),
            Panel("Progress of each trial", (_of_trials("progress"),), "percentunit"),
            Panel("Loss of each trial", (_of_trials("loss"), _of_trials("eval_loss", "{{job}} evaluation {{of}}"))),
            Panel("Learning rate of each trial", (_of_trials("learning_rate"),)),
            Panel("Checkpoints that were taken over", (_of_job("search_exploits"),)),
        ),
        "ray_rayloom_search_trials",
    ),
    Dashboard(
        "cluster",
        "Rayloom: cluster",
        (
            Panel("CPU of each machine", (("ray_node_cpu_utilization", "{{instance}}"),), "percent"),
            Panel("Memory of each machine", ((
                "ray_node_mem_used / ray_node_mem_total", "{{instance}}"),), "percentunit"),
            Panel("GPU of each machine", (("ray_node_gpus_utilization", "{{instance}} GPU {{GpuIndex}}"),), "percent"),
            Panel("Disk used", ((
                "ray_node_disk_usage / (ray_node_disk_usage + ray_node_disk_free)", "{{instance}}"),), "percentunit"),
            Panel("Objects in memory", (("sum by (Location) (ray_object_store_memory)", "{{Location}}"),), "bytes"),
            Panel("Actors by state", (("sum by (State) (ray_actors)", "{{State}}"),)),
        ),
    ),
)  # fmt: skip


def as_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana imports."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    ]
    if dashboard.variable:
        query = f"label_values({dashboard.variable}, job)"
        choice = {"multi": True, "includeAll": True, "allValue": ".*", "refresh": 2}
        variables.append({"name": "job", "type": "query", "datasource": source, "query": query, **choice})
    panels = []
    for index, panel in enumerate(dashboard.panels):
        column, row = index % 2, index // 2
        targets = [
            {"refId": chr(ord("A") + place), "expr": expression, "legendFormat": legend, "datasource": source}
            for place, (expression, legend) in enumerate(panel.expressions)
        ]
        panels.append(
            {
                "id": index + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": source,
                "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
                "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
                "targets": targets,
            }
        )
    return {
        "uid": f"rayloom-{dashboard.name}",
        "title": dashboard.title,
        "schemaVersion": 39,
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "refresh": "10s",
        "templating": {"list": variables},
        "panels": panels,
    }


def as_rule(alerts: str) -> str:
    """The rules of a Prometheus rule file as the Prometheus operator takes them."""
    body = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "rayloom"},
        "spec": yaml.safe_load(alerts),
    }
    text = yaml.safe_dump(body, sort_keys=False, width=120, allow_unicode=True)
    return f"# Made of dashboards/prometheus/alerts.yaml by dashboards/make_dashboards.py.\n{text}"


def main() -> None:
    _FOLDER.mkdir(exist_ok=True)
    _RULE.write_text(as_rule((_HERE / "prometheus" / "alerts.yaml").read_text()))
    for dashboard in DASHBOARDS:
        (_FOLDER / f"{dashboard.name}.json").write_text(json.dumps(as_json(dashboard), indent=2) + "\n")


if __name__ == "__main__":
    main()
