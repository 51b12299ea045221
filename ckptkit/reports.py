"""What happened, as data: what observers and callers are told about saves and restores."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Literal

import attrs

__all__ = ["ProgressEvent", "RestoreReport", "SaveReport", "Tracker", "current_tracker", "tracking"]


@attrs.frozen(kw_only=True)
class SaveReport:
    """One committed save; of several processes, the primary tells of it.

    Attributes:
      path: the checkpoint.
      byte_count: bytes of leaves that this process wrote, before any compression.
      leaf_count: leaves written.
      blocking_secs: how long the caller was held.
      total_secs: from the call to the commit.
    """

    path: str
    byte_count: int
    leaf_count: int
    blocking_secs: float
    total_secs: float


@attrs.frozen(kw_only=True)
class RestoreReport:
    """One finished restore.

    Attributes:
      path: the checkpoint.
      byte_count: bytes read from storage for leaves.
      leaf_count: leaves restored.
      verified: whether every byte read was checked against a stored checksum.
      total_secs: duration of the call.
    """

    path: str
    byte_count: int
    leaf_count: int
    verified: bool
    total_secs: float


@attrs.frozen(kw_only=True)
class ProgressEvent:
    """How far a save or a restore is; sent a few times a second at most, and once at its end.

    Attributes:
      operation: which of the two.
      path: the checkpoint.
      done_byte_count: bytes of leaves written or read so far.
      total_byte_count: bytes of leaves in all.
      finished: True in the last event, also where the operation failed.
    """

    operation: Literal["save", "restore"]
    path: str
    done_byte_count: int
    total_byte_count: int
    finished: bool = False


class Tracker:
    """Counts what one operation moves, and tells how far it is; used from several threads.

    Attributes:
      byte_count: bytes of leaves that the operation will move in all.
      leaf_count: leaves that it will move in all.
      verified: False once something was read that has no checksum.
    """

    _INTERVAL_SECS = 0.25

    def __init__(self, operation: Literal["save", "restore"], path: str, notify: Callable[[ProgressEvent], None]) -> None:
        self.byte_count = 0
        self.leaf_count = 0
        self.verified = True
        self._operation: Literal["save", "restore"] = operation
        self._path = path
        self._notify = notify
        self._done = 0
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def expect(self, byte_count: int, leaf_count: int) -> None:
        """More work is known."""
        with self._lock:
            self.byte_count += byte_count
            self.leaf_count += leaf_count

    def advance(self, byte_count: int) -> None:
        """Some of it is done."""
        with self._lock:
            self._done += byte_count
            now = time.monotonic()
            if now - self._last < self._INTERVAL_SECS:
                return
            self._last = now
        self._notify(self._event(finished=False))

    def finish(self) -> None:
        """The last event."""
        self._notify(self._event(finished=True))

    def _event(self, *, finished: bool) -> ProgressEvent:
        return ProgressEvent(
            operation=self._operation,
            path=self._path,
            done_byte_count=self._done,
            total_byte_count=self.byte_count,
            finished=finished,
        )


_current: ContextVar[Tracker | None] = ContextVar("ckptkit_tracker", default=None)


def current_tracker(operation: Literal["save", "restore"]) -> Tracker:
    """The tracker of the operation that this call is part of; one that tells nobody where there is none.

    It travels in a context variable, so that handlers, which know no pipeline, need not pass it on.
    """
    return _current.get() or Tracker(operation, "", lambda event: None)


@contextlib.contextmanager
def tracking(tracker: Tracker) -> Iterator[None]:
    """Makes `tracker` the current one."""
    token = _current.set(tracker)
    try:
        yield
    finally:
        _current.reset(token)
