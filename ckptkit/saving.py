"""A save whose caller has been let go."""

from __future__ import annotations

import time
from concurrent import futures
from typing import Any

import attrs
from etils import epath

from ckptkit import commit, discovery, reports
from ckptkit.file_list import write_file_list
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.metadata.step import STEP_FILE, StepMetadata, encode_step

__all__ = ["Saving"]


class Saving:
    """A save whose caller has been let go: what is left is to wait for the writers, and to commit."""

    def __init__(
        self,
        pending: commit.Pending,
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

    def finish(self) -> None:
        """Waits for the writers, and commits; on any failure nothing is left behind."""
        try:
            for future in self.writing:
                future.result()
            temporary = self._pending.temporary
            self._handler.finalize(epath.Path(temporary.url))
            step = attrs.evolve(self._step, commit_timestamp_nsecs=time.time_ns())
            described = encode_step(step)
            # The list before `_CHECKPOINT_METADATA`, which Orbax writes first: `commit.clean` tells the two's leftovers apart.
            write_file_list(temporary, self._tracker.covered, {STEP_FILE: described}, self._step.providers)
            temporary.write_bytes(STEP_FILE, described)
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
        """Stops the writers, waits until nobody writes any more, and removes what was written."""
        for future in self.writing:
            future.cancel()
        try:
            futures.wait(self.writing)
        finally:
            self._pending.abandon()
            self._close()
            self._tracker.finish()

    def _close(self) -> None:
        if self._owned:
            self._handler.close()
