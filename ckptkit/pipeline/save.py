"""Saving by plan: stage in the caller's thread, within a budget; write in a thread of its own; then the documents."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

import attrs

from ckptkit import errors, reports
from ckptkit._gc import paused_gc, resumed_gc
from ckptkit._threads import Waitable
from ckptkit.grid import index_nbytes
from ckptkit.index import Checksums
from ckptkit.leaves.base import TypeHandler
from ckptkit.location import Location
from ckptkit.meeting import Meeting, current_meeting
from ckptkit.pipeline import answers, together
from ckptkit.pipeline.plan import Batch, SavePlan
from ckptkit.storage.base import Writer

__all__ = ["start_save"]


_HOLD_BACK_SECS: Final = 0.02
"""How long the writer holds back at most until the call has returned: two threads would take turns of 5 ms at the interpreter."""


class _Staged(NamedTuple):
    """A batch on its way to storage: its type handler, its plan, and what was staged of it."""

    handler: TypeHandler[Any]
    batch: Batch
    arrays: Any


class _SaveFuture(Future[None]):
    """Done when the writing thread has ended; cancelling asks it to end early."""

    def __init__(self, let_go: threading.Event) -> None:
        """Takes the event of the tracker, and not the tracker, which refers to this."""
        super().__init__()
        self.cancel_requested = threading.Event()
        self._let_go = let_go

    def result(self, timeout: float | None = None) -> None:
        """As in the base class; who waits has let the caller go."""
        self._let_go.set()
        return super().result(timeout)

    def end(self, error: BaseException | None) -> None:
        """Nothing is written any more; no harm where that was said before."""
        with contextlib.suppress(InvalidStateError):
            if error is None:
                self.set_result(None)
            else:
                self.set_exception(error)

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
            if self._open and not self.fits(size):
                with resumed_gc():
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


@paused_gc()
def start_save(
    plan: SavePlan,
    values: Sequence[Any],
    place: Callable[[], Location],
    documents: Callable[[Mapping[str, list[str]]], Iterable[tuple[str, bytes]]],
) -> Future[None]:
    """Stages every leaf, and writes in a thread; returns when the caller may change or donate its arrays.

    Staged copies are held to the plan's `max_inflight_bytes` (one cell may exceed it): past that, the call waits for the
    writer.

    Args:
      plan: how to save.
      values: the leaves of the tree, empty nodes included.
      place: called in the writing thread; gives an existing, empty directory.
      documents: called in the writing thread with the checksums per array; gives name and bytes of the small files to write last.

    Returns:
      a future that is done when every file is written.
    """
    tracker = reports.current_tracker("save")
    result = _SaveFuture(tracker.let_go)
    batches: SimpleQueue[_Staged | None] = SimpleQueue()
    budget = _Budget(plan.max_inflight_bytes)
    tracker.expect(_byte_count(plan, current_meeting()), sum([len(group.positions) for group in plan.groups]))
    # Not a daemon: the interpreter waits for it at exit, so that a save under way is finished.
    writer = Waitable(_write, (plan, place, batches, budget, documents, tracker, current_meeting(), result), name="ckptkit-write")
    try:
        tracker.writers.append(result)  # here, so that it ends whatever happens
        for handler, batch in [(group.handler, batch) for group in plan.groups for batch in group.batches]:
            if not budget.fits(batch.held) and not writer.ident:
                tracker.let_go.set()  # the call needs the writer, whatever that takes from it
                with contextlib.suppress(RuntimeError):
                    writer.start()
                if not writer.ident:
                    budget.close()  # nobody would release any of it
            budget.acquire(batch.held)
            if result.done():
                break
            with answers.calling(plan.registry, handler, "stage"):
                staged = handler.stage([(values[i], spec, cell) for i, spec, cell in batch.pieces])
            batches.put(_Staged(handler, batch, staged))
        batches.put(None)
        if not writer.ident:
            with contextlib.suppress(RuntimeError):  # Python 3.12 starts none once the main thread has ended
                writer.start()
    except BaseException:
        result.cancel()
        batches.put(None)
        tracker.let_go.set()
        if writer.ident:
            writer.wait()  # the caller removes the directory, so nobody may write there any more
        else:
            result.end(_given_up())  # not the error itself, whose traceback would keep alive all that led here, locks too
        raise
    if not writer.ident:
        tracker.let_go.set()
        with resumed_gc():
            writer.run()  # then the caller writes, once everything is staged, whatever memory that took
    return result


def _byte_count(plan: SavePlan, meeting: Meeting) -> int:
    """Bytes of leaves that this process writes."""
    if not meeting.job.others:
        sizes = [[spec.array.nbytes if spec.array else 0 for spec in group.specs] for group in plan.groups]
        return sum([each[number] for group, each in zip(plan.groups, sizes, strict=True) for number in group.numbers])
    pieces = [piece for group in plan.groups for batch in group.batches for piece in batch.pieces]
    return sum([index_nbytes(spec.array, cell) for _, spec, cell in pieces if spec.array is not None])


def _write(
    plan: SavePlan,
    place: Callable[[], Location],
    batches: SimpleQueue[_Staged | None],
    budget: _Budget,
    documents: Callable[[Mapping[str, list[str]]], Iterable[tuple[str, bytes]]],
    tracker: reports.Tracker,
    meeting: Meeting,
    result: _SaveFuture,
) -> None:
    """The writing thread: what is staged goes to the backend, then the documents go to the location."""
    tracker.let_go.wait(_HOLD_BACK_SECS)
    try:
        with paused_gc():
            arrays = list(plan.arrays.values())
            checksums = Checksums(arrays)
        _check_wanted(result)  # an interrupted caller that saw no thread yet has not waited for this one
        location = place()
        together.compare(meeting, plan, location)
        with answers.calling(plan.registry, plan.backend, "data_directories") as asked:
            covered = answers.directories(asked, plan.backend.data_directories([array.name for array in arrays]))
        tracker.covered.update(f"{location.url}/{path}" for path in covered)
        with paused_gc(), answers.calling(plan.registry, plan.backend, "writer") as asked:
            writer = answers.instance(asked, plan.backend.writer(location, arrays, plan.options, meeting.job), Writer)
        try:
            while (staged := batches.get()) is not None and not result.cancel_requested.is_set():
                _write_batch(plan, writer, staged, checksums, _Written(budget, staged.batch.held, tracker))
                del staged  # a view keeps jax from reusing a donated buffer; let it go as soon as its bytes are written
            _check_wanted(result)
            with answers.calling(plan.registry, writer, "commit"):
                writer.commit()
            with answers.calling(plan.registry, writer, "data_files") as asked:
                heads = answers.heads(asked, writer.data_files())
            tracker.heads.update({f"{location.url}/{path}": nbytes for path, nbytes in heads.items()})
        except BaseException:
            writer.abort()
            raise
        whole = together.joined(meeting, plan, location, checksums, tracker)
        for name, data in documents(whole) if whole is not None else ():
            location.write_bytes(name, data)
    except BaseException as error:  # noqa: BLE001 - it is raised again where the future's result is asked for
        meeting.fail(error)
        result.end(error)
    else:
        result.end(None)
    finally:
        budget.close()


def _check_wanted(result: _SaveFuture) -> None:
    if result.cancel_requested.is_set():
        raise _given_up()


def _given_up() -> errors.CheckpointError:
    return errors.CheckpointError("the save was given up.")


@paused_gc()
def _write_batch(plan: SavePlan, writer: Writer, staged: _Staged, checksums: Checksums, written: _Written) -> None:
    cells = [(plan.arrays[i], cell) for i, _, cell in staged.batch.pieces]
    chunks = answers.chunks(plan.registry, staged.handler, cells, staged.arrays)
    written.byte_count = sum([chunk.data.nbytes for chunk in chunks])
    with answers.calling(plan.registry, writer, "write") as asked:
        answers.instance(asked, writer.write(chunks), Future).add_done_callback(written)
    checksums.add(chunks)


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
