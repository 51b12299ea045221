"""What several processes of a restore need alike: read by the first of them, and passed on over the devices.

The processes go through the same batches in the same order. In each, what a process read for others travels as bytes, summed with
the zeros of those who wait for it, and so as exact as what storage gave, whatever the dtype. A process that fails takes part to
the end, and says so in the first word of what it sends, since nobody can be called back from a computation on devices. One that
cannot, since its devices failed or it was interrupted again, tells the others on the key-value store: they stop waiting, but
their devices do not, so that JAX must be started again there.

One thread takes all turns on the devices, so that Ctrl-C, which comes to the calling thread, cannot make a process lose count.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from ckptkit import errors
from ckptkit._gc import resumed_gc
from ckptkit._telling import named
from ckptkit._threads import Workers
from ckptkit.grid import Array, Index, index_nbytes
from ckptkit.leaves.base import TypeHandler
from ckptkit.pipeline import alike, answers
from ckptkit.pipeline.limits import BATCH_BYTE_SIZE
from ckptkit.pipeline.memory import aligned_empty
from ckptkit.registry import Registry
from ckptkit.restoration import Restoration

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


class _Piece(NamedTuple):
    """What goes over the devices at once: some of the bytes that a group of processes shares of a batch of leaves.

    Attributes:
      processes: the group; the first one sends.
      members: the parts that it shares, each as the number of the leaf in the batch, and where in the leaf.
      sizes: of the parts, in bytes.
      start: how many of these bytes went before.
    """

    processes: _Group
    members: Sequence[tuple[int, Index]]
    sizes: Sequence[int]
    start: int

    @property
    def nbytes(self) -> int:
        return min(sum(self.sizes) - self.start, (_MAX_WORDS - 1) * _WORD.itemsize)

    @property
    def words(self) -> int:
        """How many are sent, one more than the bytes take; few numbers, each of which is compiled once."""
        return max(_MIN_WORDS, 1 << (-(-self.nbytes // _WORD.itemsize)).bit_length())


class Sharing:
    """The part of one process in a restore; of a single one, which reads everything itself, where nobody else takes part."""

    def __init__(
        self, meeting: Restoration, registry: Registry, items: Sequence[RestoreItem], needs: Sequence[Sequence[Index]]
    ) -> None:
        """Works out which process reads what.

        Args:
          meeting: of the processes.
          registry: knows whose type handlers they are.
          items: what to restore.
          needs: the parts of each that this process needs.
        """
        self.several = bool(meeting.job.others)
        self._meeting = meeting
        self._me = meeting.job.process_index
        self._items = items
        self._needs = needs
        self._shared: Sequence[_Shared] = [{}] * len(items)
        if self.several:
            self._shared = _shared(items, needs, registry, meeting)
        self._point = meeting.numbered("tree") if self.several else ""
        self._failed = False
        self._cut_off = False
        self._group: _Group = ()  # those whose devices are at it, with this process's
        self._ahead: deque[deque[_Piece]] = deque()  # by batch, those that have not gone yet
        self._buffer = np.empty(0, _WORD)
        self._devices = Workers(1, "ckptkit-exchange")

    @property
    def failed(self) -> bool:
        """Whether this process, or one that it shares something with, has failed."""
        return self._failed

    def reads(self, position: int) -> Sequence[Index]:
        """The parts of a leaf that this process reads."""
        if not self.several:
            return self._needs[position]
        shared = self._shared[position]
        return [index for index in self._needs[position] if shared.get(index, (self._me,))[0] == self._me]

    def begin(self, batches: Sequence[Sequence[int]], where: str, max_inflight_bytes: int) -> None:
        """Compares what the processes restore, and takes the memory for passing it on; from now on others rely on this process.

        Args:
          batches: positions of the leaves.
          where: the checkpoint.
          max_inflight_bytes: of the restore.

        Raises:
          errors.ProcessError: other processes restore something else.
          errors.StorageError: there is no memory for it.
        """
        if not self.several:
            return
        self._ahead = deque([deque(self._pieces(positions)) for positions in batches])
        self._buffer = aligned_empty((max([piece.words for pieces in self._ahead for piece in pieces], default=0),), _WORD)
        told = [alike.Facts(item.key_path, _told(item, shared)) for item, shared in zip(self._items, self._shared, strict=True)]
        alike.agree(self._meeting, self._point, told, {"path": where, "bytes in flight": max_inflight_bytes})

    def exchange(self, parts: Sequence[Mapping[Index, Array]], *, failed: bool) -> None:
        """Passes on what this process read of the next batch of leaves, and fills the parts that others read.

        Args:
          parts: of each leaf, those that this process needs.
          failed: this process has not read what it should.

        Raises:
          errors.CheckpointError: the devices failed, here or on a process that shares something of the batch.
          errors.TimeoutError: names those of them that give no sign of life.
        """
        if not self.several:
            return
        self._failed |= failed
        with resumed_gc():
            while self._ahead[0]:
                self._take_turn(parts)
        self._ahead.popleft()

    def give_up(self, error: BaseException) -> None:
        """After an error of this process: takes part, without any data, in what others still exchange.

        Where it cannot, or is interrupted, as by a further Ctrl-C, it tells them so.
        """
        if not self.several:
            return
        self._failed = True
        finished = False
        try:
            if not self._cut_off:
                with contextlib.suppress(errors.CheckpointError):
                    self._take_turn(None)  # after the one that was interrupted, if any
                    while any(self._ahead):
                        self._take_turn(None)
                    finished = True
        finally:
            if not finished:
                self._meeting.cut_off(error)

    def end(self) -> None:
        """Returns once every process has restored everything; raises what went wrong on another."""
        if not self.several:
            return
        point = f"{self._point}-end"
        if self._meeting.gather(point) is None:
            self._meeting.hear(point)
        else:
            self._meeting.tell(point)

    def _pieces(self, positions: Sequence[int]) -> Iterator[_Piece]:
        """What this process sends and receives of a batch, in the order that all processes keep to."""
        groups: dict[_Group, list[tuple[int, Index]]] = {}
        for number, position in enumerate(positions):
            for index, processes in self._shared[position].items():
                if self._me in processes:
                    groups.setdefault(processes, []).append((number, index))
        for processes, members in sorted(groups.items()):
            sizes = [self._nbytes(positions[number], index) for number, index in members]
            for start in range(0, sum(sizes), (_MAX_WORDS - 1) * _WORD.itemsize):
                yield _Piece(processes, members, sizes, start)

    def _nbytes(self, position: int, index: Index) -> int:
        array = self._items[position].spec.array
        return 0 if array is None else index_nbytes(array, index)

    def _take_turn(self, parts: Sequence[Mapping[Index, Array]] | None) -> None:
        """Has the next piece go over the devices, after what they are at, and waits for it."""
        turn = self._devices.submit(self._pass_on, parts)
        try:
            self._meeting.wait_for_devices(turn, lambda: self._group)
        except errors.CheckpointError:
            self._cut_off |= not turn.done()
            raise

    def _pass_on(self, parts: Sequence[Mapping[Index, Array]] | None) -> None:
        """Sends or receives the next piece, if there is one; without data where `parts`, those of its batch, are None."""
        pieces = next(filter(None, self._ahead), None)
        if pieces is None:
            return
        piece = pieces[0]
        flat, places = [], []
        if parts is not None:
            flat = [parts[number][index].reshape(-1).view(np.uint8) for number, index in piece.members]
            places = list(_overlaps(piece.sizes, piece.start, piece.nbytes))
        sends = piece.processes[0] == self._me
        sent = self._buffer[: piece.words]
        sent.fill(0)
        sent[0] = self._failed
        for number, inner, outer in places if sends else ():
            sent.view(np.uint8)[outer] = flat[number][inner]
        self._group = piece.processes
        pieces.popleft()  # what can go wrong in this process alone lies behind it
        try:
            received = _sum(piece.processes, self._me, sent)
        except errors.CheckpointError:
            self._cut_off = True
            raise
        self._failed |= bool(received[0])
        for number, inner, outer in () if sends else places:
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
    items: Sequence[RestoreItem], needs: Sequence[Sequence[Index]], registry: Registry, meeting: Restoration
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

    try:
        spread, summed, device = _summing(processes, me)
        mine = jax.device_put(sent[None], device)
        rows = jax.make_array_from_single_device_arrays((len(processes), len(sent)), spread, [mine])
        return np.asarray(summed(rows).addressable_data(0))
    except Exception as error:
        raise errors.ProcessError(
            f"process {processes[0]} could not pass on what it read to {named(processes[1:])}: {error}\nStart the job "
            "again, or let each process read what it needs: MultiprocessingOptions(single_reader=False)."
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
