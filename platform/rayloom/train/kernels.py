"""DeepSpeed's kernels, compiled on first use: by one process of a machine at a time, wherever the last one died.

Torch's own lock on a folder of kernels is a file that is left behind where the compiling process is killed, and every
later process then waits for it without end. Here a lock that the system takes back stands around it, and the folder
belongs to one environment on one kind of CPU: the kernels hold paths of the first and instructions of the second.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rayloom.cache import cache_dir, only_one

COMPILE_SECONDS = 600.0


def kernel_folder() -> Path:
    """Where this environment's kernels for this machine's CPU are kept."""
    versions = [importlib.metadata.version(name) for name in ("torch", "deepspeed")]
    key = "\n".join([sys.prefix, *versions, platform.machine(), _cpu_flags()])
    return cache_dir() / "kernels" / hashlib.sha256(key.encode()).hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def load_kernels(load: Callable[[], object], folder: Path, wait_seconds: float = COMPILE_SECONDS) -> None:
    """Call `load`, which compiles into `TORCH_EXTENSIONS_DIR` what is not there yet.

    From here on the process, and those it starts, find their kernels in `folder`.

    Raises:
        JobError: another process compiled there for more than `wait_seconds`.
    """
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    with only_one(folder.with_suffix(".lock"), "DeepSpeed's kernels", wait_seconds):
        # All who compile here hold our lock: whoever left torch's was killed, and may have left half a kernel too.
        for left_behind in folder.glob("*/lock"):
            shutil.rmtree(left_behind.parent)
        load()


def load_cpu_kernels(say: Callable[[str], None]) -> None:
    """What DeepSpeed wants on CPU before its first process group: all-reduce through shared memory.

    Args:
        say: Told what takes so long, where it must be compiled.

    Raises:
        JobError: another process of this machine compiled for ten minutes.
    """
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    builder, folder = ShareMemCommBuilder(), kernel_folder()
    if not builder.is_compatible():
        return  # DeepSpeed does without
    if not any(folder.glob("*/*.so")):
        say("compiling DeepSpeed's kernel, once on this machine; it takes about a minute")
    load_kernels(partial(builder.load, verbose=False), folder)
