"""A small memory of what was made last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Hashed:
    """A key whose hash is computed once: that of a tuple of 10,000 shardings takes milliseconds."""

    def __init__(self, key: Hashable) -> None:
        self._key = key
        self._hash = hash(key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._key == other._key


class Recent(Generic[K, V]):
    """The values of the keys used last. Thread-safe; two threads may make the same value at the same time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[_Hashed, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, made where it is not remembered."""
        hashed = _Hashed(key)
        with self._lock:
            if hashed in self._values:
                self._values.move_to_end(hashed)
                return self._values[hashed]
        value = make()
        with self._lock:
            self._values[hashed] = value
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return value
