"""Futures that stand for several, or for what is done already."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

__all__ = ["done", "joined"]


def done() -> Future[None]:
    """A future that is done."""
    future: Future[None] = Future()
    future.set_result(None)
    return future


def joined(parts: Sequence[Future[None]]) -> Future[None]:
    """Done when all parts are, since until then they use the caller's memory; raises what the first of them raised."""
    if not parts:
        return done()
    whole: Future[None] = Future()
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
        whole.set_result(None) if error is None else whole.set_exception(error)

    for part in parts:
        part.add_done_callback(finish)
    return whole
