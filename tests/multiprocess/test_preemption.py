"""One process is told to end, and all save at the same step."""

from __future__ import annotations

import signal

import pytest
from runner import Job


@pytest.mark.slow
def test_all_processes_save_at_the_same_step(tmp_path):
    with Job(tmp_path, 2, ["preempted"], survivors=[0, 1]) as job:
        job.until("stepping_0")
        job.until("stepping_1")
        job.processes[1].send_signal(signal.SIGTERM)
        assert job.wait(60) == [0, 0], job.outputs()
        found = job.results("preempted")
    step = found[0]["value"][0]
    assert found == {0: {"value": [step, step]}, 1: {"value": [step, step]}}
