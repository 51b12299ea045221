"""A save whose caller has been let go."""

from __future__ import annotations

import functools
import threading
import time
from concurrent import futures
from typing import Any, Final

import attrs
from etils import epath

from ckptkit import _lifetime, choosing, commit, discovery, errors, joint, reports
from ckptkit.file_list import write_file_list
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.location import Location
from ckptkit.meeting import COMMITTED, Meeting
from ckptkit.metadata.step import STEP_FILE, StepMetadata, encode_step
from ckptkit.registry import Registry

__all__ = ["Beginning", "DeferredPath", "Saving"]


class Beginning:
    """What a save writes into, begun when it is first needed, by whichever thread needs it."""

    def __init__(
        self, meeting: Meeting, registry: Registry, location: Location, *, force: bool, mode: int | None, facts: dict[str, Any]
    ) -> None:
        """As `joint.begin`, which is called when it is time."""
        self.path = location.url
        self._meeting = meeting
        self._location = location
        self._force = force
        self._begin = functools.partial(joint.begin, meeting, registry, location, force=force, mode=mode, facts=facts)
        self._lock = threading.Lock()
        self._pending: commit.AnyPending | joint.Following | None = None
        self._abandoned = False

    def __call__(self) -> commit.AnyPending | joint.Following:
        """The save under way; the errors are those of `joint.begin`, and `errors.CheckpointError` where it was given up."""
        with self._lock:
            if self._abandoned:
                raise errors.CheckpointError(f"the save to {self.path} was given up.")
            if self._pending is None:
                self._pending = self._begin()
            return self._pending

    def check(self) -> None:
        """With `force`, refuses to replace what is no checkpoint; the errors are those of `choosing.check_replaceable`."""
        if self._force and self._meeting.job.is_primary:
            choosing.check_replaceable(self._location)

    def later(self) -> DeferredPath:
        """The temporary directory of a save to a local one, not made yet; the errors are those of `commit.check_free`."""
        commit.check_free(self.path, force=self._force)
        return DeferredPath(epath.Path(self.path + commit.TEMPORARY_SUFFIX), self)

    def abandon(self, error: BaseException) -> None:
        """Removes what was written, if anything was begun, once no other process writes; nothing can be begun any more."""
        self._meeting.fail(error)
        with self._lock:
            self._abandoned = True
        if self._pending is not None:
            self._meeting.await_ends(error)
            self._pending.abandon()


class DeferredPath:
    """A `PathAwaitingCreation` in the temporary directory of a save.

    A handler that knows only of paths can use it as one: that makes the directory.
    """

    def __init__(self, path: epath.Path, begin: Beginning) -> None:
        self._path = path
        self._begin = begin

    @property
    def path(self) -> epath.Path:
        return self._path

    def __truediv__(self, name: str) -> DeferredPath:
        return DeferredPath(self._path / name, self._begin)

    async def await_creation(self) -> epath.Path:
        self._begin()
        return self._path

    def __fspath__(self) -> str:
        self._begin()
        return str(self._path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._begin()
        return getattr(self._path, name)


_STOP_SECS: Final = 60.0
"""How long writers may take to stop once they are told to."""

_stuck: list[Beginning] = []
"""Kept, since a lock lasts as long as somebody refers to it."""


class Saving:
    """A save whose caller has been let go: what is left is to wait for the writers, and to commit."""

    def __init__(
        self,
        begin: Beginning,
        meeting: Meeting,
        handler: CheckpointHandler,
        step: StepMetadata,
        tracker: reports.Tracker,
        notifier: discovery.Notifier,
        start: float,
        *,
        owned: bool,
    ) -> None:
        self.writing: list[futures.Future[Any]] = []
        self.blocking_secs = 0.0
        self.path = begin.path
        self._begin = begin
        self._meeting = meeting
        self._handler = handler
        self._step = step
        self._tracker = tracker
        self._notifier = notifier
        self._start = start
        self._owned = owned
        self._taken = threading.Lock()
        self._under_way = _lifetime.UnderWay(begin.path)

    def begin(self) -> None:
        """From now on the exit of this process waits for this save, until `finish` or `abandon` has ended."""
        self._under_way.begin()

    def hand_over(self, thread: threading.Thread) -> None:
        """It is for `thread` to end this save now, which has started."""
        self._under_way.hand_over(thread)

    def let_go(self) -> None:
        """The caller's call is about to return: writers, which hold back until then, may take the interpreter."""
        self._tracker.let_go.set()

    def take(self) -> bool:
        """Whether the caller is the one to end this save, with `finish` or `abandon`: the first to ask is."""
        return self._taken.acquire(blocking=False)

    def finish(self) -> None:
        """Waits for the writers of every process, and commits; on any failure nothing is left behind."""
        try:
            self._meeting.wait(self.writing)
            self._begin()  # where the handler wrote nothing, there is still a checkpoint
            if self._meeting.gather("written") is None:
                self._meeting.hear(COMMITTED)
            else:
                self._commit()
        except BaseException as error:
            self.abandon(error)
            raise
        try:
            if self._meeting.job.is_primary:
                self._meeting.tell(COMMITTED)
        finally:
            self._close()
            self._tracker.finish()
        if self._meeting.job.is_primary:
            self._report()

    def _commit(self) -> None:
        pending = self._begin()
        temporary = pending.temporary
        joint.end(self._meeting, temporary)
        self._handler.finalize(temporary.path)
        step = attrs.evolve(self._step, commit_timestamp_nsecs=time.time_ns())
        described = encode_step(step)
        # The list before `_CHECKPOINT_METADATA`, which Orbax writes first: `commit.clean` tells the two's leftovers apart.
        try:
            write_file_list(temporary, self._tracker.covered, self._tracker.heads, {STEP_FILE: described}, self._step.providers)
        except errors.NotFoundError as error:
            if (overtaken := pending.overtaken()) is not None:
                raise overtaken from error
            raise
        temporary.write_bytes(STEP_FILE, described)
        self._begin.check()  # again, since somebody may have put files there while this save was writing
        pending.commit()

    def _report(self) -> None:
        self._notifier.save_committed(
            reports.SaveReport(
                path=self.path,
                byte_count=self._tracker.byte_count,
                leaf_count=self._tracker.leaf_count,
                blocking_secs=self.blocking_secs,
                total_secs=time.monotonic() - self._start,
            )
        )

    def abandon(self, error: BaseException) -> None:
        """Stops the writers, also those of other processes, waits until nobody writes any more, and removes what was written.

        Where a writer does not stop, the directory stays, and locked: nobody else may write there while it might.
        """
        self._meeting.fail(error)
        writing = [*self.writing, *self._tracker.writers]
        for future in writing:
            future.cancel()
        self.let_go()
        try:
            if futures.wait(writing, _STOP_SECS).not_done:
                _stuck.append(self._begin)
            else:
                self._begin.abandon(error)
        finally:
            self._close()
            self._tracker.finish()

    def _close(self) -> None:
        self._meeting.end()
        self._under_way.end()
        if self._owned:
            self._handler.close()
