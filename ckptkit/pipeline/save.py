"""Saving by plan: stage in the caller's thread, within a budget; write in a thread of its own; then the documents."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple

import attrs

from ckptkit import errors, reports
from ckptkit._gc import paused_gc
from ckptkit.grid import Chunk
from ckptkit.index import Checksums
from ckptkit.leaves.base import TypeHandler
from ckptkit.location import Location
from ckptkit.pipeline import answers
from ckptkit.pipeline.plan import Batch, SavePlan
from ckptkit.processes import Job
from ckptkit.registry import Registry
from ckptkit.storage.base import Writer

__all__ = ["start_save"]


class _Staged(NamedTuple):
    """A batch on its way to storage: its type handler, its plan, and what was staged of it."""

    handler: TypeHandler[Any]
    batch: Batch
    arrays: Any


class _SaveFuture(Future[None]):
    """Done when the writing thread has ended; cancelling asks it to end early."""

    def __init__(self) -> None:
        super().__init__()
        self.cancel_requested = threading.Event()

    def cancel(self) -> bool:
        """Makes the writer stop before its next batch; the future ends with an error once nothing is written any more."""
        self.cancel_requested.set()
        return False


class _Budget:
    """Host memory in flight. `acquire` waits until a batch fits; one batch always does."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._open = True
        self._changed = threading.Condition()

    def fits(self, size: int) -> bool:
        return self._used == 0 or self._used + size <= self._limit

    def acquire(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self.fits(size))
            self._used += size

    def release(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more: the writer has ended."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


def start_save(
    plan: SavePlan,
    values: Sequence[Any],
    location: Location,
    documents: Callable[[Mapping[str, list[str]]], Iterable[tuple[str, bytes]]],
) -> Future[None]:
    """Stages every leaf, and writes in a thread; returns when the caller may change or donate its arrays.

    Staged copies are held to the plan's `max_inflight_bytes` (one cell may exceed it): past that, the call waits for the
    writer.

    Args:
      plan: how to save.
      values: the leaves of the tree, empty nodes included.
      location: an existing, empty directory.
      documents: called in the writing thread with the checksums per array; gives name and bytes of the small files to write last.

    Returns:
      a future that is done when every file is written.
    """
    result = _SaveFuture()
    batches: SimpleQueue[_Staged | None] = SimpleQueue()
    budget = _Budget(plan.max_inflight_bytes)
    tracker = reports.current_tracker("save")
    tracker.expect(sum([array.nbytes for array in plan.arrays]), sum([len(group.specs) for group in plan.groups]))
    data_directories = plan.backend.data_directories([array.name for array in plan.arrays])
    tracker.covered.update(f"{location.url}/{path}" for path in data_directories)
    # Not a daemon: the interpreter waits for it at exit, so that a save under way is finished.
    writer = threading.Thread(
        target=_write, args=(plan, location, batches, budget, documents, tracker, result), name="ckptkit-write", daemon=False
    )
    try:
        for handler, batch in [(group.handler, batch) for group in plan.groups for batch in group.batches]:
            if not budget.fits(batch.held) and not writer.ident:
                writer.start()
            budget.acquire(batch.held)
            if result.done():
                break
            with paused_gc(), answers.calling(plan.registry, handler, "stage"):
                staged = handler.stage([(values[i], spec, cell) for i, spec, cell in batch.pieces])
            batches.put(_Staged(handler, batch, staged))
    except BaseException:
        result.cancel()
        batches.put(None)
        if writer.ident:
            writer.join()  # the caller removes the directory, so nobody may write there any more
        raise
    batches.put(None)
    if not writer.ident:
        writer.start()
    return result


def _write(
    plan: SavePlan,
    location: Location,
    batches: SimpleQueue[_Staged | None],
    budget: _Budget,
    documents: Callable[[Mapping[str, list[str]]], Iterable[tuple[str, bytes]]],
    tracker: reports.Tracker,
    result: _SaveFuture,
) -> None:
    """The writing thread: what is staged goes to the backend, then the documents go to the location."""
    checksums = {array.name: Checksums(array) for array in plan.arrays}
    try:
        with answers.calling(plan.registry, plan.backend, "writer") as asked:
            writer = answers.instance(asked, plan.backend.writer(location, plan.arrays, plan.options, Job()), Writer)
        try:
            while (staged := batches.get()) is not None and not result.cancel_requested.is_set():
                handler, (pieces, held), arrays = staged
                chunks = answers.chunks(plan.registry, handler, pieces, arrays)
                _write_batch(plan.registry, writer, chunks, checksums, _Written(budget, held, tracker))
                del (
                    arrays,
                    chunks,
                    staged,
                )  # a view keeps jax from reusing a donated buffer; let it go as soon as its bytes are written
            if result.cancel_requested.is_set():
                raise errors.CheckpointError("the save was given up.")
            with answers.calling(plan.registry, writer, "commit"):
                writer.commit()
        except BaseException:
            writer.abort()
            raise
        for name, data in documents({name: sums.texts() for name, sums in checksums.items()}):
            location.write_bytes(name, data)
    except BaseException as error:  # noqa: BLE001 - it is raised again where the future's result is asked for
        result.set_exception(error)
    else:
        result.set_result(None)
    finally:
        budget.close()


def _write_batch(
    registry: Registry, writer: Writer, chunks: Sequence[Chunk], checksums: Mapping[str, Checksums], written: _Written
) -> None:
    written.byte_count = sum([chunk.data.nbytes for chunk in chunks])
    with answers.calling(registry, writer, "write") as asked:
        answers.instance(asked, writer.write(chunks), Future).add_done_callback(written)
    for chunk in chunks:
        checksums[chunk.array.name].add(chunk.index, chunk.data)


@attrs.define
class _Written:
    """Called when the data of a batch is no longer referenced."""

    budget: _Budget
    held: int
    tracker: reports.Tracker
    byte_count: int = 0

    def __call__(self, _: Future[None]) -> None:
        self.budget.release(self.held)
        self.tracker.advance(self.byte_count)
