"""Whole checkpoints in tests: saved, restored, damaged, restored elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

import ckptkit
from ckptkit import errors
from ckptkit.args import CheckpointArgs, PyTreeSave, StandardRestore
from ckptkit.handlers import PyTreeCheckpointHandler
from ckptkit.registry import Registry
from ckptkit.reports import RestoreReport
from ckptkit.storage import Location, StorageBackend
from ckptkit.testing import _backends as by_hand

__all__ = [
    "Checkpoint",
    "cancelled",
    "changes",
    "damages",
    "fresh_process",
    "give_up",
    "in_proportion",
    "losses",
    "saved",
    "small_files",
    "stays_as_it_is",
    "together",
]

T = TypeVar("T")


class Checkpoint:
    """A checkpoint at `location`, restored with the registry given."""

    def __init__(self, location: Location, registry: Registry) -> None:
        self.location = location
        self._registry = registry

    def restore(self, target: Any = None) -> Any:
        """What it holds, into a target or with args if there are some."""
        return self.restore_reported(target)[0]

    def restore_reported(self, target: Any = None) -> tuple[Any, RestoreReport]:
        """The same, and what reading it took."""
        observer = _Reports()
        args = () if target is None else (target if isinstance(target, CheckpointArgs) else StandardRestore(target),)
        with ckptkit.Checkpointer(registry=self._registry, observers=[observer]) as checkpointer:
            return checkpointer.restore(self.location.url, *args), observer.report

    def sibling(self, name: str) -> Checkpoint:
        """The checkpoint of another name beside this one."""
        above, _, _ = self.location.url.rpartition("/")
        return Checkpoint(self._registry.location(f"{above}/{name}"), self._registry)

    def survives(
        self,
        ways: Callable[[bytes], Iterable[tuple[str, bytes]]],
        assert_same: Callable[[Any], None],
        target: Any = None,
        refusal: type[Exception] = errors.CheckpointError,
    ) -> None:
        """Damages every file in turn: each restore gives the values that were saved, or says what is wrong.

        Args:
          ways: how the bytes of a file can be wrong, each with a name.
          assert_same: fails where what was restored is not what was saved.
          target: as for `restore`.
          refusal: what a restore may raise.

        Raises:
          AssertionError: names the file, and the damage.
        """
        for (directory, name), data in by_hand.files(self.location).items():
            for what, damaged in ways(data):
                directory.write_bytes(name, damaged)
                try:
                    found = self.restore(target)
                except Exception as error:
                    if _is_meant(error, refusal):
                        continue
                    raise AssertionError(f"{name}, {what}: expected a {refusal.__name__} of the plugin's own") from error
                try:
                    assert_same(found)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {what}: other values came back, and no error") from error
            directory.write_bytes(name, data)

    def is_refused(self, damage: str) -> None:
        """Fails where a restore does not say what is wrong; `damage` says it in the failure."""
        try:
            self.restore()
        except Exception as error:
            if not _is_meant(error, errors.CheckpointError):
                raise AssertionError(f"{damage}: expected a CheckpointError of the plugin's own") from error
        else:
            raise AssertionError(f"{damage}: no error")

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


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Some ways in which a file can be wrong: a bit flipped here and there, the end missing."""
    yield from _flips(data, range(0, len(data), max(1, len(data) // 12)))
    for size in sorted({0, len(data) // 2, len(data) - 1} - {len(data), -1}):
        yield f"cut off at byte {size} of {len(data)}", data[:size]


def changes(data: bytes, start: int, count: int) -> Iterator[tuple[str, bytes]]:
    """About so many ways in which a file can differ from a byte on."""
    yield from _flips(data, range(start, len(data), max(1, (len(data) - start) // max(1, count))))
    yield f"cut off at byte {start} of {len(data)}", data[:start]
    yield "continued", data + b"\0"


def _flips(data: bytes, places: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    for at in places:
        yield f"bit flipped at byte {at} of {len(data)}", data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]


def losses(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A file without its bytes."""
    if data:
        yield f"all of its {len(data)} bytes lost", b""


def _handler(registry: Registry, backend: StorageBackend | None) -> PyTreeCheckpointHandler:
    if backend is None:
        return PyTreeCheckpointHandler()
    registry.add_storage(backend, override=True)
    return PyTreeCheckpointHandler(storage=backend.name)


def saved(
    tree: Any, registry: Registry, place: Location, backend: StorageBackend | None = None, save_args: Any = None
) -> Checkpoint:
    """A checkpoint of the tree in `place`."""
    location = registry.location(f"{place.url}/checkpoint")
    with ckptkit.Checkpointer(_handler(registry, backend), registry=registry) as checkpointer:
        checkpointer.save(location.url, args=PyTreeSave(tree, save_args))
    return Checkpoint(location, registry)


def cancelled(tree: Any, registry: Registry, place: Location, backend: StorageBackend | None = None) -> None:
    """Starts a save and gives it up at once; afterwards nothing in `place` changes any more.

    Raises:
      AssertionError: something does, or the save ended in an error that is not ours.
    """
    handler = _handler(registry, backend)
    handler.registry = registry
    futures = asyncio.run(handler.async_save(place.path, args=PyTreeSave(tree)))
    give_up(futures)
    stays_as_it_is(place)


def _is_meant(error: BaseException, kind: type[Exception]) -> bool:
    """Whether an error is of a kind; a `PluginError` stands for whatever else a plugin raised."""
    return isinstance(error, kind) and not isinstance(error, errors.PluginError)


def stays_as_it_is(place: Location) -> None:
    """Fails where something is still being written in the directory."""
    before = by_hand.snapshot(place)
    time.sleep(0.1)
    after = by_hand.snapshot(place)
    changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    assert not changed, f"still being written: {changed}"


def give_up(futures: Sequence[Future[Any]]) -> None:
    """Cancels what a handler started, and waits for its end."""
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            error = future.exception(by_hand.TIMEOUT_SECS)
            assert error is None or _is_meant(error, errors.CheckpointError), repr(error)


def fresh_process(code: str, *arguments: str) -> None:
    """Runs Python code in a process that has imported nothing yet.

    Raises:
      AssertionError: it failed; with what it printed.
    """
    done = subprocess.run(  # noqa: S603 - this interpreter, and code of our own
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=by_hand.TIMEOUT_SECS, check=False
    )
    assert done.returncode == 0, (
        f"a fresh process failed; if it finds no plugin, is that installed, with its entry point?\n{done.stderr}"
    )


def together(work: Callable[[int], T], count: int) -> list[T]:
    """What the work gives for 0, 1, ..., done in as many threads at once."""
    start = threading.Barrier(count)

    def begin(number: int) -> T:
        start.wait(by_hand.TIMEOUT_SECS)
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begin, range(count)))


@contextlib.contextmanager
def small_files(location: Location, max_byte_size: int) -> Iterator[None]:
    """No file of this process can grow beyond a size, as on a disk that is full."""
    if location.local_path is None or sys.platform == "win32":
        pytest.skip("only files can be kept from growing")
    import resource  # noqa: PLC0415 - Windows has none

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_byte_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_proportion(work: Callable[[Any], object], few: Any, many: Any) -> None:
    """Does work on few things and on ten times as many, and compares the processor time: four times ten is too much.

    Raises:
      AssertionError: with both times.
    """
    work(few)  # whatever is imported or compiled once
    short, long = statistics.median(_secs(work, few) for _ in range(3)), _secs(work, many)
    if long >= 40 * short:  # once more, since a full collection or a busy neighbour may have come between
        long = min(long, _secs(work, many))
    assert long < 40 * short, f"{len(few)} took {short:.3f} s of processor time, {len(many)} took {long:.3f} s"


def _secs(work: Callable[[Any], object], things: Any) -> float:
    start = time.process_time()
    work(things)
    return time.process_time() - start
