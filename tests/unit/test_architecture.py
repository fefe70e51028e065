"""What the design says of the whole: rooms that know nothing of those above, small files, a command that is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "platform"
PACKAGE = SOURCE / "rayloom"

# A room may import from rooms of a lower level and from itself.
LEVELS = (
    ("errors", "__version__"),
    ("cache", "collector", "remote"),
    ("config",),
    ("models",),
    ("methods", "data", "losses"),
    ("stages",),
    ("rollout",),
    ("train",),
    ("pipeline",),
    ("export",),
    ("jobs", "search", "board", "serve", "evaluate"),
    ("k8s",),
    ("doctor",),  # asks every other room whether it could work
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# The job file is composed of what the rooms own: this one module may look up, at their `config.py` and nothing else.
COMPOSITION_ROOT = "rayloom.config.job"


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(module: str, *, at_import_only: bool) -> Iterator[str]:
    """The package's own modules that a module imports: when it is imported, or also from within its functions."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and at_import_only:
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and at_import_only:
            continue
        pending += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "rayloom":
                while name not in MODULES:  # a name within a module
                    name = name.rpartition(".")[0]
                yield name


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__version__"


def test_the_scan_sees_imports():
    """The tests below would pass on an empty graph."""
    assert "rayloom.train.any_stage" in set(imports_of("rayloom.cli", at_import_only=False))
    assert "rayloom.train.any_stage" not in set(imports_of("rayloom.cli", at_import_only=True))
    assert "rayloom.errors" in set(imports_of("rayloom.cli", at_import_only=True))
    assert {"rayloom", "rayloom.errors"} <= set(imports_of("rayloom.train.execution", at_import_only=True))
    assert "rayloom.data.plan" in set(imports_of("rayloom.train.driver", at_import_only=True))


def test_platform_is_no_package():
    """An `__init__.py` there would shadow the standard library's `platform`."""
    assert not list(SOURCE.glob("*.py"))
    import platform

    assert platform.python_version()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    own = room(module)
    if module == "rayloom":
        assert not list(imports_of(module, at_import_only=False))
        return
    assert own in LEVEL, f"{module}: the room {own!r} has no level in this test; give it one"
    for name in imports_of(module, at_import_only=False):
        other = room(name)
        if module == COMPOSITION_ROOT and name.endswith(".config"):
            continue
        assert other == own or LEVEL[other] < LEVEL[own], f"{module} imports {name}, of a room that is not below it"


def test_no_module_imports_itself_in_a_circle():
    graph = {module: {n for n in imports_of(module, at_import_only=True) if n != module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_no_file_is_two_things():
    long = {str(p.relative_to(ROOT)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 420}
    assert not long


def test_losses_are_short():
    assert not [p for p in (PACKAGE / "losses").glob("*.py") if len(p.read_text().splitlines()) > 200]


def test_no_file_is_a_bag():
    bags = {"utils", "util", "misc", "common", "helpers", "helper", "manager", "tools"}
    assert not [p for p in PACKAGE.rglob("*") if p.stem in bags]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_says_what_it_is(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert (ast.get_docstring(tree) or "").rstrip().endswith((".", ":", "?", "|", "!", "`"))


HEAVY = ("torch", "ray", "transformers", "pydantic", "numpy", "pyarrow", "matplotlib", "yaml", "jinja2", "rich")


def test_the_command_line_imports_nothing_heavy():
    code = f"import sys, rayloom.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "light_of"),
    [
        ("rayloom.config.read", ("torch", "ray", "transformers")),  # what `submit` needs to refuse a job
        ("rayloom.data.index", ("torch", "ray", "transformers")),
        ("rayloom.train.driver", ("torch", "transformers", "matplotlib")),  # holds no model
    ],
)
def test_what_checks_a_job_loads_no_library_that_it_does_not_need(module, light_of):
    code = f"import sys, {module}; print([name for name in {light_of!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_help_answers_in_half_a_second():
    """The best of five: a busy machine may take longer, a heavy import always does."""

    def seconds() -> float:
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-m", "rayloom", "--help"], capture_output=True, text=True, check=True)
        assert "Fine-tune language models on a Ray cluster" in result.stdout
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5
