"""Whole checkpoints in tests: saved, restored, damaged, restored elsewhere."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import attrs
from etils import epath

import ckptkit
from ckptkit import errors
from ckptkit.args import PyTreeSave, StandardRestore
from ckptkit.handlers import PyTreeCheckpointHandler
from ckptkit.registry import Registry
from ckptkit.reports import RestoreReport
from ckptkit.storage import Location, StorageBackend
from ckptkit.testing import _backends as by_hand

__all__ = ["Checkpoint", "cancelled", "fresh_process", "in_proportion", "saved"]

_NAME = "checkpoint"
_DOCUMENTS = ("_METADATA", "_sharding", "_strings.json", "_CHECKPOINT_METADATA", "process_0")


class Checkpoint:
    """A checkpoint of a tree at `location`, restored with a registry of its own."""

    def __init__(self, location: Location, registry: Registry) -> None:
        self.location = location
        self._registry = registry

    def restore(self, target: Any = None) -> Any:
        return self.restore_reported(target)[0]

    def restore_reported(self, target: Any = None) -> tuple[Any, RestoreReport]:
        """The tree, and what reading it took."""
        observer = _Reports()
        args = () if target is None else (StandardRestore(target),)
        with ckptkit.Checkpointer(registry=self._registry, observers=[observer]) as checkpointer:
            return checkpointer.restore(self.location.url, *args), observer.report

    def sibling(self, name: str) -> Checkpoint:
        """The checkpoint of another name beside this one."""
        above, _, _ = self.location.url.rpartition("/")
        return Checkpoint(self._registry.location(f"{above}/{name}"), self._registry)

    def survives_damage(self, expected: Any, assert_same: Callable[[Any, Any], None]) -> None:
        """Damages every file in turn: each restore gives the values that were saved, or says what is wrong."""
        for (directory, name), data in by_hand.files(self.location).items():
            for what, damaged in _damages(data):
                directory.write_bytes(name, damaged)
                try:
                    found = self.restore()
                except errors.CheckpointError:
                    continue
                except Exception as error:
                    raise AssertionError(f"{name}, {what}: expected a CheckpointError") from error
                try:
                    assert_same(found, expected)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {what}: other values came back, and no error") from error
            directory.write_bytes(name, data)

    def copied_by_fresh_process(self, storage: str | None = None) -> None:
        """Another process restores this checkpoint and saves what it got as the sibling 'copy'."""
        code = (
            "import sys, ckptkit\n"
            "path, copy, storage = sys.argv[1:]\n"
            "tree = ckptkit.restore(path)\n"
            "with ckptkit.PyTreeCheckpointer(storage=storage or None) as checkpointer:\n"
            "    checkpointer.save(copy, tree)\n"
        )
        fresh_process(code, self.location.url, self.sibling("copy").location.url, storage or "")


class _Reports:
    """Keeps what a restore reports."""

    report: Any = None

    @ckptkit.hookimpl
    def ckptkit_restored(self, report: RestoreReport) -> None:
        self.report = report


def _damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Some ways in which a file can be wrong: a bit flipped here and there, the end missing."""
    step = max(1, len(data) // 12)
    for at in range(0, len(data), step):
        yield f"bit flipped at byte {at} of {len(data)}", data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
    for size in {0, len(data) // 2, len(data) - 1} - {len(data), -1}:
        yield f"cut off at byte {size} of {len(data)}", data[:size]


def _handler(registry: Registry, backend: StorageBackend | None) -> PyTreeCheckpointHandler:
    if backend is None:
        return PyTreeCheckpointHandler()
    registry.add_storage(backend, override=True)
    return PyTreeCheckpointHandler(storage=backend.name)


@contextlib.contextmanager
def saved(tree: Any, registry: Registry, place: Location, backend: StorageBackend | None = None) -> Iterator[Checkpoint]:
    """A checkpoint of the tree in `place`."""
    location = registry.location(f"{place.url}/{_NAME}")
    with ckptkit.Checkpointer(_handler(registry, backend), registry=registry) as checkpointer:
        checkpointer.save(location.url, args=PyTreeSave(tree))
    yield Checkpoint(location, registry)


def cancelled(tree: Any, registry: Registry, place: Location, backend: StorageBackend | None = None) -> None:
    """Starts a save and gives it up at once; afterwards nothing in `place` changes any more.

    Raises:
      AssertionError: something does, or the save ended in an error that is not ours.
    """
    import asyncio

    handler = _handler(registry, backend)
    handler.registry = registry
    futures = asyncio.run(handler.async_save(epath.Path(place.url), args=PyTreeSave(tree)))
    give_up(futures)
    before = by_hand.snapshot(place)
    time.sleep(0.1)
    assert by_hand.snapshot(place) == before, "something was still written after the save had ended"


def give_up(futures: Sequence[Future[Any]]) -> None:
    """Cancels what a handler started, and waits for its end."""
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            error = future.exception(by_hand.TIMEOUT_SECS)
            assert error is None or isinstance(error, errors.CheckpointError), repr(error)


def fresh_process(code: str, *arguments: str) -> None:
    """Runs Python code in a process that has imported nothing yet.

    Raises:
      AssertionError: it failed; with what it printed.
    """
    done = subprocess.run(  # noqa: S603 - this interpreter, and code of our own
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=by_hand.TIMEOUT_SECS, check=False
    )
    assert done.returncode == 0, f"a fresh process failed; is the plugin installed, with its entry point?\n{done.stderr}"


def in_proportion(work: Callable[[Any], None], few: Any, many: Any) -> None:
    """Does work on few things and on ten times as many, and compares the processor time: four times ten is too much.

    Raises:
      AssertionError: with both times.
    """
    work(few)  # whatever is imported or compiled once
    short, long = statistics.median(_secs(work, few) for _ in range(3)), _secs(work, many)
    assert long < 40 * short, f"{len(few)} took {short:.3f} s of processor time, {len(many)} took {long:.3f} s"


def _secs(work: Callable[[Any], None], things: Any) -> float:
    start = time.process_time()
    work(things)
    return time.process_time() - start
