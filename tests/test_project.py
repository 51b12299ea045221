"""Rules of the project that no other test would notice broken: layers, lint, types, what an import costs."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONFIG = tomllib.loads(PYPROJECT)
SOURCES = sorted((ROOT / "ckptkit").rglob("*.py"))


def run(*command: str) -> str:
    """What a program prints, run in the project; fails with that when the program does."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    return run(sys.executable, "-c", code)


def test_imports_point_downwards():
    assert "0 broken" in python("from importlinter.cli import lint_imports_command; lint_imports_command()")


def test_every_module_has_a_layer():
    (layers,) = [contract for contract in CONFIG["tool"]["importlinter"]["contracts"] if contract["id"] == "layers"]
    placed = {name for layer in layers["layers"] for name in re.split(r"\s*[:|]\s*", layer)}
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in SOURCES if file.stem != "__init__"}

    lost = sorted(module for module in modules if not any(f"{module}.".startswith(f"{name}.") for name in placed))

    assert lost == [], "write them into the contract 'layers' of pyproject.toml, beside their peers"


@pytest.mark.slow  # `make lint` looks at them too
def test_public_names_have_the_types_that_callers_rely_on():
    run(sys.executable, "-m", "mypy", "tests/typing")


def test_every_exception_to_a_lint_rule_has_a_reason():
    ignored = PYPROJECT[PYPROJECT.index("[tool.ruff.lint]") : PYPROJECT.index("[tool.ruff.lint.pydocstyle]")]
    rules = [line for line in ignored.splitlines() if re.match(r' +"[A-Z]+\d*",', line)]

    assert rules
    assert [line for line in rules if "#" not in line] == []


def test_every_ignored_finding_has_a_code_and_a_reason():
    lines = [(file.name, line.strip()) for file in SOURCES for line in file.read_text(encoding="utf-8").splitlines()]
    ignored = [(file, line) for file, line in lines if re.search(r"# (noqa|type: ignore)", line)]
    reasoned = r"# noqa: [A-Z0-9, ]+ - \S|# type: ignore\[[\w, -]+\]  # \S"

    assert ignored
    assert [(file, line) for file, line in ignored if not re.search(reasoned, line)] == []


def test_package_ships_its_types():
    assert (ROOT / "ckptkit" / "py.typed").exists()


def test_import_adds_little_to_that_of_jax():
    code = "import time, jax; start = time.perf_counter(); import ckptkit; print(time.perf_counter() - start)"

    secs = statistics.median(float(python(code)) for _ in range(3))

    print(f"import ckptkit: {secs * 1e3:.1f} ms after jax")
    assert secs < 0.1


def test_import_brings_no_heavy_library():
    code = "import sys, jax; before = set(sys.modules); import ckptkit; print(*sorted(set(sys.modules) - before))"

    brought = {name.partition(".")[0] for name in python(code).split()}

    assert brought.isdisjoint({"tensorstore", "orbax", "flax", "optax", "tqdm", "rich", "asyncio"})
