"""Each plugin as its users get it: its wheel in an environment of its own, beside that of ckptkit's, where its suite passes."""

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


def install(directory, *requirements):
    """Installs into the environment `directory`, by the pip that runs the tests: a pip in each would take longer to install."""
    options = ["--disable-pip-version-check", "--quiet", "--no-compile"]
    run([sys.executable, "-m", "pip", "--python", python(directory), "install", *options, *requirements], directory)


def python(directory):
    return directory / ("Scripts" if os.name == "nt" else "bin") / "python"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A directory with the wheels of ckptkit and of every plugin."""
    target = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*pip, "--no-index", "--wheel-dir", target, ROOT, *PLUGINS], target)
    return target


@pytest.fixture(scope="module")
def core(wheels, tmp_path_factory):
    """An environment with ckptkit's wheel and what that needs, which takes longest to install."""
    directory = tmp_path_factory.mktemp("core")
    venv.create(directory)
    try:
        run([sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "pluggy"], directory)
    except (AssertionError, subprocess.TimeoutExpired):
        pytest.skip("no package index can be reached from here")
    (wheel,) = wheels.glob("ckptkit-*.whl")  # by path, so that no index is asked for it
    install(directory, wheel)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_the_suite_of_a_plugin_passes_where_only_wheels_are(plugin, wheels, core, tmp_path):
    venv.create(tmp_path / "venv")
    (packages, theirs) = (next(directory.rglob("site-packages")) for directory in (tmp_path / "venv", core))
    (packages / "core.pth").write_text(f"{theirs}\n")
    project = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (own,) = wheels.glob(f"{project['name'].replace('-', '_')}-*.whl")
    install(tmp_path / "venv", f"{own}[test]")
    if "cpu" in project.get("optional-dependencies", {}):  # a build that only some indexes offer; tests are skipped without
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            install(tmp_path / "venv", f"{own}[cpu]")
    tests = shutil.copytree(plugin / "tests", tmp_path / "tests")
    command = ["-m", "pytest", "-q", "-m", "not slow", "--import-mode=importlib", f"--rootdir={tests}", tests]
    assert " passed" in run([python(tmp_path / "venv"), *command], tmp_path)
