"""What happened, as data: what observers and callers are told about saves and restores."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, Literal

import attrs

__all__ = [
    "CleanReport",
    "Part",
    "ProgressEvent",
    "RestoreReport",
    "SaveReport",
    "Tracker",
    "VerifyReport",
    "current_tracker",
    "tracking",
]

State = Literal["whole", "corrupt", "unchecked"]
Operation = Literal["save", "restore", "verify"]


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
      corrupt: key paths of the leaves that `on_corrupt='skip'` left out.
    """

    path: str
    byte_count: int
    leaf_count: int
    verified: bool
    total_secs: float
    corrupt: Sequence[tuple[str, ...]] = ()


@attrs.frozen(kw_only=True)
class Part:
    """One file or one leaf, as `ckptkit.verify` found it.

    Attributes:
      name: path of the file below the checkpoint; or path of the leaf's item, if any, and its key path.
      byte_count: its size; of a leaf in memory.
      state: 'whole', its checksums agree; 'corrupt', they do not, or it is missing or cannot be read; 'unchecked', it can be
        read, but nothing says what it should be.
      problem: what is wrong; '' where nothing is. What is 'unchecked' for a reason of its own has that here.
    """

    name: str
    byte_count: int
    state: State
    problem: str = ""


@attrs.frozen(kw_only=True)
class VerifyReport:
    """What is left of a checkpoint.

    Attributes:
      path: the checkpoint.
      files: every file, except those whose bytes are the leaves'.
      leaves: every leaf that is an array.
      listed: whether the checkpoint has a list of its files; Orbax's have none.
      total_secs: how long reading took.
    """

    path: str
    files: Sequence[Part]
    leaves: Sequence[Part]
    listed: bool
    total_secs: float

    @property
    def corrupt(self) -> list[Part]:
        """What is wrong."""
        return [part for part in (*self.files, *self.leaves) if part.state == "corrupt"]

    @property
    def state(self) -> State:
        """'unchecked' where nothing is wrong that can be told, and the checkpoint has no list of its files."""
        if self.corrupt:
            return "corrupt"
        return "whole" if self.listed else "unchecked"

    @property
    def byte_count(self) -> int:
        """Bytes read."""
        return sum(part.byte_count for part in (*self.files, *self.leaves))


@attrs.frozen(kw_only=True)
class CleanReport:
    """What `ckptkit.clean` did, or would do.

    Attributes:
      removed: directories that killed saves left.
      restored: checkpoints that an interrupted overwrite had set aside, now under their own names again.
      kept: temporary directories that were left alone, with the reason.
    """

    removed: list[str]
    restored: list[str]
    kept: dict[str, str]


@attrs.frozen(kw_only=True)
class ProgressEvent:
    """How far a save, a restore or a verification is; sent a few times a second at most, and once at its end.

    Attributes:
      operation: which of the three.
      path: the checkpoint.
      done_byte_count: bytes of leaves written or read so far.
      total_byte_count: bytes of leaves in all.
      finished: True in the last event, also where the operation failed.
    """

    operation: Operation
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
      covered: URLs of directories of which a restore uses nothing but what an index has checksums of.
      heads: URLs of files of which that holds from a byte on, with the number of bytes before it.
      corrupt: key paths of leaves that were left out because their bytes are damaged.
      let_go: set once nobody waits any more for the call that began the operation.
      writers: what is done once the threads of a save have ended, known before they start: Ctrl-C may come before it is returned.
    """

    _INTERVAL_SECS = 0.25

    def __init__(self, operation: Operation, path: str, notify: Callable[[ProgressEvent], None]) -> None:
        self.byte_count = 0
        self.leaf_count = 0
        self.verified = True
        self.covered: set[str] = set()
        self.heads: dict[str, int] = {}
        self.corrupt: list[tuple[str, ...]] = []
        self.let_go = threading.Event()
        self.writers: list[Future[Any]] = []
        self._operation: Operation = operation
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


def current_tracker(operation: Operation) -> Tracker:
    """The tracker of the operation that this call is part of; one that tells nobody where there is none.

    It travels in a context variable, so that handlers, which know no pipeline, need not pass it on.
    """
    if (tracker := _current.get()) is None:
        tracker = Tracker(operation, "", lambda event: None)
        tracker.let_go.set()
    return tracker


@contextlib.contextmanager
def tracking(tracker: Tracker) -> Iterator[None]:
    """Makes `tracker` the current one."""
    token = _current.set(tracker)
    try:
        yield
    finally:
        _current.reset(token)
