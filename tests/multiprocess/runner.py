"""Starts real processes that form one JAX job, and collects what each found; nothing that it starts outlives its timeout."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

WORKER = Path(__file__).with_name("worker.py")


class Job:
    """Processes under way; a context manager that kills those that are left."""

    def __init__(self, directory: Path, count: int, scenarios: Sequence[str], devices: int = 2, **options: Any) -> None:
        """Starts `count` processes of `devices` devices that play the scenarios one after the other in `directory`."""
        self.directory = directory
        self.scenarios = scenarios
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._plan = {"count": count, "port": port, "devices": devices, "directory": str(directory), **options}
        self.processes = [self._started(rank, scenarios) for rank in range(count)]

    def restart(self, rank: int, scenarios: Sequence[str]) -> None:
        """Starts a process that has ended again, under the same number, to play other scenarios."""
        self.processes[rank].wait()
        self.processes[rank] = self._started(rank, scenarios)

    def _started(self, rank: int, scenarios: Sequence[str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        environment.pop("XLA_FLAGS", None)  # the count of devices of the process that runs the tests
        plan = {**self._plan, "rank": rank, "scenarios": list(scenarios)}
        cwd = self.directory / f"cwd_{rank}"
        cwd.mkdir(parents=True, exist_ok=True)
        with (self.directory / f"output_{rank}").open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", str(WORKER), json.dumps(plan)],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=cwd,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, timeout_secs: float, ranks: Sequence[int] | None = None) -> list[int]:
        """Exit codes of the processes (of `ranks`), once all have ended."""
        end = time.monotonic() + timeout_secs
        chosen = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        for process in chosen:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a process did not end within {timeout_secs} s:\n{self.outputs()}") from None
        return [process.returncode for process in chosen]

    def until(self, name: str, timeout_secs: float = 60) -> None:
        """Waits until the processes have made a file `name`."""
        end = time.monotonic() + timeout_secs
        while not (self.directory / name).exists():
            if time.monotonic() > end or all(process.poll() is not None for process in self.processes):
                raise AssertionError(f"no {name}:\n{self.outputs()}")
            time.sleep(0.02)

    def results(self, scenario: str) -> dict[int, Any]:
        """What each process found, by rank; nothing of a process that never came to it."""
        found = {rank: self.directory / f"{scenario}_{rank}.json" for rank in range(len(self.processes))}
        return {rank: json.loads(path.read_text()) for rank, path in found.items() if path.exists()}

    def outputs(self) -> str:
        return "\n".join((self.directory / f"output_{rank}").read_text()[-3000:] for rank in range(len(self.processes)))


def play(
    directory: Path, count: int, scenarios: Sequence[str], timeout_secs: float = 120, **options: Any
) -> Mapping[str, dict[int, Any]]:
    """What each process found in each scenario, by scenario and rank; every process must end well."""
    directory.mkdir(parents=True, exist_ok=True)
    with Job(directory, count, scenarios, **options) as job:
        codes = job.wait(timeout_secs)
        assert codes == [0] * count, job.outputs()
        return {scenario: job.results(scenario) for scenario in scenarios}
