"""The example and the demo, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *args: str) -> str:
    """What a script of `examples/` prints, with the devices that a user has."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *args], capture_output=True, text=True, env=env, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def log() -> str:
    return run("demo.py")


@pytest.mark.slow
def test_demo_kills_the_training_in_the_middle_of_a_save(log: str):
    assert ".orbax-checkpoint-tmp is left with" in log


@pytest.mark.slow
def test_demo_goes_on_from_a_whole_checkpoint(log: str):
    assert "resumed at step" in log


@pytest.mark.slow
def test_demo_ends_with_the_bits_of_an_undisturbed_training(log: str):
    digests = [line.split()[0] for line in log.splitlines() if ", read by " in line]

    assert len(digests) == 3
    assert len(set(digests)) == 1


def test_training_keeps_the_newest_checkpoints_and_goes_on_from_them(tmp_path: Path):
    options = [str(tmp_path), "--save-every", "1", "--keep", "1"]
    run("train_digits.py", *options, "--steps", "4")

    log = run("train_digits.py", *options, "--steps", "5")

    assert "resumed at step 4" in log
    assert "5" in os.listdir(tmp_path)
    assert len(os.listdir(tmp_path)) <= 3


@pytest.mark.slow
def test_training_that_is_done_trains_no_further(tmp_path: Path):
    run("train_digits.py", str(tmp_path), "--steps", "2", "--save-every", "1")

    assert "saving" not in run("train_digits.py", str(tmp_path), "--steps", "2")
