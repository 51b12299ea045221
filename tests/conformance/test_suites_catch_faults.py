"""The suites can fail: for each of their checks something that breaks its promise, and is caught by it."""

from __future__ import annotations

import inspect
import itertools
from fractions import Fraction

import faulty_backends as faulty
import faulty_handlers
import pytest
from faulty_backends import broken

from ckptkit.testing import CheckpointHandlerTests, StorageBackendTests, TypeHandlerTests
from ckptkit.testing.handlers import _Case

BACKENDS = {
    "test_refuses_with_reasons_and_takes_plain_arrays": broken(refuse=lambda self, arrays: [""] * len(arrays)),
    "test_arrays_come_back": broken(faulty.DropsAChunk),
    "test_empty_arrays_are_listed": broken(reader=faulty.ForgetsEmpty),
    "test_names_are_kept_or_refused": broken(faulty.FollowsNames),
    "test_names_do_not_run_into_each_other": broken(faulty.Leaks),
    "test_drawn_names": broken(faulty.Leaks),
    "test_chunks_in_any_order": broken(faulty.NeedsOrder),
    "test_data_is_free_when_the_future_is_done": broken(faulty.KeepsReferences),
    "test_data_is_only_read": broken(faulty.WritesIntoTheData),
    "test_nothing_is_written_after_abort": broken(faulty.WritesLater),
    "test_concurrent_writers": faulty.SharesItsState,
    "test_several_processes_write_together": faulty.NeverMerges,
    "test_a_failed_write_is_an_error": broken(faulty.Silent),
    "test_reads_parts": broken(reader=faulty.FillsTooMuch),
    "test_reads_any_part": broken(reader=faulty.ReadsNoParts),
    "test_concurrent_reads": broken(reader=faulty.OneAtATime),
    "test_an_unknown_array_is_not_found": broken(reader=faulty.MakesUpArrays),
    "test_recognises_its_own": broken(recognises=lambda self, location: True),
    "test_leaves_no_file_open": broken(reader=faulty.LeavesOpen),
    "test_leaves_no_thread_running": broken(reader=faulty.LeavesThreads),
    "test_trees_come_back": broken(reader=faulty.MisShapes),
    "test_refusals_come_before_any_io": broken(faulty.LikesFewDtypes),
    "test_partial_restore": broken(reader=faulty.Zeros),
    "test_damage_is_an_error": broken(reader=faulty.Unchecked),
    "test_changed_data_files_are_an_error": broken(faulty.NamesWhatNobodyChecks),
    "test_a_cancelled_save": broken(faulty.WritesLater),
    "test_a_failed_save_leaves_nothing": broken(faulty.Silent),
    "test_a_fresh_process_restores": faulty.Plain,  # nothing installs it
    "test_many_arrays_in_proportion": broken(reader=faulty.Quadratic),
}


def arguments(check, registry, new_location, **given):
    """What a check asks for, as fixtures would give it."""
    numbers = {
        "name": "../outside",
        "names": ("a", "b"),
        "shapes": ((0,), (2,)),
        "side": 4,
        "owners": (0, 1),
        "location": new_location(),
    }
    everything = {"registry": registry, "new_location": new_location, **numbers, **given}
    return {name: everything[name] for name in inspect.signature(check).parameters if name in everything}


def checks(suite):
    return {name for name in dir(suite) if name.startswith("test_")}


def assert_caught(check, registry, new_location, **given):
    with pytest.raises((Exception, pytest.fail.Exception)) as caught:
        check(**arguments(check, registry, new_location, **given))
    notes = itertools.chain.from_iterable(getattr(e, "__notes__", ()) for e in _all(caught.value))
    assert any(note.startswith("Broken promise: ") and "Documented at: " in note for note in notes)


def _all(error):
    """An error, and those that a group of them holds."""
    return [error, *(part for each in getattr(error, "exceptions", ()) for part in _all(each))]


def test_every_check_of_backends_has_its_fault():
    assert BACKENDS.keys() == checks(StorageBackendTests)


LONG = {"test_many_arrays_in_proportion", "test_trees_come_back"}


@pytest.mark.parametrize("check", [pytest.param(check, marks=pytest.mark.slow) if check in LONG else check for check in BACKENDS])
def test_the_fault_of_a_backend_is_caught(check, registry, new_location, monkeypatch):
    monkeypatch.setattr("ckptkit.testing.storage._ENDING_SECS", 0.1)

    class Suite(StorageBackendTests):
        many = 1_000

    assert_caught(getattr(Suite(), check), registry, new_location, backend=BACKENDS[check]())


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [broken(faulty.SwapsTwoChunks), broken(reader=faulty.Stale), broken(faulty.WritesLater)],
    ids=["swaps", "stale", "late"],
)
def test_other_faults_are_caught_on_the_way_back(backend, registry, new_location):
    assert_caught(StorageBackendTests().test_arrays_come_back, registry, new_location, backend=backend())


def test_an_exception_of_a_readers_own_over_a_changed_data_file_is_caught(registry, new_location):
    backend = broken(faulty.NamesWhatNobodyChecks, faulty.Stumbles)()
    check = StorageBackendTests().test_changed_data_files_are_an_error
    with pytest.raises(AssertionError, match=r"unused\.bin, .*: expected a CheckpointError of the plugin's own"):
        check(backend, new_location(), registry)


def test_a_future_that_waits_for_commit_is_caught(registry, new_location, monkeypatch):
    monkeypatch.setattr("ckptkit.testing._backends.TIMEOUT_SECS", 0.1)
    check = StorageBackendTests().test_data_is_free_when_the_future_is_done
    assert_caught(check, registry, new_location, backend=broken(faulty.WaitsForCommit)())


@pytest.mark.parametrize("backend", [faulty.WritesAlone, faulty.MergesTooSoon])
def test_what_another_process_wrote_and_a_merge_lost_is_missed(backend, registry, new_location):
    check = StorageBackendTests().test_several_processes_write_together
    assert_caught(check, registry, new_location, backend=backend())


class TestThePlainOneKeepsEveryPromise(StorageBackendTests):
    many = 1_000
    fresh_process = False  # nothing installs it

    @pytest.fixture
    def backend(self):
        return faulty.Together()


@pytest.mark.parametrize("shapes", [((0,),), ((), (3, 0, 2), (2,))])
def test_a_backend_may_refuse_empty_arrays(location, shapes):
    StorageBackendTests().test_empty_arrays_are_listed(faulty.HasNoEmptyArrays(), location, shapes)


@pytest.mark.parametrize("check", faulty_handlers.LEAVES)
def test_the_fault_of_a_type_handler_is_caught(check, registry, new_location):
    class Suite(TypeHandlerTests):
        leaf_types = Fraction
        many = 1_000

        def spoil(self, leaf):
            leaf.values[...] = 0

    handler, leaf_type, make_leaf = faulty_handlers.LEAVES[check]
    Suite.leaf_types = leaf_type
    registry.add_type_handler(handler, leaf_type, override=True)
    assert_caught(getattr(Suite(), check), registry, new_location, handler=handler, make_leaf=make_leaf, with_handler=registry)


def test_every_check_of_type_handlers_has_its_fault():
    assert faulty_handlers.LEAVES.keys() == checks(TypeHandlerTests)


@pytest.mark.parametrize("check", faulty_handlers.HANDLERS)
def test_the_fault_of_a_handler_is_caught(check, registry, new_location, tmp_path):
    class Suite(CheckpointHandlerTests):
        checksummed = True

        def spoil(self, item):
            item.clear()

    args_class, handler_class = faulty_handlers.HANDLERS[check]()
    if check != "test_is_made_by_the_registry":
        registry.add_args(args_class, handler_class, for_save=True, for_restore=True)
    case = _Case(handler_class(), lambda seed: ["line", str(seed)], args_class, None, registry, new_location)
    assert_caught(getattr(Suite(), check), registry, new_location, case=case, tmp_path=tmp_path, given=False)


def test_every_check_of_handlers_has_its_fault():
    assert faulty_handlers.HANDLERS.keys() == checks(CheckpointHandlerTests)


def case_of(made, registry, new_location, make_item=lambda seed: ["line", str(seed)]):
    """What the suite of handlers gives its checks."""
    args_class, handler_class = made
    registry.add_args(args_class, handler_class, for_save=True, for_restore=True)
    return _Case(handler_class(), make_item, args_class, None, registry, new_location)


def test_a_handler_may_raise_errors_of_another_library(registry, new_location):
    case = case_of(faulty_handlers.lines(save=faulty_handlers.save_to_database)(), registry, new_location)
    CheckpointHandlerTests().test_a_failed_save_leaves_nothing(case)


def test_items_that_cannot_be_pickled_are_restored_by_a_fresh_process_and_skipped(registry, new_location, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("ckptkit.testing._checkpoints.fresh_process", lambda *arguments: started.append(arguments))
    made = faulty_handlers.lines()()
    case = case_of(made, registry, new_location, lambda seed: faulty_handlers.Unpicklable(["line", str(seed)]))
    with pytest.raises(pytest.skip.Exception, match="the item could not be pickled: TypeError: a list of locks"):
        CheckpointHandlerTests().test_a_fresh_process_restores(case, tmp_path)
    assert len(started) == 1
