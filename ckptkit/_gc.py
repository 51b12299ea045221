"""The garbage collector, out of the way while many small objects are made."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator


class _Thread(threading.local):
    """What a thread did: whether it is what keeps collections away, rather than another one, or the program."""

    pauses = False


_thread = _Thread()


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No collection inside.

    Objects made for 10,000 leaves set off several full collections, each of which walks all that jax keeps (30-50 ms); none of
    them is part of a cycle.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    _thread.pauses = True
    try:
        yield
    finally:
        _thread.pauses = False
        gc.enable()


@contextlib.contextmanager
def resumed_gc() -> Iterator[None]:
    """Collections inside, where `paused_gc` keeps them away around it: for what waits, or takes long for other reasons."""
    if not _thread.pauses:
        yield
        return
    _thread.pauses = False
    gc.enable()
    try:
        yield
    finally:
        gc.disable()
        _thread.pauses = True
