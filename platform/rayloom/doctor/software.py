"""Python, the packages and the compiler."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rayloom.doctor.finding import Finding

_SHOWN_VERSIONS = ("ray", "torch", "transformers", "peft", "accelerate", "deepspeed")
_OPTIONAL = ("bitsandbytes", "vllm", "gradio")


def check_python() -> Iterator[Finding]:
    here = platform.python_version()
    text = f"Python {here} in {sys.prefix}"
    try:
        wanted = SpecifierSet(metadata.metadata("rayloom")["Requires-Python"])
    except metadata.PackageNotFoundError:
        wanted = SpecifierSet()
    if wanted.contains(here, prereleases=True):
        yield Finding("Python", "ok", text)
    else:
        yield Finding("Python", "bad", f"{text}; Rayloom needs {wanted}")


def check_packages() -> Iterator[Finding]:
    """What is installed, against what Rayloom's own package asks for."""
    try:
        requires = metadata.requires("rayloom") or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "warn", "rayloom is not installed as a package, so no versions can be compared")
        return
    wanted: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, requires):
        # torch comes from `cpu` or from `gpu`; either will do.
        extras = ("", "cpu", "gpu") if requirement.name == "torch" else ("",)
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            wanted.setdefault(requirement.name, []).append(requirement)
    faults = []
    for name, requirements in wanted.items():
        version = _version(name)
        asked = " or ".join(sorted({str(requirement.specifier) for requirement in requirements}))
        if version is None:
            faults.append(Finding("packages", "bad", f"{name} is not installed; Rayloom needs {asked}"))
        elif not any(requirement.specifier.contains(version, prereleases=True) for requirement in requirements):
            faults.append(Finding("packages", "warn", f"{name} is {version}; Rayloom is made for {asked}"))
    if not faults:
        versions = ", ".join(f"{name} {_version(name)}" for name in _SHOWN_VERSIONS)
        faults.append(Finding("packages", "ok", f"rayloom {_version('rayloom')} with {versions}"))
    yield from faults


def check_optional_packages() -> Iterator[Finding]:
    found = [f"{name} {_version(name) or 'not installed'}" for name in _OPTIONAL]
    yield Finding("optional packages", "ok", ", ".join(found))


def check_compiler(is_needed: bool) -> Iterator[Finding]:
    """DeepSpeed compiles a C++ kernel when it first runs on CPU."""
    compiler = os.environ.get("CXX") or "c++"
    missing = []
    if not shutil.which(compiler):
        missing.append(f"no C++ compiler ({compiler}): install g++")
    if not shutil.which("ninja"):
        own = Path(sys.executable).parent
        missing.append(f"ninja is not on the PATH: {f'put {own} there' if (own / 'ninja').exists() else 'install it'}")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("no Python.h: install Python's development headers")
    if missing:
        text = f"{'; '.join(missing)}. Without it train.deepspeed does not work on CPU: a kernel has to be built"
        yield Finding("compiler", "bad" if is_needed else "warn", text)
    else:
        yield Finding("compiler", "ok", f"{compiler}, ninja and Python.h: DeepSpeed can build its CPU kernel")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
