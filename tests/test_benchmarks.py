"""The project's own benchmarks, in short: they run, and no ratio to Orbax has grossly regressed. Never seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# A fraction of what docs/performance.md records, since a machine that runs tests is not idle.
LEAST_TIMES_FASTER = {"block": 3, "save": 8, "restore": 5}


def _run(script: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_many_small_leaves_stay_many_times_faster_than_in_orbax(tmp_path: Path) -> None:
    _run("peers.py", "--cases", "many", "--peers", "ckptkit,orbax", "--rounds", "1", "--json", str(tmp_path / "figures"))
    (row,) = json.loads((tmp_path / "figures").read_text())["many"]
    ratios = {column: row["orbax"][column] / row["ckptkit"][column] for column in LEAST_TIMES_FASTER}
    print(ratios)
    assert all(ratios[column] > least for column, least in LEAST_TIMES_FASTER.items()), ratios
    assert row["ckptkit"]["disk_mb"] < 1.05 * row["ckptkit"]["tree_mb"] + 10_000 * 450e-6


@pytest.mark.slow
def test_growth_is_measured() -> None:
    printed = _run("growth.py", "--leaves", "100,1000", "--megabytes", "1", "--rounds", "1")
    assert "1,000" in printed


@pytest.mark.slow
def test_what_several_processes_cost_is_measured() -> None:
    options = ("--processes", "2", "--leaves", "10", "--rounds", "1", "--meetings", "4", "--arrays", "10")
    printed = _run("processes.py", "--parts", "saves,meetings,merge", *options)
    assert "orbax" in printed
    assert "us a process" in printed
    assert "us a key" in printed


@pytest.mark.slow
def test_what_checksums_cost_is_measured() -> None:
    printed = _run("checksums.py", "--megabytes", "1", "--leaves", "10", "--rounds", "1")
    for row in ("| save  ", "| restore  ", "| restore from the disk ", ", in memory ", ", cold "):
        assert printed.count(row) == 2, row
