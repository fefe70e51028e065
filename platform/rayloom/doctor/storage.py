"""The folders that jobs write in."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rayloom.cache import cache_dir
from rayloom.config.job import JobConfig
from rayloom.doctor.finding import Finding
from rayloom.errors import RequestError
from rayloom.remote import Remote

_GIB = 1 << 30


def check_temporary_files() -> Iterator[Finding]:
    folder = Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())
    usage = shutil.disk_usage(folder)
    text, fault = _space(folder)
    if fault:
        yield Finding("temporary files", "bad", f"{text}; a local Ray keeps its files there")
    elif usage.used > 0.95 * usage.total:
        yield Finding("temporary files", "warn", f"{text}; Ray puts no objects on a disk that is more than 95 % full")
    else:
        yield Finding("temporary files", "ok", text)


def check_model_cache() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder, content in ((cache_dir(), "pypi: models"), (Path(HF_HUB_CACHE), "hub models")):
        text, fault = _space(folder)
        yield Finding("model cache", "warn" if fault else "ok", f"{text}, for {content}")


def check_run_directories(job: JobConfig | None) -> Iterator[Finding]:
    if job is not None and job.output_folder is None:
        try:
            Remote.at(job.output_dir).check("output_dir")
        except RequestError as error:
            yield Finding("run directories", "bad", str(error))
        else:
            yield Finding("run directories", "ok", f"{job.output_dir}: can be written")
        return
    folder = Path(job.output_dir if job else JobConfig.model_fields["output_dir"].default).expanduser().absolute()
    text, fault = _space(folder)
    yield Finding("run directories", "bad" if fault else "ok", text + ("; set output_dir to another" if fault else ""))


def _space(folder: Path) -> tuple[str, bool]:
    """(what there is, whether it is a fault) for a folder that is to be written in, and perhaps is still to be made."""
    there = folder
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return f"cannot write in {_home(there)}: {error.strerror or error}", True
    return f"{_home(folder)}: {shutil.disk_usage(there).free / _GIB:.0f} GiB free", False


def _home(folder: Path) -> str:
    return re.sub(f"^{re.escape(str(Path.home()))}(?=/|$)", "~", str(folder))
