"""A save whose caller has been let go."""

from __future__ import annotations

import functools
import threading
import time
from concurrent import futures
from typing import Any

import attrs
from etils import epath

from ckptkit import commit, discovery, errors, reports
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.location import FileLocation
from ckptkit.metadata.step import STEP_FILE, StepMetadata, encode_step

__all__ = ["Beginning", "DeferredPath", "Saving", "checked_futures"]


class Beginning:
    """What a save writes into, begun when it is first needed, by whichever thread needs it.

    Attributes:
      pending: what was begun; None before.
    """

    def __init__(self, location: FileLocation, *, force: bool, mode: int | None) -> None:
        self.pending: commit.Pending | None = None
        self.path = location.local_path
        self.temporary = epath.Path(self.path + commit.TEMPORARY_SUFFIX)
        self._begin = functools.partial(commit.begin, location, force=force, mode=mode)
        self._lock = threading.Lock()

    def __call__(self) -> commit.Pending:
        """The save under way; the errors are those of `commit.begin`."""
        with self._lock:
            if self.pending is None:
                self.pending = self._begin()
            return self.pending


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


def checked_futures(handler: CheckpointHandler, returned: Any) -> list[futures.Future[Any]]:
    """What an `async_save` returned, as a list.

    Raises:
      errors.PluginError: something else than futures of `concurrent.futures`, which alone can be waited for and cancelled.
    """
    made = [] if returned is None else list(returned)
    if wrong := [future for future in made if not isinstance(future, futures.Future)]:
        raise errors.PluginError(
            f"{type(handler).__name__}.async_save returned {wrong[0]!r}; expected a list of concurrent.futures.Future, or None."
        )
    return made


class Saving:
    """A save whose caller has been let go: what is left is to wait for the writers, and to commit."""

    def __init__(
        self,
        begin: Beginning,
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
        self._handler = handler
        self._step = step
        self._tracker = tracker
        self._notifier = notifier
        self._start = start
        self._owned = owned

    def finish(self) -> None:
        """Waits for the writers, and commits; on any failure nothing is left behind."""
        try:
            for future in self.writing:
                future.result()
            pending = self._begin()  # where the handler wrote nothing, there is still a checkpoint
            temporary = pending.temporary
            self._handler.finalize(epath.Path(temporary.url))
            step = attrs.evolve(self._step, commit_timestamp_nsecs=time.time_ns())
            temporary.write_bytes(STEP_FILE, encode_step(step))
            pending.commit()
        except BaseException:
            self.abandon()
            raise
        self._close()
        self._tracker.finish()
        self._notifier.save_committed(
            reports.SaveReport(
                path=self.path,
                byte_count=self._tracker.byte_count,
                leaf_count=self._tracker.leaf_count,
                blocking_secs=self.blocking_secs,
                total_secs=time.monotonic() - self._start,
            )
        )

    def abandon(self) -> None:
        """Stops the writers, waits until nobody writes any more, and removes what was written."""
        for future in self.writing:
            future.cancel()
        try:
            futures.wait(self.writing)
        finally:
            if self._begin.pending is not None:
                self._begin.pending.abandon()
            self._close()
            self._tracker.finish()

    def _close(self) -> None:
        if self._owned:
            self._handler.close()
