"""What a process owes its saves when it ends or forks: to finish them, to tell of errors that nobody saw, and to share nothing.

At exit the interpreter waits for threads that are no daemons; a save in a daemon thread, one that an exit handler started, and
one whose waiting was cut short by Ctrl-C are waited for here. No exit handler can set the status of the process, and one that
ends it keeps the handlers registered earlier from running. So the status is set when the interpreter takes its modules apart,
after all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import attrs

from ckptkit import errors

__all__ = ["UnderWay", "enter", "exiting", "refuse_fork", "unseen"]

_EXIT_SECS: Final = 1200.0
_LAST: Final = -1000  # among multiprocessing's finalizers: after those that flush queues


@attrs.define(eq=False)
class UnderWay:
    """A save to `path`; from `begin` to `end` the exit of this process waits for it, as long as the thread of it lives.

    A thread that Ctrl-C led out of a save may not have come to `end`.
    """

    path: str
    _thread: threading.Thread = attrs.field(factory=threading.current_thread, init=False)
    _ended: threading.Event = attrs.field(factory=threading.Event, init=False)

    def begin(self) -> None:
        """The save is that of this thread."""
        _under_way.add(self)
        _finish_in_child_process()

    def hand_over(self, thread: threading.Thread) -> None:
        """The save is that of `thread` now, which has started."""
        self._thread = thread

    def end(self) -> None:
        """Nobody writes any more."""
        _under_way.discard(self)
        self._ended.set()

    def goes_on(self) -> bool:
        """Whether another thread may still be at it; not asked by `is_alive`, for the reason that `Waitable` tells."""
        others = self._thread is not threading.current_thread() and self._thread in threading.enumerate()
        return others and not self._ended.is_set()

    def wait(self, timeout_secs: float) -> None:
        deadline = time.monotonic() + timeout_secs
        while self.goes_on() and time.monotonic() < deadline:
            self._ended.wait(0.1)


unseen: dict[Any, BaseException] = {}
"""What went wrong in the background, by checkpointer, until it is raised somewhere; keeps those alive whom nobody else keeps."""

_under_way: set[UnderWay] = set()
_used = False
_forked = False
_status: _ExitStatus | None = None
_finalized_pid = 0


def enter() -> None:
    """Marks this process as one that uses storage; a fork of it cannot.

    Raises:
      errors.ForkedError: this process is such a fork.
    """
    global _used  # noqa: PLW0603 - a fact about the process
    refuse_fork()
    _used = True


def refuse_fork() -> None:
    """Raises `errors.ForkedError` in a process that was forked from one that had used ckptkit."""
    if _forked:
        raise errors.ForkedError(
            "this process was forked from one that had used ckptkit, whose threads and locks do not exist here. Fork before the "
            "first save or restore, or start processes with multiprocessing.get_context('spawn') or 'forkserver'."
        )


def exiting() -> bool:
    """Whether the program has ended, so that no thread started now would be waited for, if it started at all."""
    return not threading.main_thread().is_alive()


@atexit.register
def _at_exit() -> None:
    global _status  # noqa: PLW0603 - deleted with this module, which is the point
    if _finalized_pid != os.getpid() and not _all_finished_and_seen():
        _status = _ExitStatus()


def _finish_in_child_process() -> None:
    """A process that multiprocessing forked runs no exit handlers, but finalizers: the status is what the last one raises."""
    global _finalized_pid  # noqa: PLW0603 - a fact about the process
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None or _finalized_pid == os.getpid():
        return
    from multiprocessing import util  # noqa: PLC0415 - only where multiprocessing is in use

    _finalized_pid = os.getpid()
    util.Finalize(None, _at_child_exit, exitpriority=_LAST)


def _at_child_exit() -> None:
    if _all_finished_and_seen():
        return
    if sys.version_info >= (3, 13):  # finalizers are called by an exit handler there, whose SystemExit is ignored
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    raise SystemExit(1)


def _all_finished_and_seen() -> bool:
    """Waits for saves under way; False, with the reasons on stderr, where one was not finished or failed unseen."""
    with contextlib.suppress(BaseException):  # Ctrl-C, or what a handler of a signal raises: the user waits no longer
        for save in list(_under_way):
            save.wait(_EXIT_SECS)
    left = [save for save in _under_way if save.goes_on()]
    for save in left:
        sys.stderr.write(f"ckptkit: the program ended before the save to {save.path} did; what was there is still there.\n")
    for error in unseen.values():
        sys.stderr.write("ckptkit: a save in the background failed, and the program ended without asking for it:\n")
        traceback.print_exception(error)
    fine = not left and not unseen
    unseen.clear()
    return fine


class _ExitStatus:
    """Ends the process with status 1 once nothing refers to it; the interpreter has flushed its streams by then."""

    def __init__(self) -> None:
        self._exit: Callable[[int], Any] = os._exit

    def __del__(self) -> None:
        self._exit(1)


def _forget_parent() -> None:
    global _forked  # noqa: PLW0603 - a fact about the process
    _forked = _used
    _under_way.clear()
    unseen.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_forget_parent)
