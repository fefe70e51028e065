"""`rayloom doctor`: what it says of a machine that is well, and of one that is not."""

from __future__ import annotations

import io
import shutil
import socket
import time
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayloom.config.job import JobConfig
from rayloom.doctor import cluster, machine, software, storage
from rayloom.doctor.examine import examine, is_fit, show_findings
from rayloom.doctor.finding import Finding

Usage = namedtuple("Usage", "total used free")
GIB = 1 << 30


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path) -> JobConfig:
    data = tmp_path / "a.jsonl"
    data.write_text('{"instruction": "a", "output": "b"}\n')
    return JobConfig.model_validate(
        {
            "name": "d",
            "output_dir": str(tmp_path / "runs"),
            "model": {"path": str(tiny_model)},
            "data": {"train": [str(data)]},
            "train": {"cpus_per_worker": 0.1},
        }
    )


def states(findings: list[Finding], topic: str) -> list[str]:
    return [finding.state for finding in findings if finding.topic == topic]


# --- all together ---------------------------------------------------------------------------------------------------


def test_this_machine_is_examined_quickly(job: JobConfig) -> None:
    started = time.monotonic()
    findings = examine(job)
    assert time.monotonic() - started < 20  # about 3 s where nothing else runs
    topics = {finding.topic for finding in findings}
    assert topics >= {"Python", "packages", "CPU", "memory", "GPU", "compiler", "model cache", "run directories", "Ray"}
    assert states(findings, "job") == ["ok"]
    assert states(findings, "Python") == ["ok"]
    assert not any("could not be examined" in finding.text for finding in findings)


def test_a_check_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_MEMORY", Path("/"))
    findings = examine()
    assert states(findings, "memory") == ["warn"]
    assert states(findings, "CPU") == ["ok"]


def test_a_job_that_does_not_fit_is_told_why(job: JobConfig, tmp_path: Path) -> None:
    wrong = JobConfig.model_validate(
        job.model_dump()
        | {"model": {"path": str(tmp_path / "no-model")}, "data": {"train": [str(tmp_path / "no-data.jsonl")]}}
        | {"train": {"workers": 10_000, "device": "cpu"}}
    )
    findings = examine(wrong)
    texts = [finding.text for finding in findings if finding.topic == "job"]
    assert [text.partition(":")[0] for text in texts] == ["model.path", "data.train", "train.workers"]
    assert not is_fit(findings)


@pytest.mark.parametrize(("state", "verdict"), [("ok", "all is well"), ("warn", "1 warning"), ("bad", "1 problem")])
def test_the_last_line_sums_up(state: Any, verdict: str) -> None:
    findings = [Finding("one", "ok", "fine"), Finding("two", state, "so " * 60)]
    plain, terminal = io.StringIO(), io.StringIO()
    show_findings(findings, Console(file=plain, width=40))
    show_findings(findings, Console(file=terminal, width=40, force_terminal=True))
    assert verdict in plain.getvalue().splitlines()[-1]
    assert f"{state:4}  two  so so" in plain.getvalue()
    assert len(plain.getvalue().splitlines()) == 4  # no line was broken
    assert is_fit(findings) == (state != "bad")
    assert len(terminal.getvalue().splitlines()) > 6


# --- software -------------------------------------------------------------------------------------------------------


def fake_packages(monkeypatch: pytest.MonkeyPatch, requires: list[str], installed: dict[str, str]) -> list[Finding]:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    monkeypatch.setattr(metadata, "version", version)
    return list(software.check_packages())


def test_packages_are_compared_with_what_rayloom_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "ray[data]==2.60.0",
        "peft==0.21.2",
        "rich>=13",
        'pytest>=8; extra == "dev"',
        'nt; sys_platform == "os9"',
    ]
    findings = fake_packages(monkeypatch, requires, {"ray": "2.59.0", "rich": "15.0"})
    assert [(finding.state, finding.text) for finding in findings] == [
        ("warn", "ray is 2.59.0; Rayloom is made for ==2.60.0"),
        ("bad", "peft is not installed; Rayloom needs ==0.21.2"),
    ]


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.13.0+cu130"])
def test_torch_may_come_from_either_extra(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    requires = ['torch==2.13.0+cpu; extra == "cpu"', 'torch==2.13.0; extra == "gpu"']
    (finding,) = fake_packages(monkeypatch, requires, {"torch": version, "rayloom": "1"})
    assert finding.state == "ok"


def test_without_its_own_metadata_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    monkeypatch.setattr(metadata, "metadata", missing)
    assert [finding.state for finding in software.check_packages()] == ["warn"]
    assert [finding.state for finding in software.check_python()] == ["ok"]


def test_a_missing_compiler_is_bad_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (finding,) = software.check_compiler(False)
    assert finding.state == "warn"
    assert "no C++ compiler" in finding.text
    assert "ninja is not on the PATH" in finding.text
    (finding,) = software.check_compiler(True)
    assert finding.state == "bad"


# --- the machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int) -> None:
    groups, root, memory = tmp_path / "cgroup", tmp_path / "fs", tmp_path / "meminfo"
    memory.write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {60 * GIB // 1024} kB\n")
    used, cached = 5 * GIB, 2 * GIB
    if version == 1:
        groups.write_text("3:cpu,cpuacct:/box/job\n4:memory:/box/job\n")
        files = {
            "cpu/box/cpu.cfs_quota_us": 150_000,
            "cpu/box/cpu.cfs_period_us": 100_000,
            "memory/box/memory.limit_in_bytes": 8 * GIB,
            "memory/box/memory.usage_in_bytes": used,
            "memory/box/memory.stat": f"inactive_anon 1\ntotal_inactive_file {cached}",
        }
    else:
        groups.write_text("0::/box/job\n")
        files = {
            "box/cpu.max": "150000 100000",
            "box/job/cpu.max": "max 100000",
            "box/memory.max": 8 * GIB,
            "box/memory.current": used,
            "box/memory.stat": f"anon 1\ninactive_file {cached}",
            "box/job/memory.max": "max",
            "box/job/memory.current": 1,
            "box/job/memory.stat": "anon 1",
        }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    monkeypatch.setattr(machine, "_GROUPS", groups)
    monkeypatch.setattr(machine, "_ROOT", root)
    monkeypatch.setattr(machine, "_MEMORY", memory)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert machine.usable_cpus() == 1.5
    assert machine.memory_bytes() == (8 * GIB, 8 * GIB - used + cached)


def test_little_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(64 << 20, 0, 64 << 20))
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    (finding,) = machine.check_shared_memory()
    assert finding.state == "warn"
    assert "--shm-size" in finding.text


def test_a_gpu_that_torch_cannot_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    (finding,) = machine.check_gpu()
    assert finding.state == "warn"
    assert "`gpu` extra" in finding.text


def test_equal_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    Device = namedtuple("Device", "name total_memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device("H100", 80 * GIB))
    (finding,) = machine.check_gpu()
    assert finding.text.startswith("2 x H100 (80 GiB)")
    assert "computes bf16" in finding.text


# --- storage --------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_in_is_bad(job: JobConfig) -> None:
    (finding,) = storage.check_run_directories(job.model_copy(update={"output_dir": "/proc/rayloom/runs"}))
    assert finding.state == "bad"
    assert "/proc" in finding.text
    (finding,) = storage.check_run_directories(job)
    assert finding.state == "ok"
    assert not Path(job.output_dir).exists()


def test_a_full_temporary_disk_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(100 * GIB, 97 * GIB, 3 * GIB))
    (finding,) = storage.check_temporary_files()
    assert finding.state == "warn"
    assert "95 %" in finding.text


# --- Ray ------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def ray_findings() -> list[Finding]:
    return list(cluster.ClusterCheck().findings())


def test_without_addresses_ray_is_ok() -> None:
    assert [finding.state for finding in ray_findings()] == ["ok", "ok"]


def test_a_head_node_that_listens_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")
        finding = ray_findings()[0]
    assert finding.state == "ok"
    assert "RAY_AUTH_MODE is token, there is a token" in finding.text
    assert "sesame" not in finding.text


@pytest.mark.parametrize("address", ["head", "head:port", "ray://head"])
def test_an_address_without_a_port_is_bad(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    finding = ray_findings()[0]
    assert finding.state == "bad"
    assert "HOST:6379" in finding.text


def test_addresses_where_nobody_is_are_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{free_port()}")
    findings = ray_findings()
    assert [finding.state for finding in findings] == ["bad", "bad"]
    assert "nothing can be reached" in findings[0].text
    assert "cannot reach a Ray dashboard" in findings[1].text


def test_a_network_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(cluster, "_cluster", lambda: time.sleep(2))
    assert [finding.state for finding in ray_findings()] == ["bad", "ok"]
