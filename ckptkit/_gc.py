"""The garbage collector, out of the way while many small objects are made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No collection inside.

    Objects made for 10,000 leaves set off several full collections, each of which walks all that jax keeps (30-50 ms); none of
    them is part of a cycle.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
