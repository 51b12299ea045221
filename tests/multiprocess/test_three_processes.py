"""Three processes, started once: what takes more than two to go wrong."""

from __future__ import annotations

import pytest
from runner import play

SCENARIOS = ["two_of_three"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, by scenario; every process must end well."""
    return play(tmp_path_factory.mktemp("three"), 3, SCENARIOS, devices=1)


def values(found, scenario):
    results = found[scenario]
    assert all("value" in result for result in results.values()), results
    return [results[rank]["value"] for rank in sorted(results)]


def test_saves_of_the_first_processes_do_not_put_those_of_all_out_of_step(found):
    assert values(found, "two_of_three") == [["0", "1", "2", "3"]] * 3
