"""What several processes need is read by the first of them: who reads what, that it comes back whole, and what goes wrong."""

from __future__ import annotations

import signal

import pytest
from runner import Job, play

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4])
def found(tmp_path_factory, request):
    """What each process found, by scenario."""
    results = play(tmp_path_factory.mktemp("shared"), request.param, ["saves_shared", "shared", "shared_failures"])
    assert all("value" in each for by_rank in results.values() for each in by_rank.values()), results
    return {scenario: [by_rank[rank]["value"] for rank in sorted(by_rank)] for scenario, by_rank in results.items()}


def test_it_comes_back_bit_by_bit(found):
    assert [each["wrong"] for each in found["shared"]] == [[]] * len(found["shared"])


@pytest.mark.parametrize("place", ["all", "as saved", "replicas", "columns", "rows"])
def test_everything_is_read_once(found, place):
    read = [each["read"][place] for each in found["shared"]]
    once = 18_432_512  # bytes of all arrays
    assert once <= sum(read) <= 1.001 * once  # small arrays are one chunk, of which each may need another part


@pytest.mark.parametrize(("place", "replicas"), [("all", 1), ("as saved", 1), ("replicas", 2), ("rows", None)])
def test_the_processes_of_the_first_replica_read(found, place, replicas):
    """'replicas' are two, each over one half of the processes, and those of 'rows' lie within a process."""
    read = [each["read"][place] for each in found["shared"]]
    readers = len(read) if replicas is None else 1 if replicas == 1 else len(read) // 2
    assert [bytes_read > 0 for bytes_read in read] == [True] * readers + [False] * (len(read) - readers)
    assert max(read) <= 1.001 * min(read[:readers])


def test_a_reader_that_fails_fails_the_restore_on_all(found):
    reader, *others = (each["damaged"] for each in found["shared_failures"])
    assert reader[0] == "CorruptCheckpointError"
    assert "('large',): chunk" in reader[1]
    assert all(kind == "CorruptCheckpointError" and text.startswith("process 0 failed: ") for kind, text in others)


def test_a_process_that_fails_later_fails_the_restore_on_all_and_the_next_one_succeeds(found):
    for rank, each in enumerate(found["shared_failures"]):
        assert each["assemble"][0] == ("MemoryError" if rank == 1 else "ProcessError")
        assert rank == 1 or each["assemble"][1] == "process 1 failed: MemoryError: no memory, says the test"
        assert "again" not in each


def test_processes_that_restore_different_things_are_told_so(found):
    for rank, each in enumerate(found["shared_failures"]):
        assert each["other"][0] == "ProcessError"
        assert "do not restore the same" in each["other"][1]
        assert "first difference: leaf ('large',), shared parts" in each["other"][1]
        assert each["bad target"][0] == "TargetError"
        assert rank == 1 or each["bad target"][1].startswith("process 1 failed: ")


def test_a_process_that_does_not_call_restore_is_named(found):
    kind, text = found["shared_failures"][0]["absent"]
    assert kind == "TimeoutError"
    assert "process 1 of " in text
    assert "did not come to the point 'restore' of the restore" in text


def test_what_it_cannot_do_is_refused(found):
    assert {each["skip"][0] for each in found["shared_failures"]} == {"ArgsError"}


def test_a_killed_process_fails_the_restore_on_the_others_at_once(tmp_path):
    with Job(tmp_path, 2, ["saves_shared", "shared_struck"], survivors=[0]) as job:
        assert job.wait(60) == [0, -signal.SIGKILL], job.outputs()
        kind, text, secs = job.results("shared_struck")[0]["value"]
    assert kind == "ProcessError"
    assert "process 0 could not pass on what it read to process 1: " in text
    assert secs < 10


@pytest.mark.parametrize(
    ("action", "kind", "told"),
    [
        ("fail", "ProcessError", "process 1 failed: no device memory, says the test"),
        ("interrupt", "ProcessError", "process 1 failed: KeyboardInterrupt: "),
        ("stop", "TimeoutError", "process 1 of 2 did not come to the point 'exchange' of the restore"),
    ],
)
def test_nobody_waits_for_ever_for_devices_of_a_process_that_cannot_take_part(tmp_path, action, kind, told):
    with Job(tmp_path, 2, ["shared_cut_off"], survivors=[0], action=action) as job:
        job.wait(60, [0])
        found = job.results("shared_cut_off")[0]["value"]
    assert found[0] == kind
    assert told in found[1]
    assert found[2] < 10
