"""The conformance suite of checkpoint handlers."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

import ckptkit
from ckptkit.args import CheckpointArgs, Composite
from ckptkit.handlers import AsyncCheckpointHandler, CheckpointHandler
from ckptkit.registry import Registry
from ckptkit.storage import Location
from ckptkit.testing import _backends as by_hand
from ckptkit.testing import _checkpoints as checkpoints
from ckptkit.testing._promises import missing_fixture, promise
from ckptkit.testing.comparison import assert_same

__all__ = ["CheckpointHandlerTests"]

_HANDLER = "ckptkit.handlers.CheckpointHandler"
_ASYNC_SAVE = "ckptkit.handlers.AsyncCheckpointHandler.async_save"
Maker = Callable[[Any], CheckpointArgs]


class _Case(NamedTuple):
    """What a subclass put under test."""

    handler: CheckpointHandler
    make_item: Callable[[int], Any]
    make_args: Maker
    restore_args: CheckpointArgs | None
    registry: Registry
    new_location: Callable[[], Location]

    def args(self, seed: int = 0) -> CheckpointArgs:
        """The args that save the item of a seed."""
        return self.make_args(self.make_item(seed))

    def saved(self, seed: int = 0, handler: CheckpointHandler | None = None) -> checkpoints.Checkpoint:
        """A checkpoint of the item of a seed; without a handler its args pick one."""
        place = self.registry.location(f"{self.new_location().url}/checkpoint")
        ckptkit.Checkpointer(handler, registry=self.registry).save(place.url, args=self.args(seed))
        return checkpoints.Checkpoint(place, self.registry)


class CheckpointHandlerTests:
    """What every checkpoint handler promises.

    Override the fixtures `handler`, `make_item` and `make_args`; `restore_args` where a restore without arguments does not give
    the item back.

    Attributes:
      checksummed: whether a flipped bit in any file is tried; False for a handler whose large files make that take too long.
    """

    checksummed: ClassVar[bool] = True

    @pytest.fixture
    def handler(self) -> CheckpointHandler:
        return missing_fixture(self, "handler", "the CheckpointHandler under test")  # type: ignore[no-any-return]  # it raises

    @pytest.fixture
    def make_item(self) -> Callable[[int], Any]:
        """Makes what is saved from a seed, which is what a restore gives back: another for another seed."""
        return missing_fixture(self, "make_item", "a function: seed -> item")  # type: ignore[no-any-return]  # it raises

    @pytest.fixture
    def make_args(self) -> Maker:
        """Makes the args that save an item; usually the args class itself."""
        return missing_fixture(self, "make_args", "a function: item -> CheckpointArgs")  # type: ignore[no-any-return]  # it raises

    @pytest.fixture
    def restore_args(self) -> CheckpointArgs | None:
        """The args that restore the item; None for those that are made with no arguments."""
        return None

    @pytest.fixture
    def registry(self, devices: Any) -> Registry:
        """The one that `register_with_handler` fills, with every installed plugin."""
        return ckptkit.default_registry()

    def assert_same(self, found: Any, expected: Any) -> None:
        """Fails where what was restored differs from the item; by default what is no array is compared by `==`."""
        assert_same(found, expected)

    def spoil(self, item: Any) -> None:
        """Changes an item in place, as a training step would after the save; override it where that can be done."""
        pytest.skip("items of this kind cannot be changed: override `spoil` where they can")

    @pytest.fixture
    def case(
        self,
        handler: CheckpointHandler,
        make_item: Callable[[int], Any],
        make_args: Maker,
        restore_args: CheckpointArgs | None,
        registry: Registry,
        new_location: Callable[[], Location],
    ) -> _Case:
        """All of the above in one; not to be overridden."""
        return _Case(handler, make_item, make_args, restore_args, registry, new_location)

    # Who it is

    @promise("typestr() is a string by which a registry finds the handler again.", f"{_HANDLER}.typestr")
    def test_is_found_by_its_type_string(self, case: _Case) -> None:
        assert case.registry.handler_for_typestr(case.handler.typestr()) is type(case.handler)

    @promise("The args pick the handler; the registry makes it with no arguments.", "ckptkit.args.register_with_handler")
    def test_is_made_by_the_registry(self, case: _Case) -> None:
        handler_class = case.registry.handler_for_args(case.args(), use="save")
        assert handler_class is type(case.handler)
        handler_class().close()

    # There and back

    @promise("What was saved comes back, by a checkpointer with the handler and by one without.", _HANDLER)
    @pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
    def test_comes_back(self, case: _Case, *, given: bool) -> None:
        handler = case.handler if given else None
        checkpoint = case.saved(1, handler)
        self.assert_same(checkpoint.restore(case.restore_args), case.make_item(1))
        with ckptkit.Checkpointer(handler, registry=case.registry) as checkpointer:
            args = {} if case.restore_args is None else {"args": case.restore_args}
            self.assert_same(checkpointer.restore(checkpoint.location.url, **args), case.make_item(1))

    @promise("restore() and metadata() change nothing.", f"{_HANDLER}.restore")
    def test_restore_changes_nothing(self, case: _Case) -> None:
        checkpoint = case.saved()
        before = by_hand.snapshot(checkpoint.location)
        checkpoint.restore(case.restore_args)
        ckptkit.Checkpointer(registry=case.registry).metadata(checkpoint.location.url)
        assert by_hand.snapshot(checkpoint.location) == before

    @promise("save() writes into its directory, and nowhere else.", f"{_HANDLER}.save")
    def test_save_stays_inside(self, case: _Case) -> None:
        location = case.new_location()
        before = by_hand.beside(location)
        case.handler.save(location.path, args=case.args())
        assert by_hand.beside(location) == before, "something was written outside of the directory"
        assert by_hand.snapshot(location), "nothing was written"

    @promise("Everything is written when save() returns, or when the futures of async_save() are done.", f"{_HANDLER}.save")
    def test_nothing_is_written_later(self, case: _Case) -> None:
        location = case.new_location()
        case.handler.save(location.path, args=case.args())
        checkpoints.stays_as_it_is(location)

    @promise("It can be one item of a Composite among others.", "ckptkit.args.Composite")
    def test_is_an_item_of_a_composite(self, case: _Case) -> None:
        path = f"{case.new_location().url}/composite"
        with ckptkit.Checkpointer(registry=case.registry) as checkpointer:
            checkpointer.save(path, Composite(one=case.args(1), two=case.args(2)))
            found = checkpointer.restore(path, Composite(one=case.restore_args, two=case.restore_args))
        self.assert_same(found.one, case.make_item(1))
        self.assert_same(found.two, case.make_item(2))

    @promise("After async_save() has returned, the caller may change what it saved.", _ASYNC_SAVE)
    def test_the_item_may_change_after_the_call(self, case: _Case) -> None:
        item, path = case.make_item(0), f"{case.new_location().url}/checkpoint"
        with ckptkit.AsyncCheckpointer(case.handler, registry=case.registry) as checkpointer:
            checkpointer.save(path, args=case.make_args(item))
            self.spoil(item)
        restored = checkpoints.Checkpoint(case.registry.location(path), case.registry).restore(case.restore_args)
        self.assert_same(restored, case.make_item(0))

    @promise("async_save() returns futures or None; one that was given up writes nothing more.", _ASYNC_SAVE)
    def test_a_cancelled_save(self, case: _Case) -> None:
        if not isinstance(case.handler, AsyncCheckpointHandler):
            pytest.skip("the save of this handler runs wholly inside the call")
        location = case.new_location()
        futures = asyncio.run(case.handler.async_save(location.path, args=case.args())) or []
        assert all(isinstance(future, Future) for future in futures), futures
        checkpoints.give_up(futures)
        checkpoints.stays_as_it_is(location)

    @promise("Saves and restores at once do not meet.", _HANDLER)
    def test_concurrent_saves(self, case: _Case) -> None:
        found = checkpoints.together(lambda seed: case.saved(seed).restore(case.restore_args), 4)
        for seed, item in enumerate(found):
            self.assert_same(item, case.make_item(seed))

    # What goes wrong

    @promise("A save that fails raises, and leaves no checkpoint.", f"{_HANDLER}.save")
    def test_a_failed_save_leaves_nothing(self, case: _Case) -> None:
        location, directory = case.new_location(), case.new_location()
        with checkpoints.small_files(directory, 0), pytest.raises(Exception):  # noqa: B017, PT011 - it is passed on as it is
            case.handler.save(directory.path, args=case.args())
        with (
            ckptkit.Checkpointer(case.handler, registry=case.registry) as checkpointer,
            checkpoints.small_files(location, 0),
            pytest.raises(Exception),  # noqa: B017, PT011 - as above
        ):
            checkpointer.save(f"{location.url}/checkpoint", args=case.args())
        assert by_hand.snapshot(location) == {}

    @promise("A file that lost its bytes is an error, never another value.", f"{_HANDLER}.restore")
    def test_lost_bytes_are_noticed(self, case: _Case) -> None:
        checkpoint, item = case.saved(), case.make_item(0)
        checkpoint.survives(checkpoints.losses, lambda found: self.assert_same(found, item), case.restore_args, Exception)

    @promise("A wrong byte is an error, never a wrong value.", "docs/architecture.md, What is verified")
    def test_damage_is_an_error(self, case: _Case) -> None:
        if not self.checksummed:
            pytest.skip("checksummed = False")
        checkpoint, item = case.saved(), case.make_item(0)
        checkpoint.survives(checkpoints.damages, lambda found: self.assert_same(found, item), case.restore_args)

    @promise("A fresh process restores what was saved: the handler is found by entry point.", "docs/extending.md, A package")
    def test_a_fresh_process_restores(self, case: _Case, tmp_path: Path) -> None:
        args, no_args = _pickled(() if case.restore_args is None else (case.restore_args,))
        item, no_item = _pickled(case.make_item(0))
        if no_args:
            pytest.skip(f"restore_args could not be pickled for the fresh process: {no_args}")
        given, found = tmp_path / "args.pickle", tmp_path / "found.pickle"
        given.write_bytes(args)
        code = (
            "import pickle, sys, ckptkit\n"
            "path, given, found = sys.argv[1:]\n"
            "restored = ckptkit.Checkpointer().restore(path, *pickle.load(open(given, 'rb')))\n"
            "if found:\n"
            "    pickle.dump(restored, open(found, 'wb'))\n"
        )
        checkpoints.fresh_process(code, case.saved().location.url, str(given), "" if no_item else str(found))
        if no_item:
            pytest.skip(f"a fresh process restored it, but what was not seen: the item could not be pickled: {no_item}")
        expected = pickle.loads(item)  # noqa: S301 - our own; pickle forgets where an array lived
        self.assert_same(pickle.loads(found.read_bytes()), expected)  # noqa: S301 - written by the process above


def _pickled(value: Any) -> tuple[bytes, str]:
    """A value for another process, and why it cannot be sent: '' where it can."""
    try:
        return pickle.dumps(value), ""
    except Exception as error:  # noqa: BLE001 - whatever the value's own methods raise
        return b"", f"{type(error).__name__}: {error}"
