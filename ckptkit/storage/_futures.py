"""Futures that stand for several, or for what is done already, and the futures of a writer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Pending", "called", "done", "joined"]

T = TypeVar("T")


def done() -> Future[None]:
    """A future that is done."""
    future: Future[None] = Future()
    future.set_result(None)
    return future


def called(function: Callable[..., T], *args: Any) -> Future[T]:
    """Calls it, and returns a future that is done, and gives or raises what it did."""
    future: Future[T] = Future()
    try:
        result = function(*args)
    except Exception as error:  # noqa: BLE001 - it is raised again where the future's result is asked for
        future.set_exception(error)
    else:
        future.set_result(result)
    return future


def joined(parts: Sequence[Future[Any]], result: Callable[[], Any] = lambda: None) -> Future[Any]:
    """Done when all parts are, since until then they use the caller's memory; raises what the first of them raised.

    Args:
      parts: what it stands for.
      result: gives its result once all of them have theirs.
    """
    if not parts:
        return called(result)
    whole: Future[Any] = Future()
    whole.set_running_or_notify_cancel()
    pending = len(parts)
    lock = threading.Lock()

    def finish(_: Future[None]) -> None:
        nonlocal pending
        with lock:
            pending -= 1
            if pending:
                return
        error = next((e for e in (part.exception() for part in parts) if e is not None), None)
        whole.set_result(result()) if error is None else whole.set_exception(error)

    for part in parts:
        part.add_done_callback(finish)
    return whole


class Pending:
    """What a writer has under way.

    It forgets what succeeded, and keeps what failed first, to be raised where the writer is used next. A call costs the same
    however much is under way.
    """

    def __init__(self) -> None:
        self._parts: set[Future[None]] = set()
        self._failed: Future[None] | None = None

    def add(self, parts: Sequence[Future[None]]) -> Future[None]:
        """Takes futures on; returns one that is done when they are, as `joined` makes it."""
        self._parts.update(parts)
        for part in parts:
            part.add_done_callback(self._end)
        return joined(parts)

    def raise_failed(self) -> None:
        """Raises what failed first, if anything has."""
        if self._failed is not None:
            self._failed.result()

    def wait(self) -> None:
        """Waits until everything is done; raises what failed first."""
        whole = joined(list(self._parts))
        whole.exception()
        self.raise_failed()
        whole.result()  # what failed just now is done before its callbacks have run, and so before anything is kept of it

    def _end(self, part: Future[None]) -> None:
        if self._failed is None and (part.cancelled() or part.exception() is not None):
            self._failed = part
        self._parts.discard(part)
