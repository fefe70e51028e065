"""Adapters that no text comes by, on two workers: each waits for the gradients of all, and some have none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.matrix.check import make_base
from tests.ray.small_jobs import job, run, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("connected")]


@pytest.mark.parametrize("deepspeed", ["none", "zero2"])
def test_doges_experts(deepspeed: str, tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "doge"
    make_base("doge", model)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_model / file).exists():
            shutil.copy(tiny_model / file, model)
    sets = [{"path": str(write_rows(tmp_path / "rows.jsonl", 60))}]
    config = job(model, tmp_path, sets, train={"workers": 2, "deepspeed": deepspeed, "max_steps": 4})
    result, rows = run(config)
    assert (result["status"], len(rows)) == ("finished", 4)
    assert rows[-1]["loss"] < rows[0]["loss"]
    adapters = load_file(config.run_dir / "model" / "adapter_model.safetensors")
    idle = [name for name, weight in adapters.items() if "lora_B" in name and not weight.any()]
    assert 0 < len(idle) < len(adapters) / 2  # else this test shows nothing
