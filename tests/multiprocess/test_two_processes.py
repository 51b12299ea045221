"""Two processes of two devices, started once: what they save and restore together, and what they refuse."""

from __future__ import annotations

import pytest
from runner import play

SCENARIOS = [
    "round_trip",
    "many_saves",
    "without_ocdbt",
    "compressed",
    "own_shardings",
    "composite",
    "saves_matrix",
    "bytes_read",
    "two_at_once",
    "some_of_them",
    "other_tree",
    "other_shape",
    "other_path",
    "other_timeouts",
    "other_primary",
    "no_primary",
    "slow_primary",
    "differences",
    "host_local",
    "bad_leaf",
    "taken",
    "unshared",
    "local_each",
    "one_writer",
    "other_items",
    "skipped_save",
    "disagreements",
    "restores_astray",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, by scenario."""
    return play(tmp_path_factory.mktemp("two"), 2, SCENARIOS)


def values(found, scenario):
    results = found[scenario]
    assert all("value" in result for result in results.values()), results
    return [results[rank]["value"] for rank in sorted(results)]


def test_a_tree_comes_back_as_it_was_saved(found):
    assert [value["wrong"] for value in values(found, "round_trip")] == [[], []]


def test_the_layout_is_that_of_orbax(found):
    names = values(found, "round_trip")[0]["files"]
    assert {"manifest.ocdbt", "ocdbt.process_0/manifest.ocdbt", "ocdbt.process_1/manifest.ocdbt"} <= set(names)
    assert not [name for name in names if "mark" in name or "index.process" in name]


def test_saves_follow_each_other_in_the_background(found):
    assert values(found, "many_saves") == [[100, 1, 2, 3, 4]] * 2


def test_two_checkpointers_save_at_the_same_time(found):
    assert values(found, "two_at_once") == [[6, 6]] * 2


def test_the_zarr_backend_needs_no_merge(found):
    assert values(found, "without_ocdbt") == [[], []]


def test_all_processes_compress_an_array_alike(found):
    assert values(found, "compressed") == [True, True]


def test_every_item_of_a_composite_is_written_once(found):
    for value in values(found, "composite"):
        assert (value["wrong"], value["info"]) == ([], {"x": 1})


def test_the_list_of_files_covers_what_every_process_wrote(found):
    for value in values(found, "composite"):
        assert value["state"] == "whole"
        assert "more/manifest.ocdbt" in value["listed"]
        assert not [name for name in value["listed"] if "/d/" in name or "process_1/" in name]


def test_equal_shardings_count_as_one_on_every_process(found):
    assert values(found, "own_shardings") == [[0, 1, 2, 3]] * 2


def test_a_process_reads_what_its_devices_hold(found):
    for ratios in values(found, "bytes_read"):
        assert len(ratios) == 1
        assert max(ratios) <= 1.1


def test_some_processes_save_without_the_others(found):
    assert values(found, "some_of_them") == [[1.0, 1.0], "ArgsError"]


@pytest.mark.parametrize("scenario", ["other_tree", "other_shape", "other_path", "other_timeouts"])
def test_processes_that_save_different_things_are_told_who_does(found, scenario):
    for value in values(found, scenario):
        assert value["error"] == "ProcessError"
        assert "process 0: " in value["message"]
        assert "process 1: " in value["message"]
        assert value["left"] == [f"{scenario}_after"]


def test_a_different_timeout_is_told_at_once(found):
    for value in values(found, "other_timeouts"):
        assert "timeout_secs: process 0: 60; process 1: 3" in value["message"]
        assert value["secs"] < 3


@pytest.mark.parametrize(("scenario", "told"), [("other_primary", (0, 1)), ("no_primary", (1, 0))])
def test_another_primary_is_told_before_a_timeout(found, scenario, told):
    for value in values(found, scenario):
        assert value["error"] == "ProcessError"
        assert f"primary_host: process 0: {told[0]}; process 1: {told[1]}" in value["message"]
        assert value["secs"] < 3
        assert value["left"] == [f"{scenario}_after"]


def test_who_has_no_patience_with_a_process_that_lives_says_so_and_claims_nothing_of_the_commit(found):
    (primary, other) = values(found, "slow_primary")
    assert primary is None
    assert "did not come to the point 'committed' of the save within 2 s, 1 times timeout_secs, though alive" in other
    assert "does not know whether the checkpoint was committed: look whether it is there" in other


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        ("missing there", "process 1 has no leaf ('b', 'c'), which process 0 has (kind np.ndarray, shape (3, 4), dtype float64"),
        ("missing here", "process 0 has no leaf ('a',), which process 1 has (kind np.ndarray, shape (2,), dtype float64"),
        ("shape", "leaf ('b', 'c'), shape (3, 4) on process 0, (3, 5) on process 1; chunks of"),
        ("dtype", "leaf ('a',), dtype float64 on process 0, int16 on process 1"),
        ("kind", "leaf ('b', 'd'), kind scalar on process 0, dict on process 1"),
        ("late", "leaf ('leaf17654',), kind scalar on process 0, np.ndarray on process 1"),
        ("one more", "process 0 has no leaf ('z',), which process 1 has (kind scalar"),
        ("sharding", "leaf ('leaf069',), chunks of (2,) on process 0, (8,) on process 1; sharding "),
    ],
)
def test_the_first_leaf_that_differs_is_named_and_how_at_little_traffic(found, difference, told):
    for value in values(found, "differences"):
        message, byte_count = value[difference]
        assert f"first difference: {told}" in message
        assert byte_count < 10_000


def test_an_array_of_one_process_is_refused_with_what_to_do(found):
    for value in values(found, "host_local"):
        assert value["error"] == "TreeError"
        assert "make_array_from_process_local_data" in value["message"]


def test_what_one_process_cannot_save_fails_the_save_on_all(found):
    assert [value["error"] for value in values(found, "bad_leaf")] == ["TreeError"] * 2
    assert "process 1 failed: " in values(found, "bad_leaf")[0]["message"]
    assert [value["left"] for value in values(found, "bad_leaf")] == [["bad_leaf_after"]] * 2


def test_a_taken_destination_is_the_same_error_on_all(found):
    assert [value["error"] for value in values(found, "taken")] == ["ExistsError"] * 2


def test_storage_that_is_not_shared_is_noticed_early(found):
    for value in values(found, "unshared"):
        assert value["error"] == "StorageError"
        assert "share no storage" in value["message"]
        assert value["secs"] < 3.5


def test_each_process_may_save_its_own(found):
    assert values(found, "local_each") == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.slow  # its patience; what the primary leaves out, below, takes less
def test_a_process_that_does_not_call_save_is_named_and_may_come_back(tmp_path):
    primary = values(play(tmp_path, 2, ["round_trip", "missing_call"]), "missing_call")[0]
    assert primary["error"] == "TimeoutError"
    assert "process 1 of 2 did not come" in primary["message"]
    assert primary["secs"] < 5
    assert primary["left"] == ["missing_call_after"]


def test_a_backend_of_one_process_is_refused(found):
    assert [value["error"] for value in values(found, "one_writer")] == ["ArgsError"] * 2


def test_a_save_that_the_primary_leaves_out_does_not_put_the_next_ones_out_of_step(found):
    (_, step), (told, other) = values(found, "skipped_save")
    assert "process 0 of 2 did not come to the point 'begin'" in told
    assert (step, other) == (2, 2)


@pytest.mark.parametrize(
    ("difference", "told"),
    [
        ("long", "leaf ('a',), places ...x"),
        ("twice there", "process 0 has one less of ('a',), which process 1 has (kind k)"),
        ("twice here", "process 1 has one less of ('a',), which process 0 has (kind k)"),
    ],
)
def test_what_differs_late_in_long_words_or_is_there_twice_is_told_at_little_traffic(found, difference, told):
    for value in values(found, "disagreements"):
        message, byte_count = value[difference]
        assert f"first difference: {told}" in message
        assert difference != "long" or all(f"x {rank} y" in message for rank in (0, 1))
        assert byte_count < 10_000


@pytest.mark.parametrize(
    ("astray", "kinds", "told"),
    [
        ("other path", ["ProcessError", "ProcessError"], "do not restore the same"),
        ("missing here", ["NotFoundError", "NotFoundError"], "no checkpoint here"),
        ("missing there", ["NotFoundError", "NotFoundError"], "no checkpoint here"),
        ("closed", ["ClosedError", "ClosedError"], "is closed"),
        ("no memory", ["ProcessError", "MemoryError"], "says the test"),
        ("interrupted", ["ProcessError", "KeyboardInterrupt"], ""),
    ],
)
def test_one_process_that_goes_astray_fails_the_restore_on_all_and_the_next_one_succeeds(found, astray, kinds, told):
    for kind, value in zip(kinds, values(found, "restores_astray"), strict=True):
        assert value[astray][0] == kind
        assert told in value[astray][1]
        assert value[f"after {astray}"] == 1


def test_processes_that_restore_other_items_are_told_which(found):
    for value in values(found, "other_items"):
        assert 'items: process 0: ["one"]; process 1: ["one", "two"]' in value


def test_a_process_that_sees_a_replaced_checkpoint_late_has_all_look_again(found):
    for value in values(found, "restores_astray"):
        assert (value["seen late"], value["after seen late"]) == (1, 1)


@pytest.mark.parametrize("where", ["replaced here", "replaced there", "replaced while read"])
def test_a_checkpoint_that_one_process_sees_replaced_is_read_anew_by_all(found, where):
    for value in values(found, "restores_astray"):
        assert (value[where], value[f"after {where}"]) == (2, 2)
