"""A save whose caller has been let go."""

from __future__ import annotations

import time
from concurrent import futures
from typing import Any

import attrs
from etils import epath

from ckptkit import commit, discovery, errors, joint, reports
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.meeting import Meeting
from ckptkit.metadata.step import STEP_FILE, StepMetadata, encode_step

__all__ = ["Saving", "checked_futures"]


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
        pending: commit.Pending | joint.Following,
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
        self.path = pending.path
        self._pending = pending
        self._meeting = meeting
        self._handler = handler
        self._step = step
        self._tracker = tracker
        self._notifier = notifier
        self._start = start
        self._owned = owned

    def finish(self) -> None:
        """Waits for the writers of every process, and commits; on any failure nothing is left behind."""
        try:
            self._meeting.wait(self.writing)
            if self._meeting.gather("written") is None:
                self._meeting.hear("committed")
            else:
                self._commit()
        except BaseException as error:
            self.abandon(error)
            raise
        try:
            if self._meeting.job.is_primary:
                self._meeting.tell("committed")
        finally:
            self._close()
            self._tracker.finish()
        if self._meeting.job.is_primary:
            self._report()

    def _commit(self) -> None:
        temporary = self._pending.temporary
        joint.end(self._pending)
        self._handler.finalize(epath.Path(temporary.url))
        step = attrs.evolve(self._step, commit_timestamp_nsecs=time.time_ns())
        temporary.write_bytes(STEP_FILE, encode_step(step))
        self._pending.commit()

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
        """Stops the writers, also those of other processes, waits until nobody writes any more, and removes what was written."""
        self._meeting.fail(error)
        for future in self.writing:
            future.cancel()
        try:
            futures.wait(self.writing)
            self._meeting.await_ends(error)
        finally:
            self._pending.abandon()
            self._close()
            self._tracker.finish()

    def _close(self) -> None:
        self._meeting.end()
        if self._owned:
            self._handler.close()
