"""A job as it runs in pods: its relative paths lie in the image, what it writes lies in the shared storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rayloom.config.job import JobConfig
from rayloom.errors import RequestError
from rayloom.remote import is_remote

_START_SECONDS = 900.0
"""A pod may have to wait for a machine and its image."""


def place(job: JobConfig, *, root: str, storage: str, gpus: bool) -> JobConfig:
    """The job with absolute paths.

    Args:
        root: what stands for the current directory of the job file: the checkout in the image.
        storage: where the shared claim is mounted.
        gpus: whether the pods have GPUs.

    Raises:
        RequestError: a path outside of the image's checkout, runs outside of the storage, or another device.
    """
    faults: list[str] = []
    if job.train.device != "auto" and (job.train.device == "gpu") != gpus:
        other = "gpu" if job.train.device == "gpu" else "cpu"
        faults.append(f"train.device: {job.train.device}: the overlay's pods have {_has(gpus)}; use --overlay {other}")
    data = job.model_dump(mode="json")
    data["output_dir"] = _output(job.output_dir, storage, faults)
    for key, holder, field in _paths(data, job.output_dir):
        value = holder[field]
        if not PurePosixPath(value).is_absolute() and not value.startswith("~"):
            if ".." in PurePosixPath(value).parts:
                faults.append(f"{key}: {value}: lies outside of the image's {root}; give an absolute path in {storage}")
            holder[field] = str(PurePosixPath(storage if _is_run(value, job.output_dir) else root) / value)
    if faults:
        raise RequestError(*faults)
    data["train"]["wait_for_resources"] = max(job.train.wait_for_resources, _START_SECONDS)
    return JobConfig.model_validate(data)


def _has(gpus: bool) -> str:
    return "GPUs" if gpus else "no GPU"


def _output(output_dir: str, storage: str, faults: list[str]) -> str:
    if is_remote(output_dir):
        return output_dir
    path = PurePosixPath(output_dir)
    if (path.is_absolute() and not path.is_relative_to(storage)) or output_dir.startswith("~") or ".." in path.parts:
        faults.append(
            f"output_dir: {output_dir}: would be gone with the pod; give a relative path, which is taken from "
            f"{storage}, or another --storage-path"
        )
    return str(PurePosixPath(storage) / path)


def _paths(data: dict[str, Any], output_dir: str) -> Iterator[tuple[str, dict[str, Any] | list[Any], Any]]:
    """(key, what holds it, its key there) of every path that is a file, not a name on a hub or an address."""
    parts = data["data"]
    for group in ("train", "eval"):
        for index, item in enumerate(parts[group]):
            if parts["description"] is None and _is_file(item["path"], output_dir):
                yield f"data.{group}[{index}].path", item, "path"
    for field in ("description", "converters", "store"):
        if parts[field]:
            yield f"data.{field}", parts, field
    if parts["template"].endswith(".jinja"):
        yield "data.template", parts, "template"
    if _is_folder(data["model"]["path"], output_dir):
        yield "model.path", data["model"], "path"
    if data["train"]["deepspeed_json"]:
        yield "train.deepspeed_json", data["train"], "deepspeed_json"
    adapters = data["method"].get("adapters") or []
    for index, adapter in enumerate(adapters):
        if _is_folder(adapter, output_dir):
            yield f"method.adapters[{index}]", adapters, index
    for index, source in enumerate((data["rewards"] or {}).get("sources", ())):
        if source["type"] == "function" or ("path" in source and _is_folder(source["path"], output_dir)):
            yield f"rewards.sources[{index}].path", source, "path"


def _is_run(path: str, output_dir: str) -> bool:
    """Whether it lies among the runs, which are in the storage: what a job before this one has made."""
    if is_remote(output_dir):
        return False
    runs = PurePosixPath(output_dir)
    return bool(runs.parts) and PurePosixPath(path).is_relative_to(runs)  # of `.` anything would be a part


def _is_file(path: str, output_dir: str) -> bool:
    """Whether a data set is a file or folder: hub names have no ending, or are not here."""
    return "://" not in path and (bool(PurePosixPath(path).suffix) or _is_folder(path, output_dir))


def _is_folder(path: str, output_dir: str) -> bool:
    if "://" in path or path.startswith("pypi:"):
        return False
    return path.startswith((".", "/")) or _is_run(path, output_dir) or Path(path).exists()
