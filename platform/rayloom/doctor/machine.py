"""CPUs, memory and GPUs: what this process may use, within the limits of its container."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rayloom.doctor.finding import Finding
from rayloom.models.precision import computes_bf16

_GIB = 1 << 30
_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_MEMORY = Path("/proc/meminfo")


def check_cpu() -> Iterator[Finding]:
    usable, all_cpus = usable_cpus(), os.cpu_count() or 1
    limit = "" if usable == all_cpus else f" of {all_cpus} (affinity or the container's limit)"
    precision = "computes bf16" if computes_bf16("cpu") else "has no bf16 arithmetic, so jobs on it compute in fp32"
    yield Finding("CPU", "ok", f"{usable:g} usable{limit}; {precision}")


def check_memory() -> Iterator[Finding]:
    total, available = memory_bytes()
    text = f"{available / _GIB:.1f} GiB free of {total / _GIB:.1f} GiB"
    if available < 2 * _GIB:
        yield Finding("memory", "warn", f"{text}; Ray and one small model take about 2 GiB")
    else:
        yield Finding("memory", "ok", text)


def check_gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if not (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
            yield Finding("GPU", "ok", "none here; jobs on this machine train on CPU")
        elif torch.version.cuda:
            yield Finding("GPU", "warn", "there is an NVIDIA GPU, but torch cannot use it: does its driver work?")
        else:
            hint = "install Rayloom's `gpu` extra in place of `cpu`"
            yield Finding("GPU", "warn", f"there is an NVIDIA GPU, but torch {torch.__version__} is for CPU: {hint}")
        return
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter(f"{device.name} ({device.total_memory / _GIB:.0f} GiB)" for device in devices)
    found = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    precision = "computes bf16" if computes_bf16("gpu") else "has no bf16 arithmetic, so jobs on it compute in fp16"
    yield Finding("GPU", "ok", f"{found}, CUDA {torch.version.cuda}; {precision}")


def check_shared_memory() -> Iterator[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("shared memory", "ok", "no /dev/shm on this system; Ray uses temporary files")
        return
    free = shutil.disk_usage(folder).free
    store = min(0.3 * memory_bytes()[1], 200e9)  # what Ray takes for its objects unless it is told otherwise
    text = f"/dev/shm has {free / _GIB:.1f} GiB free"
    if free >= store:
        yield Finding("shared memory", "ok", f"{text}, room for Ray's objects")
    else:
        yield Finding(
            "shared memory",
            "warn",
            f"{text}, less than the {store / _GIB:.1f} GiB that Ray wants for its objects: it keeps them on disk, "
            "which is slow. In Docker raise --shm-size",
        )


def usable_cpus() -> float:
    """The CPUs of the process's affinity, or the container's share of CPU time where that is less."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [float(own)]
    for text in _limits("cpu", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota != "max":
            limits.append(int(quota) / int(period))
    quotas, periods = _limits("cpu", "cpu.cfs_quota_us"), _limits("cpu", "cpu.cfs_period_us")
    limits += [int(quota) / int(period) for quota, period in zip(quotas, periods, strict=False) if int(quota) > 0]
    return min(limits)


def memory_bytes() -> tuple[int, int]:
    """(total, available)."""
    if not _MEMORY.exists():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total
    lines = (line.partition(":") for line in _MEMORY.read_text().splitlines())
    amounts = {name: int(rest.split()[0]) * 1024 for name, _, rest in lines}
    total, available = amounts["MemTotal"], amounts["MemAvailable"]
    for names in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
    ):
        for limit, used, stat in zip(*(_limits("memory", name) for name in names), strict=False):
            if limit != "max" and int(limit) < total:
                reclaimable = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
                free = int(limit) - int(used) + (int(reclaimable[1]) if reclaimable else 0)
                total, available = int(limit), min(available, free)
    return total, max(0, available)


def _limits(controller: str, name: str) -> Iterator[str]:
    """The file `name` of this process's control group and of those above it; both versions of cgroup are searched."""
    if not _GROUPS.exists():
        return
    for line in _GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _ROOT / controller if controllers else _ROOT
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            file = root / str(group).lstrip("/") / name
            if file.is_file():
                yield file.read_text().strip()
