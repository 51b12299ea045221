"""What several processes of a restore need alike: read by the first of them, and passed on over the devices.

The processes go through the same batches in the same order. In each, what a process read for others travels as bytes, summed with
the zeros of those who wait for it, and so as exact as what storage gave, whatever the dtype. A process that fails takes part to
the end, and says so in the first word of what it sends, since nobody can be called back from a computation on devices.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ckptkit import errors
from ckptkit._telling import named
from ckptkit.grid import Array, Index, index_nbytes
from ckptkit.leaves.base import TypeHandler
from ckptkit.meeting import Meeting
from ckptkit.pipeline import alike, answers
from ckptkit.pipeline.limits import BATCH_BYTE_SIZE
from ckptkit.pipeline.memory import aligned_empty
from ckptkit.registry import Registry

if TYPE_CHECKING:
    from ckptkit.pipeline.restore import RestoreItem

__all__ = ["Sharing"]

_WORD: Final = np.dtype(np.uint32)
_MIN_WORDS: Final = 1 << 10
_MAX_WORDS: Final = BATCH_BYTE_SIZE // _WORD.itemsize
"""Devices hold three times as many at once: what each sends, all of it summed, and what came of the one before."""

_Group = tuple[int, ...]
_Shared = Mapping[Index, _Group]
"""The processes that need a part, in ascending order; the first one reads it."""


class Sharing:
    """The part of one process in a restore; of a single one, which reads everything itself, where nobody else takes part."""

    def __init__(
        self,
        meeting: Meeting,
        registry: Registry,
        items: Sequence[RestoreItem],
        needs: Sequence[Sequence[Index]],
        where: str,
        max_inflight_bytes: int,
    ) -> None:
        """Compares what the processes restore.

        Args:
          meeting: of the processes.
          registry: knows whose type handlers they are.
          items: what to restore.
          needs: the parts of each that this process needs.
          where: the checkpoint.
          max_inflight_bytes: of the restore.

        Raises:
          errors.ProcessError: other processes restore something else.
        """
        self.several = bool(meeting.job.others)
        self._meeting = meeting
        self._me = meeting.job.process_index
        self._point = f"restore-{hashlib.blake2b(where.encode(), digest_size=8).hexdigest()}"
        self._needs = needs
        self._shared: Sequence[_Shared] = [{}] * len(items)
        self._failed = False
        self._cut_off = False  # the devices failed, so that nobody waits for this process
        self._exchanged = 0
        if self.several:
            self._shared = _shared(items, needs, registry, meeting)
            self._specs = [item.spec for item in items]
            facts = [alike.Facts(item.key_path, _told(item, shared)) for item, shared in zip(items, self._shared, strict=True)]
            alike.agree(meeting, self._point, facts, {"path": where, "bytes in flight": max_inflight_bytes})

    @property
    def failed(self) -> bool:
        """Whether this process, or one that it shares something with, has failed."""
        return self._failed

    def reads(self, position: int) -> Sequence[Index]:
        """The parts of a leaf that this process reads."""
        shared = self._shared[position]
        return [index for index in self._needs[position] if shared.get(index, (self._me,))[0] == self._me]

    def exchange(self, positions: Sequence[int], parts: Sequence[Mapping[Index, Array]], *, failed: bool) -> None:
        """Passes on what this process read of a batch of leaves, and fills the parts that others read.

        Args:
          positions: of the leaves.
          parts: of each of them, those that this process needs; empty where it failed.
          failed: this process has not read what it should.

        Raises:
          errors.ProcessError: the devices failed.
        """
        self._exchanged += 1
        self._failed |= failed
        groups: dict[_Group, list[tuple[int, Index]]] = {}
        for number, position in enumerate(positions):
            for index, processes in self._shared[position].items():
                if self._me in processes:
                    groups.setdefault(processes, []).append((number, index))
        for processes, members in sorted(groups.items()):
            sizes = [self._nbytes(positions[number], index) for number, index in members]
            flat = [parts[number][index].reshape(-1).view(np.uint8) for number, index in members] if parts else None
            for start in range(0, sum(sizes), _MAX_WORDS * _WORD.itemsize - _WORD.itemsize):
                self._pass_on(processes, sizes, flat, start)

    def give_up(self, batches: Sequence[Sequence[int]]) -> None:
        """Takes part, without any data, in what others still exchange; after an error of this process."""
        if self.several and not self._cut_off:
            for positions in batches[self._exchanged :]:
                self.exchange(positions, [], failed=True)

    def end(self) -> None:
        """Returns once every process has restored everything; raises what went wrong on another."""
        if not self.several:
            return
        if self._meeting.gather(f"{self._point}-end") is None:
            self._meeting.hear(f"{self._point}-end")
        else:
            self._meeting.tell(f"{self._point}-end")

    def _nbytes(self, position: int, index: Index) -> int:
        array = self._specs[position].array
        return 0 if array is None else index_nbytes(array, index)

    def _pass_on(self, processes: _Group, sizes: Sequence[int], flat: Sequence[Array] | None, start: int) -> None:
        """Sends the bytes from `start` on, as many as go at once, or receives them."""
        nbytes = min(sum(sizes) - start, (_MAX_WORDS - 1) * _WORD.itemsize)
        words = max(_MIN_WORDS, 1 << (-(-nbytes // _WORD.itemsize)).bit_length())  # and one more; few lengths, each compiled once
        sent = aligned_empty((words,), _WORD)
        sent.fill(0)
        sent[0] = self._failed
        sends = processes[0] == self._me
        if sends and flat is not None:
            for number, inner, outer in _overlaps(sizes, start, nbytes):
                sent.view(np.uint8)[outer] = flat[number][inner]
        self._cut_off = True
        received = _sum(processes, self._me, sent)
        self._cut_off = False
        self._failed |= bool(received[0])
        if not sends and flat is not None:
            for number, inner, outer in _overlaps(sizes, start, nbytes):
                flat[number][inner] = received.view(np.uint8)[outer]


def _overlaps(sizes: Sequence[int], start: int, nbytes: int) -> Iterator[tuple[int, slice, slice]]:
    """Of values one after the other, those that lie in `nbytes` bytes from `start`: which, what of it, and where after a word."""
    first = 0
    for number, size in enumerate(sizes):
        a, b = max(first, start), min(first + size, start + nbytes)
        if a < b:
            yield number, slice(a - first, b - first), slice(_WORD.itemsize + a - start, _WORD.itemsize + b - start)
        first += size


def _shared(
    items: Sequence[RestoreItem], needs: Sequence[Sequence[Index]], registry: Registry, meeting: Meeting
) -> list[_Shared]:
    """For each leaf, the parts that several processes need."""
    found: list[_Shared] = [{}] * len(items)
    members: dict[TypeHandler[Any], list[int]] = {}
    for i, item in enumerate(items):
        members.setdefault(item.handler, []).append(i)
    for handler, positions in members.items():
        specs, requests = [items[i].spec for i in positions], [items[i].request for i in positions]
        parts = [needs[i] for i in positions]
        for i, shared in zip(positions, answers.shared(registry, handler, specs, requests, parts, meeting.job), strict=True):
            found[i] = shared
    return found


def _told(item: RestoreItem, shared: _Shared) -> dict[str, Any]:
    return {"kind": item.handler.typestr, "shared parts": sorted(shared.items())}


def _sum(processes: _Group, me: int, sent: Array) -> Array:
    """The sum of what each process sends, which all of them get.

    Raises:
      errors.ProcessError: the devices failed, as they do where a process has died.
    """
    import jax  # noqa: PLC0415 - who reads everything itself need not have it

    spread, summed, device = _summing(processes, me)
    try:
        mine = jax.device_put(sent[None], device)
        rows = jax.make_array_from_single_device_arrays((len(processes), len(sent)), spread, [mine])
        return np.asarray(summed(rows).addressable_data(0))
    except jax.errors.JaxRuntimeError as error:
        raise errors.ProcessError(
            f"process {processes[0]} could not pass on what it read to {named(processes[1:])}: {error}\nTry again, or let each "
            "process read what it needs: MultiprocessingOptions(single_reader=False)."
        ) from error


@functools.lru_cache(maxsize=256)
def _summing(processes: _Group, me: int) -> tuple[Any, Callable[[Any], Any], Any]:
    """The sharding of one row on the first device of each process, a function that sums the rows, and this process's device."""
    import jax  # noqa: PLC0415 - as above

    first = [min((d for d in jax.devices() if d.process_index == process), key=lambda d: d.id) for process in processes]
    mesh = jax.sharding.Mesh(np.array(first), ("process",))
    axes: Any = jax.sharding.PartitionSpec
    spread, everywhere = jax.sharding.NamedSharding(mesh, axes("process")), jax.sharding.NamedSharding(mesh, axes())
    summed = jax.jit(lambda rows: rows.sum(axis=0, dtype=_WORD), out_shardings=everywhere)
    return spread, summed, first[processes.index(me)]
