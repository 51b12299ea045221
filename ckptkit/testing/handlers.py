"""The conformance suite of checkpoint handlers."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pytest
from etils import epath

import ckptkit
from ckptkit import errors
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
Maker = Callable[[Any], CheckpointArgs]


class CheckpointHandlerTests:
    """What every checkpoint handler promises.

    Override the fixtures `handler`, `make_item` and `make_args`; `restore_args` where a restore without arguments does not give
    the item back.

    Attributes:
      checksummed: whether a flipped bit in any file of the handler's is an error. It is for what goes through a storage backend;
        a handler that writes files of its own may leave that to the disk.
    """

    checksummed: ClassVar[bool] = False

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

    # Who it is

    @promise("typestr() is a string by which a registry finds the handler, and a checkpoint records it.", f"{_HANDLER}.typestr")
    def test_is_found_by_its_type_string(self, handler: CheckpointHandler, registry: Registry) -> None:
        assert registry.handler_for_typestr(handler.typestr()) is type(handler)

    @promise("The args pick the handler, and the registry makes it without constructor arguments.", "ckptkit.args.register_with_handler")
    def test_is_made_by_the_registry(
        self, handler: CheckpointHandler, make_item: Callable[[int], Any], make_args: Maker, registry: Registry
    ) -> None:
        handler_class = registry.handler_for_args(make_args(make_item(0)), use="save")
        assert handler_class is type(handler)
        handler_class().close()

    # There and back

    @promise("What was saved comes back, with the handler and without it, with args and without them.", _HANDLER)
    def test_comes_back(
        self,
        handler: CheckpointHandler,
        make_item: Callable[[int], Any],
        make_args: Maker,
        restore_args: CheckpointArgs | None,
        location: Location,
        registry: Registry,
    ) -> None:
        args = {} if restore_args is None else {"args": restore_args}
        for seed, chosen in enumerate((handler, None)):
            item, path = make_item(seed), f"{location.url}/{seed}"
            checkpointer = ckptkit.Checkpointer(chosen, registry=registry)
            checkpointer.save(path, args=make_args(item))
            self.assert_same(checkpointer.restore(path, **args), make_item(seed))
            self.assert_same(ckptkit.Checkpointer(registry=registry).restore(path, **args), make_item(seed))

    @promise("restore() and metadata() change nothing.", f"{_HANDLER}.restore")
    def test_restore_changes_nothing(self, _saved: _Saved, registry: Registry) -> None:
        before = by_hand.snapshot(_saved.location)
        _saved.restore()
        ckptkit.Checkpointer(registry=registry).metadata(_saved.location.url)
        assert by_hand.snapshot(_saved.location) == before

    @promise("save() writes into its directory, and nowhere else.", f"{_HANDLER}.save")
    def test_save_stays_inside(
        self, handler: CheckpointHandler, make_item: Callable[[int], Any], make_args: Maker, location: Location
    ) -> None:
        before = by_hand.beside(location)
        handler.save(epath.Path(location.url), args=make_args(make_item(0)))
        assert by_hand.beside(location) == before
        assert by_hand.snapshot(location), "nothing was written"

    @promise("Everything is written when save() returns, or when the futures of async_save() are done.", f"{_HANDLER}.save")
    def test_nothing_is_written_later(
        self, handler: CheckpointHandler, make_item: Callable[[int], Any], make_args: Maker, location: Location
    ) -> None:
        handler.save(epath.Path(location.url), args=make_args(make_item(0)))
        before = by_hand.snapshot(location)
        time.sleep(0.1)
        assert by_hand.snapshot(location) == before

    @promise("It can be one item of a Composite among others.", "ckptkit.args.Composite")
    def test_is_an_item_of_a_composite(
        self, make_item: Callable[[int], Any], make_args: Maker, restore_args: CheckpointArgs | None, location: Location, registry: Registry
    ) -> None:
        path = f"{location.url}/composite"
        with ckptkit.Checkpointer(registry=registry) as checkpointer:
            checkpointer.save(path, Composite(one=make_args(make_item(1)), two=make_args(make_item(2))))
            args = () if restore_args is None else (Composite(one=restore_args, two=restore_args),)
            found = checkpointer.restore(path, *args)
        self.assert_same(found.one, make_item(1))
        self.assert_same(found.two, make_item(2))

    @promise("After async_save() has returned, the caller may change what it saved.", "ckptkit.handlers.AsyncCheckpointHandler.async_save")
    def test_the_item_may_change_after_async_save(
        self,
        handler: CheckpointHandler,
        make_item: Callable[[int], Any],
        make_args: Maker,
        restore_args: CheckpointArgs | None,
        location: Location,
        registry: Registry,
    ) -> None:
        item, path = make_item(0), f"{location.url}/checkpoint"
        with ckptkit.AsyncCheckpointer(handler, registry=registry) as checkpointer:
            checkpointer.save(path, args=make_args(item))
            self.spoil(item)
        found = ckptkit.Checkpointer(registry=registry).restore(path, *(() if restore_args is None else (restore_args,)))
        self.assert_same(found, make_item(0))

    @promise("async_save() returns futures or None; one that was given up writes nothing more.", "ckptkit.handlers.AsyncCheckpointHandler.async_save")
    def test_a_cancelled_save(
        self, handler: CheckpointHandler, make_item: Callable[[int], Any], make_args: Maker, location: Location
    ) -> None:
        if not isinstance(handler, AsyncCheckpointHandler):
            pytest.skip("the save of this handler runs wholly inside the call")
        futures = asyncio.run(handler.async_save(epath.Path(location.url), args=make_args(make_item(0)))) or []
        assert all(isinstance(future, Future) for future in futures), futures
        checkpoints.give_up(futures)
        before = by_hand.snapshot(location)
        time.sleep(0.1)
        assert by_hand.snapshot(location) == before

    @promise("Two saves at once do not meet.", _HANDLER)
    def test_concurrent_saves(
        self,
        make_item: Callable[[int], Any],
        make_args: Maker,
        restore_args: CheckpointArgs | None,
        new_location: Callable[[], Location],
        registry: Registry,
    ) -> None:
        places = [new_location() for _ in range(4)]

        def there_and_back(number: int) -> Any:
            path = f"{places[number].url}/checkpoint"
            with ckptkit.Checkpointer(registry=registry) as checkpointer:
                checkpointer.save(path, make_args(make_item(number)))
                return checkpointer.restore(path, *(() if restore_args is None else (restore_args,)))

        for number, found in enumerate(checkpoints.together(there_and_back, len(places))):
            self.assert_same(found, make_item(number))

    # What goes wrong

    @promise("A save that fails raises and leaves no checkpoint.", f"{_HANDLER}.save")
    def test_a_failed_save_leaves_nothing(
        self, handler: CheckpointHandler, make_item: Callable[[int], Any], make_args: Maker, location: Location, registry: Registry
    ) -> None:
        with checkpoints.small_files(location, 0), pytest.raises((errors.CheckpointError, OSError)):
            ckptkit.Checkpointer(handler, registry=registry).save(f"{location.url}/checkpoint", args=make_args(make_item(0)))
        assert by_hand.snapshot(location) == {}

    @promise("A file that is missing or empty is an error, never another value.", f"{_HANDLER}.restore")
    def test_lost_files_are_noticed(self, _saved: _Saved) -> None:
        _saved.survives_damage(self.assert_same, checkpoints.losses)

    @promise("A wrong byte is an error, never a wrong value.", "docs/architecture.md, What is verified")
    def test_damage_is_an_error(self, _saved: _Saved) -> None:
        if not self.checksummed:
            pytest.skip("this handler leaves its bytes to the disk: set `checksummed = True` where it does not")
        _saved.survives_damage(self.assert_same, checkpoints.damages)

    @promise("A fresh process restores what was saved: the handler is found by entry point.", "docs/extending.md, A package")
    def test_a_fresh_process_restores(self, _saved: _Saved, restore_args: CheckpointArgs | None, tmp_path: Path) -> None:
        given, found = tmp_path / "args.pickle", tmp_path / "found.pickle"
        given.write_bytes(pickle.dumps(() if restore_args is None else (restore_args,)))
        code = (
            "import pickle, sys, ckptkit\n"
            "path, given, found = sys.argv[1:]\n"
            "restored = ckptkit.Checkpointer().restore(path, *pickle.load(open(given, 'rb')))\n"
            "pickle.dump(restored, open(found, 'wb'))\n"
        )
        checkpoints.fresh_process(code, _saved.location.url, str(given), str(found))
        expected = pickle.loads(pickle.dumps(_saved.item))  # noqa: S301 - our own: pickle forgets where an array lived
        self.assert_same(pickle.loads(found.read_bytes()), expected)  # noqa: S301 - what our own process wrote

    @pytest.fixture
    def _saved(
        self, make_item: Callable[[int], Any], make_args: Maker, restore_args: CheckpointArgs | None, location: Location, registry: Registry
    ) -> _Saved:
        place = registry.location(f"{location.url}/checkpoint")
        ckptkit.Checkpointer(registry=registry).save(place.url, make_args(make_item(0)))
        return _Saved(place, registry, make_item(0), restore_args)


class _Saved(checkpoints.Checkpoint):
    pass
