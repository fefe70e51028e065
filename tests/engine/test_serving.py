"""A rendered RayService serves: its application, as the manifest has it, on a local Ray."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.engine.reference import adapted
from transformers import AutoTokenizer

from rayloom.config.document import Document
from rayloom.config.read import validate_job
from rayloom.jobs.local_head import LocalHead
from rayloom.k8s.overlay import OVERLAYS
from rayloom.k8s.ray_pods import Places
from rayloom.k8s.service import render_service

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECONDS = 240
ASKED = [{"role": "user", "content": "the quick brown fox"}]


def _call(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_the_manifest_serves(tiny_model: Path, tmp_path: Path) -> None:
    """What it answers is what transformers says with the adapter on."""
    output = tmp_path / "shared"
    data = {"train": [str(tmp_path / "rows.jsonl")], "cutoff": 100}
    parts = {"rollout": {"max_tokens": 60, "kv_cache_gib": 0.25, "precision": "fp32"}}
    text = {"name": "served", "output_dir": str(output), "model": {"path": str(tiny_model)}, "data": data, **parts}
    job = validate_job(Document("job.yaml", text))
    model = adapted(tiny_model, 5)
    model.save_pretrained(job.run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(job.run_dir / "model")
    (job.run_dir / "result.json").write_text('{"status": "finished"}')

    places = Places(storage=str(output), job=str(tmp_path / "mounted"))
    config_map, service = render_service(job, OVERLAYS["cpu"], places)
    (tmp_path / "mounted").mkdir()
    for name, content in config_map.body["data"].items():  # as the volume would show it
        (tmp_path / "mounted" / name).write_text(content)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = yaml.safe_load(service.body["spec"]["serveConfigV2"]) | {"http_options": {"port": port}}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))

    with LocalHead(num_cpus=4) as head:
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(tmp_path / "serve.yaml")]
        environment = {**os.environ, **head.environment, "RAY_DASHBOARD_ADDRESS": head.address}
        subprocess.run([*command, "-a", head.address], env=environment, check=True, timeout=60)
        address, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + SECONDS
        while True:
            try:
                models = _call(f"{address}/models")
                break
            except (urllib.error.URLError, ConnectionError):
                status = subprocess.run(
                    [*command[:3], "status", "-a", head.address], env=environment, capture_output=True, text=True,
                    timeout=60, check=False,
                ).stdout  # fmt: skip
                assert "DEPLOY_FAILED" not in status, status
                assert time.monotonic() < until, f"nothing answers after {SECONDS} s: {status}"
                time.sleep(1)
        assert [one["id"] for one in models["data"]] == ["served"]
        request = {"model": "served", "messages": ASKED, "max_tokens": 20, "temperature": 0, "logprobs": True}
        (choice,) = _call(f"{address}/chat/completions", request)["choices"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            _call(f"{address}/chat/completions", {**request, "model": "other"})

    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = [token["logprob"] for token in choice["logprobs"]["content"]]
    with torch.no_grad():
        own = model.generate(**ids, max_new_tokens=20, do_sample=False)[0]
        logs = model(own.unsqueeze(0)).logits[0].log_softmax(-1)
    start = ids["input_ids"].shape[1]
    expected = [logs[place - 1, own[place]].item() for place in range(start, len(own))]
    assert said == pytest.approx(expected[: len(said)], abs=1e-3)
    assert len(said) >= 3
