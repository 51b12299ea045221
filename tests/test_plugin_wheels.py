"""Each plugin as its users get it: its wheel and ckptkit's in an environment of their own, where its suite passes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))


def run(command, directory):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        list(map(str, command)), cwd=directory, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A directory with the wheels of ckptkit and of every plugin."""
    target = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    for project in (ROOT, *PLUGINS):
        run([*pip, "--no-index", "--wheel-dir", target, project], target)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_the_suite_of_a_plugin_passes_where_only_wheels_are(plugin, wheels, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    try:
        run([python, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "pluggy"], tmp_path)
    except (AssertionError, subprocess.TimeoutExpired):
        pytest.skip("no package index can be reached from here")
    project = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (own,) = wheels.glob(f"{project['name'].replace('-', '_')}-*.whl")
    (core,) = wheels.glob("ckptkit-*.whl")  # by path, so that no index is asked for it
    run([python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", core, f"{own}[test]"], tmp_path)
    if "cpu" in project.get("optional-dependencies", {}):  # a build that only some indexes offer; tests are skipped without
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            run([python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", f"{own}[cpu]"], tmp_path)
    tests = shutil.copytree(plugin / "tests", tmp_path / "tests")
    printed = run(
        [python, "-m", "pytest", "-q", "-m", "not slow", "--import-mode=importlib", f"--rootdir={tests}", tests], tmp_path
    )
    assert " passed" in printed
