"""Which process writes which cells of an array that lies on devices of several processes.

Every process finds out the same from the sharding alone. What several processes hold, each writes a part of: cells of one
array where it has many, else whole arrays in turn.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ckptkit.grid import ArraySpec, Index, chunk_indices
from ckptkit.leaves._numbers import ShardingNumbers
from ckptkit.leaves.base import Problem
from ckptkit.processes import Job

__all__ = ["Shares", "bounds", "holders", "holding_processes", "local_bounds"]

_HOST_LOCAL = Problem(
    "the array lies on devices of this process alone, and each process has one of its own. To save one for all, pass "
    "np.asarray(it), of which the primary process saves its own; to save all, make one global array of them with "
    "jax.make_array_from_process_local_data."
)


def bounds(slices: Sequence[slice[Any, Any, Any]] | None, shape: Sequence[int]) -> Index:
    """The part of an array that jax says in slices."""
    return tuple([s.indices(n)[:2] for s, n in zip(slices or (), shape, strict=True)])


@functools.lru_cache(maxsize=256)
def local_bounds(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> Mapping[Any, Index]:
    """The part of an array that each device of this process holds."""
    return {device: bounds(slices, shape) for device, slices in sharding.addressable_devices_indices_map(shape).items()}


@functools.lru_cache(maxsize=256)
def holders(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> Mapping[Index, tuple[int, ...]]:
    """For each part of an array that a device holds, the processes that have such a device, in ascending order."""
    found: dict[Index, set[int]] = {}
    devices: Mapping[Any, Any] = sharding.devices_indices_map(shape)
    for device, slices in devices.items():
        found.setdefault(bounds(slices, shape), set()).add(device.process_index)
    return {part: tuple(sorted(processes)) for part, processes in sorted(found.items())}


def holding_processes(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> int:
    """How many processes hold the same part of an array; 1 where all of it is on this process."""
    return 1 if sharding.is_fully_addressable else max(map(len, holders(sharding, shape).values()))


class _Kind(NamedTuple):
    """What arrays of one grid and sharding have in common.

    Attributes:
      parts: the cells of each part, and the processes that may write them.
      period: after so many arrays the same processes have their turn again.
    """

    parts: Sequence[tuple[Sequence[Index], Sequence[int]]]
    period: int


class Shares:
    """Gives out the cells of arrays, one after the other, in the same order on every process."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._kinds: dict[Any, _Kind | Problem] = {}
        self._turns: dict[Any, int] = {}
        self._known: dict[Any, list[Index]] = {}
        self._numbers = ShardingNumbers()  # which arrays share an object may differ between processes, whose turn it is may not

    def of(self, array: ArraySpec, sharding: jax.sharding.Sharding) -> Sequence[Index] | Problem:
        """The cells of the next array that this process writes, or why the job cannot save it."""
        key = (array[1:], self._numbers.of(sharding))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = self._kind(array, sharding)
        if isinstance(kind, Problem):
            return kind
        turn = self._turns[key] = self._turns.get(key, -1) + 1
        turn %= kind.period
        if (cells := self._known.get((key, turn))) is None:
            cells = self._known[key, turn] = [cell for part in kind.parts for cell in self._mine(*part, turn)]
        return cells

    def _kind(self, array: ArraySpec, sharding: jax.sharding.Sharding) -> _Kind | Problem:
        if sharding.is_fully_addressable and self._job.others:
            return _HOST_LOCAL
        parts = []
        for part, processes in holders(sharding, array.shape).items():
            writers = [process for process in processes if process in self._job.processes]
            if not writers:
                return Problem(
                    f"its part {part} lies on devices of process {processes[0]}, which takes no part in this save; let all "
                    "processes take part that hold some of the tree."
                )
            parts.append((list(chunk_indices(array, part)), writers))
        return _Kind(parts, math.lcm(*[len(writers) for _, writers in parts]))

    def _mine(self, cells: Sequence[Index], writers: Sequence[int], turn: int) -> list[Index]:
        count = len(writers)
        return [
            cell
            for number, cell in enumerate(cells)
            if writers[(turn + number * count // len(cells)) % count] == self._job.process_index
        ]
