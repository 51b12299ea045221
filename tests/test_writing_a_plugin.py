"""The tutorial, followed from an empty folder; and that plugins here import public names only."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ckptkit

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs" / "writing-a-plugin.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```\w+ title=\"(.+?)\"\n(.*?)```", TUTORIAL, re.DOTALL))
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
SOURCES = sorted(file for plugin in PLUGINS for file in plugin.rglob("*.py"))
_HOMES = ("args", "errors", "options", "leaves", "storage", "handlers", "hookspecs", "reports", "testing")
PUBLIC = {"ckptkit", *(f"ckptkit.{name}" for name in _HOMES), "ckptkit.testing.fixtures", "ckptkit.testing.strategies"}


@pytest.fixture
def followed(tmp_path):
    """The folder that a reader of the tutorial has in the end, and an environment in which its package is installed."""
    project, site = tmp_path / "project", tmp_path / "site"
    for name, text in FILES.items():
        file = project / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-build-isolation"]
    _run([*pip, "--no-deps", "--target", site, project], tmp_path, os.environ)
    path = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return project, {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@pytest.mark.slow  # the same files are the example's, whose suites are quick
def test_the_tutorial_ends_with_passing_suites(followed, tmp_path):
    project, environment = followed
    printed = _run([sys.executable, "-m", "pytest", "-q", f"--basetemp={tmp_path / 'tests'}"], project, environment)
    assert re.search(r"\b\d+ passed, 2 skipped", printed), printed


def test_the_tutorial_quotes_the_example():
    example = ROOT / "plugins" / "ckptkit-example"
    kept = {
        str(f.relative_to(example)): f.read_text(encoding="utf-8")
        for f in example.rglob("*")
        if str(f.relative_to(example)) in FILES
    }
    assert kept == FILES
    assert {str(f.relative_to(example)) for f in example.rglob("*.py")} <= FILES.keys()


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_plugins_import_public_names_only(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names if alias.name.split(".")[0] == "ckptkit"} <= PUBLIC
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ckptkit":
            assert node.module in PUBLIC
            public = importlib.import_module(node.module)
            assert {alias.name for alias in node.names} <= {*public.__all__, *(n.rpartition(".")[2] for n in PUBLIC)}


def test_ckptkit_itself_does_not_import_its_testing():
    code = "import sys, ckptkit; ckptkit.default_registry().storages(); print({'ckptkit.testing', 'pytest'} & set(sys.modules))"
    assert _run([sys.executable, "-c", code], ROOT, {**os.environ, "PYTHONPATH": str(ROOT)}).strip() == "set()"


def test_the_version_asked_for_is_out():
    assert f"ckptkit>={'.'.join(ckptkit.__version__.split('.')[:2])}" in FILES["pyproject.toml"]


def _run(command, directory, environment):
    done = subprocess.run(
        list(map(str, command)), cwd=directory, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
