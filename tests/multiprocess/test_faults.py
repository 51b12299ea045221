"""A process fails, is killed, or hangs in the middle of a save: the old checkpoint stays, and who it was is told."""

from __future__ import annotations

import os
import signal

import pytest
from runner import Job, play

pytestmark = pytest.mark.slow


def test_an_exception_at_any_stage_fails_the_save_everywhere_and_the_next_one_succeeds(tmp_path):
    found = play(tmp_path, 2, ["raised_at_each_stage"])["raised_at_each_stage"]
    for rank, result in found.items():
        for fault, seen in result["value"].items():
            stage, victim = fault.split()
            if stage == "end":  # it had written everything: the primary commits, unless it hears of the failure first
                assert rank != 0 or seen["step"] == (1 if seen["error"] else 2)
                continue
            assert seen["error"] is not None, fault
            assert "no space left" in seen["message"], fault
            assert rank == int(victim) or f"process {victim} failed" in seen["message"], fault
            assert seen["secs"] < 3, fault
            assert seen["step"] == 1, fault
            assert rank != 0 or seen["left"] == [], fault  # the primary removes it while others may already go on
            assert seen["again"] == 3, fault


def test_a_full_disk_of_one_process_is_told_to_all(tmp_path):
    found = play(tmp_path, 2, ["disk_full"])["disk_full"]
    assert "process 1 failed" in found[0]["value"]["message"]
    assert [result["value"]["error"] for result in found.values()] == ["StorageError"] * 2
    assert [result["value"]["left"] for result in found.values()] == [["disk_full_after"]] * 2


@pytest.mark.parametrize(
    ("stage", "victim", "primary"),
    [
        *[(stage, 1, 0) for stage in ("stage", "write", "barrier", "part")],
        *[(stage, 1, 1) for stage in ("barrier", "merge", "commit")],
    ],
)
def test_a_killed_process_is_named_and_the_others_save_again(tmp_path, stage, victim, primary):
    fault = {"stage": stage, "action": "kill", "victim": victim, "primary": primary}
    with Job(tmp_path, 2, ["struck"], fault=fault, survivors=[0]) as job:
        assert job.wait(60) == [0, -signal.SIGKILL], job.outputs()
        seen = job.results("struck")[0]["value"]
    assert seen["error"] == "TimeoutError"
    assert "process 1 of 2 did not come" in seen["message"]
    assert ("look whether it is there" in seen["message"]) == (stage in ("merge", "commit"))
    assert seen["secs"] < 6
    assert seen["step"] == 1
    assert seen["again"] == 3


@pytest.mark.parametrize("stage", ["stage", "write", "barrier", "part"])
def test_a_stopped_process_is_named_and_may_come_back(tmp_path, stage):
    fault = {"stage": stage, "action": "stop", "victim": 1}
    with Job(tmp_path, 2, ["struck"], fault=fault) as job:
        job.until("gave_up_0")
        job.processes[1].send_signal(signal.SIGCONT)
        assert job.wait(60) == [0, 0], job.outputs()
        seen = {rank: result["value"] for rank, result in job.results("struck").items()}
    assert seen[0]["error"] == "TimeoutError"
    assert "process 1 of 2 did not come" in seen[0]["message"]
    assert seen[0]["secs"] < 6
    assert seen[1]["error"] == "TimeoutError"
    assert [each["again"] for each in seen.values()] == [3, 3]


def test_the_death_of_process_0_ends_all_and_a_restarted_job_saves(tmp_path):
    with Job(tmp_path, 2, ["keeps_saving"], survivors=[]) as job:
        job.until("kept_1")
        job.processes[0].kill()
        codes = job.wait(60)
        assert all(code != 0 for code in codes), job.outputs()
    whole, left = play(tmp_path, 2, ["saves_once_more"])["saves_once_more"][0]["value"]
    assert whole == [[]]
    assert [name for name in left if not name.endswith(".orbax-checkpoint-tmp")] == []


@pytest.mark.parametrize(("stage", "victim"), [("part", 1), ("merge", 0), ("commit", 0)])
def test_a_job_that_is_started_again_saves_where_it_was_killed_and_tidies_up(tmp_path, stage, victim):
    with Job(tmp_path, 2, ["struck"], fault={"stage": stage, "action": "kill", "victim": victim}) as job:
        job.until("struck")  # the other process is killed too, before it gives up
    assert list(tmp_path.glob("struck_checkpoint.*")) != []
    for seen in play(tmp_path, 2, ["saves_over_struck"])["saves_over_struck"].values():
        assert seen["value"] == {"steps": [1, 9], "wrong": [], "left": []}


def test_a_process_that_is_started_again_joins_the_saves_of_those_that_went_on(tmp_path):
    with Job(tmp_path, 2, ["rejoined"], recoverable=True, survivors=[0, 1]) as job:
        job.until("gave_up_0")
        job.restart(1, ["rejoined"])
        assert job.wait(60) == [0, 0], job.outputs()
        assert job.results("rejoined") == {0: {"value": 3}, 1: {"value": 3}}


def test_clocks_that_differ_between_processes_and_jump_change_nothing(tmp_path):
    scenarios = ["round_trip", "many_saves", "missing_call"]
    found = play(tmp_path, 4, scenarios, devices=1, clock_shift_secs={"0": 7 * 3600, "1": -9 * 3600})
    assert [found["round_trip"][rank]["value"]["wrong"] for rank in range(4)] == [[]] * 4
    assert [found["many_saves"][rank]["value"] for rank in range(4)] == [[100, 1, 2, 3, 4]] * 4
    lost = [found["missing_call"][rank]["value"] for rank in (0, 2, 3)]
    assert all("process 1 of 4 did not come" in each["message"] for each in lost), lost
    assert all(3 <= each["secs"] < 6 for each in lost), lost


def test_a_stopped_process_0_ends_all_after_the_heartbeat_of_jax_and_the_old_checkpoint_stays(tmp_path):
    fault = {"stage": "commit", "action": "stop", "victim": 0}
    with Job(tmp_path, 2, ["struck"], fault=fault, heartbeat_secs=10) as job:
        job.until("struck")
        assert job.wait(40, [1]) != [0], job.outputs()
    kept = play(tmp_path, 1, ["step_there"], path="struck_checkpoint")["step_there"]
    assert kept[0]["value"] == 1


def test_with_recoverability_the_others_save_on_after_jax_has_noticed_a_death(tmp_path):
    with Job(tmp_path, 2, ["survives"], recoverable=True, heartbeat_secs=10, survivors=[0]) as job:
        assert job.wait(60) == [0, -signal.SIGKILL], job.outputs()
        assert job.results("survives")[0] == {"value": 4}


def test_two_jobs_on_one_path_do_not_mix(tmp_path):
    os.mkdir(tmp_path / "a")
    os.mkdir(tmp_path / "b")
    for name in "ab":
        os.symlink(tmp_path, tmp_path / name / "shared")
    with Job(tmp_path / "a", 2, ["same_path"]) as first, Job(tmp_path / "b", 2, ["same_path"]) as second:
        assert first.wait(60) + second.wait(60) == [0] * 4, first.outputs() + second.outputs()
        found = [*first.results("same_path").values(), *second.results("same_path").values()]
    assert all(set(each["value"]["errors"]) <= {"BusyError"} for each in found), found
    assert all(each["value"]["wrong"] == [] for each in found)
