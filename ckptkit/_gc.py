"""The garbage collector, out of the way while many small objects are made."""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_LONG_SECS: Final = 0.5

_pauses: ContextVar[bool] = ContextVar("ckptkit_pauses_gc", default=False)
"""Whether it is this call that keeps collections away, rather than another thread, or the program."""

_paused_by: int | None = None
"""The thread that does: it may be missing in a fork, and Ctrl-C may have kept it from ending that."""


class _Switched:
    """Switches collections when it is entered, and back when it is left.

    No generator, which makes an object as it ends: collections that were held back would begin there, and not in whoever
    makes the next one.
    """

    pauses: bool

    def __init__(self) -> None:
        self._switched = False

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """As a decorator: for the time of every call."""

        @functools.wraps(function)
        def switched(*args: P.args, **kwargs: P.kwargs) -> R:
            with type(self)():
                return function(*args, **kwargs)

        return switched

    def __enter__(self) -> None:
        if gc.isenabled() if self.pauses else _pauses.get():
            self._switched = True
            _switch(pauses=self.pauses)

    def __exit__(self, *_: object) -> None:
        if self._switched:
            _switch(pauses=not self.pauses)


class paused_gc(_Switched):  # noqa: N801 - used as a function is
    """No collection inside.

    Objects made for 10,000 leaves set off several full collections, each of which walks all that jax keeps (30-50 ms); none of
    them is part of a cycle.
    """

    pauses = True


class resumed_gc(_Switched):  # noqa: N801 - as above
    """Collections inside, where `paused_gc` keeps them away around it: for what waits, or takes long for other reasons."""

    pauses = False


def _switch(*, pauses: bool) -> None:
    global _paused_by  # noqa: PLW0603 - a fact about the process, as collections are
    _pauses.set(pauses)
    if pauses:
        _paused_by = threading.get_ident()  # first, and last where they come back: Ctrl-C may come between
        gc.disable()
    else:
        gc.enable()
        _paused_by = None


def end_left_over() -> None:
    """Switches collections on that a call kept away which Ctrl-C ended in the midst of switching."""
    if _paused_by == threading.get_ident():
        _switch(pauses=False)


def _end_in_child() -> None:
    """Collections that a thread keeps away which the fork does not have would stay away for ever."""
    if _paused_by not in (None, threading.get_ident()):
        _switch(pauses=False)


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_end_in_child)


def wait(future: Future[Any]) -> None:
    """Waits until a future is done; with collections where that takes long."""
    if not futures.wait([future], _LONG_SECS).done:
        with resumed_gc():
            futures.wait([future])
