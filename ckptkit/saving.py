"""A save whose caller has been let go."""

from __future__ import annotations

import threading
import time
from concurrent import futures
from typing import Any, Final

import attrs

from ckptkit import _lifetime, commit, discovery, errors, reports
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.metadata.step import STEP_FILE, StepMetadata, encode_step

__all__ = ["Saving", "checked_futures"]

_STOP_SECS: Final = 60.0
"""How long writers may take to stop once they are told to."""

_stuck: list[commit.AnyPending] = []
"""Kept, since a lock lasts as long as somebody refers to it."""


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
        pending: commit.AnyPending,
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
        self.path = pending.path
        self._pending = pending
        self._handler = handler
        self._step = step
        self._tracker = tracker
        self._notifier = notifier
        self._start = start
        self._owned = owned
        self._taken = threading.Lock()
        self._under_way = _lifetime.saving(pending.path)

    def take(self) -> bool:
        """Whether the caller is the one to end this save, with `finish` or `abandon`: the first to ask is."""
        return self._taken.acquire(blocking=False)

    def finish(self) -> None:
        """Waits for the writers, and commits; on any failure nothing is left behind."""
        try:
            for future in self.writing:
                future.result()
            temporary = self._pending.temporary
            self._handler.finalize(temporary.path)
            step = attrs.evolve(self._step, commit_timestamp_nsecs=time.time_ns())
            temporary.write_bytes(STEP_FILE, encode_step(step))
            self._pending.commit()
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
        """Stops the writers, waits until nobody writes any more, and removes what was written.

        Where a writer does not stop, the directory stays, and locked: nobody else may write there while it might.
        """
        for future in self.writing:
            future.cancel()
        try:
            if futures.wait(self.writing, _STOP_SECS).not_done:
                _stuck.append(self._pending)
            else:
                self._pending.abandon()
        finally:
            self._close()
            self._tracker.finish()

    def _close(self) -> None:
        self._under_way.end()
        if self._owned:
            self._handler.close()
