"""The garbage collector, out of the way while many small objects are made."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_LONG_SECS: Final = 0.5


class _Thread(threading.local):
    """What a thread did: whether it is what keeps collections away, rather than another one, or the program."""

    pauses = False


_thread = _Thread()


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
        if gc.isenabled() if self.pauses else _thread.pauses:
            self._switched = True
            self._switch(pauses=self.pauses)

    def __exit__(self, *_: object) -> None:
        if self._switched:
            self._switch(pauses=not self.pauses)

    @staticmethod
    def _switch(*, pauses: bool) -> None:
        _thread.pauses = pauses
        if pauses:
            gc.disable()
        else:
            gc.enable()


class paused_gc(_Switched):  # noqa: N801 - used as a function is
    """No collection inside.

    Objects made for 10,000 leaves set off several full collections, each of which walks all that jax keeps (30-50 ms); none of
    them is part of a cycle.
    """

    pauses = True


class resumed_gc(_Switched):  # noqa: N801 - as above
    """Collections inside, where `paused_gc` keeps them away around it: for what waits, or takes long for other reasons."""

    pauses = False


def wait(future: Future[Any]) -> None:
    """Waits until a future is done; with collections where that takes long."""
    if not futures.wait([future], _LONG_SECS).done:
        with resumed_gc():
            futures.wait([future])
