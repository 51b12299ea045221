"""Numbers for shardings, which are slow to compare: equal ones have the same."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["ShardingNumbers"]


class ShardingNumbers:
    """Asked by identity at first: arrays share a few objects, but jit gives each array that it returns a sharding of its own."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self._seen: dict[int, tuple[Any, int]] = {}  # holds what was seen, so that no other object gets its id

    def of(self, sharding: Any) -> int:
        """The number of a sharding; of anything else, which may not be comparable, it is its own."""
        if (seen := self._seen.get(id(sharding))) is None:
            key = sharding if isinstance(sharding, jax.sharding.Sharding) else id(sharding)
            seen = self._seen[id(sharding)] = sharding, self._numbers.setdefault(key, len(self._numbers))
        return seen[1]
