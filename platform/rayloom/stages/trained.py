"""What a job has trained, for whoever goes on with it outside of training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.methods.adapter_folder import CONFIG
from rayloom.methods.config import MERGED_BASE, LoraConfig
from rayloom.models.config import ModelConfig


@dataclass(frozen=True)
class Trained:
    """A model, and the adapter on it if what trained is one."""

    model: ModelConfig
    adapter: Path | None


def trained_by(job: JobConfig) -> Trained:
    """What lies in the job's run directory.

    Raises:
        RequestError: the job has not finished, or its output is an address.
    """
    if job.output_folder is None:
        raise RequestError(
            f"output_dir: {job.output_dir} is an address: copy {job.run_place}/model to a folder, and name that"
        )
    folder = job.run_dir / "model"
    if not folder.is_dir():
        raise RequestError(f"output_dir: {folder} is not there: run the job {job.name} first")
    result = job.run_dir / "result.json"
    status = json.loads(result.read_text(encoding="utf-8"))["status"] if result.is_file() else "at work"
    if status != "finished":
        raise RequestError(f"output_dir: the run in {job.run_dir} has not finished ({status})")
    if (folder / CONFIG).is_file():
        merges = isinstance(job.method, LoraConfig) and job.method.merged
        return Trained(_whole(job.model, folder / MERGED_BASE) if merges else job.model, folder)
    if (folder / "config.json").is_file():
        return Trained(_whole(job.model, folder), None)
    raise RequestError(f"output_dir: {folder} holds no model")


def _whole(model: ModelConfig, folder: Path) -> ModelConfig:
    """The model in this folder, whose vocabulary has grown already."""
    grown: dict[str, Any] = {"add_tokens": [], "add_special_tokens": [], "token_descriptions": {}}
    return model.model_copy(
        update={"path": str(folder), "revision": None, "train_from_scratch": False, "quantization": None, **grown}
    )
