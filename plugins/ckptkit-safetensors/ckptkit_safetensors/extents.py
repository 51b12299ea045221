"""Parts of arrays as runs of bytes in a file, and their way to and from memory.

An extent is an offset in a file and the memory for its bytes. Those that follow on each other in the file move in one call, so
that 10,000 arrays of 1 KB take ten; no call moves more than 1 MiB, since some kernels now and then take very long over larger
writes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptkit.storage import Index, whole

__all__ = ["Array", "Call", "Extent", "calls", "cut", "extents", "inside", "is_small", "move", "row_axis", "tasks", "widened"]

Array = npt.NDArray[Any]
"""Memory in one run: C-contiguous."""

Extent = tuple[int, Array]


class Call(NamedTuple):
    """What moves in one call of the system's: `nbytes` in all, from an offset in the file on."""

    offset: int
    nbytes: int
    buffers: Sequence[Array]


_CALL_NBYTES: Final = 1 << 20
_CALL_BUFFERS: Final = 1024  # IOV_MAX on Linux and macOS
_TASK_NBYTES: Final = 16 << 20
_TASK_CALLS: Final = 1 << 14

# A call for a run costs about 3 us, in which 16 KiB are copied: shorter runs move with what lies between them.
_MIN_RUN_NBYTES: Final = 512
_MAX_ROW_NBYTES: Final = 16 << 10


def is_small(data: Array, shape: tuple[int, ...]) -> bool:
    """Whether memory is that of a whole array of this shape, and moves in one call: most arrays, of which there may be many."""
    return data.shape == shape and 0 < data.nbytes <= _CALL_NBYTES


def extents(offset: int, shape: tuple[int, ...], index: Index, data: Array) -> Iterator[Extent]:
    """The runs of a part of an array that begins at `offset` in the file, in pieces that a call can move.

    Args:
      offset: where the array begins, in bytes.
      shape: of the array.
      index: the part.
      data: its memory; that of the pieces is bytes, but bool where this is, so that one knows to check them.
    """
    starts, nbytes = _runs(shape, data.dtype.itemsize, index)
    memory = data.reshape(-1) if data.dtype.kind == "b" else _flat(data)
    for i, start in enumerate(starts):
        for at in range(0, nbytes, _CALL_NBYTES):
            yield offset + start + at, memory[i * nbytes + at : i * nbytes + min(at + _CALL_NBYTES, nbytes)]


def _flat(data: Array) -> Array:
    """The bytes of memory."""
    return data.reshape(-1).view(np.uint8)


def _runs(shape: Sequence[int], itemsize: int, index: Index) -> tuple[list[int], int]:
    """Where the runs of a part begin, counted from the array's first byte, in C order, and how many bytes each has."""
    axis, nbytes = len(shape), itemsize
    while axis and index[axis - 1] == (0, shape[axis - 1]):
        axis -= 1
        nbytes *= shape[axis]
    if not axis:
        return ([0] if nbytes else []), nbytes
    start, stop = index[axis - 1]
    starts, stride = [start * nbytes], shape[axis - 1] * nbytes
    nbytes *= stop - start
    for (first, last), n in zip(reversed(index[: axis - 1]), reversed(shape[: axis - 1]), strict=True):
        starts = [at + i * stride for i in range(first, last) for at in starts]
        stride *= n
    return (starts if nbytes else []), nbytes


def row_axis(shape: tuple[int, ...], itemsize: int, lengths: tuple[int, ...]) -> int:
    """The axis from which on parts of these lengths move as whole rows; the array's rank where their runs are long enough."""
    if lengths == shape:
        return len(shape)
    first, nbytes = len(shape), itemsize
    for axis in reversed(range(len(shape))):
        if lengths[axis] != shape[axis]:
            if lengths[axis] * nbytes >= _MIN_RUN_NBYTES or shape[axis] * nbytes > _MAX_ROW_NBYTES:
                break
            first = axis
        nbytes *= shape[axis]
    return first


def widened(index: Index, shape: Sequence[int], axis: int) -> Index:
    """A part, and what lies beside it in its rows."""
    return index[:axis] + whole(shape[axis:])


def cut(index: Index, nbytes: int) -> Iterator[Index]:
    """A part of `nbytes` in parts of at most 1 MiB, cut along the first axes."""
    axis = next((i for i, (start, stop) in enumerate(index) if stop - start > 1), None)
    if nbytes <= _CALL_NBYTES or axis is None:
        yield index
        return
    start, stop = index[axis]
    each = nbytes // (stop - start)
    step = max(1, _CALL_NBYTES // each)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        yield from cut((*index[:axis], (first, last), *index[axis + 1 :]), each * (last - first))


def inside(part: Index, other: Index) -> tuple[slice, ...]:
    """Where the overlap of two parts lies in the memory of the first."""
    return tuple([slice(max(a, c) - a, min(b, d) - a) for (a, b), (c, d) in zip(part, other, strict=True)])


def calls(found: Iterable[Extent]) -> Iterator[Call]:
    """The calls that move extents, in the order of the file."""
    start = end = -1
    buffers: list[Array] = []
    for offset, memory in sorted(found, key=operator.itemgetter(0)):
        nbytes = memory.nbytes
        if offset != end or end - start + nbytes > _CALL_NBYTES or len(buffers) == _CALL_BUFFERS:
            if buffers:
                yield Call(start, end - start, buffers)
            start, buffers = offset, []
        buffers.append(memory)
        end = offset + nbytes
    if buffers:
        yield Call(start, end - start, buffers)


def tasks(found: Iterable[Extent]) -> Iterator[list[Call]]:
    """The calls that move extents, in lists for one thread each."""
    task: list[Call] = []
    nbytes = 0
    for call in calls(found):
        task.append(call)
        nbytes += call.nbytes
        if nbytes >= _TASK_NBYTES or len(task) == _TASK_CALLS:
            yield task
            task, nbytes = [], 0
    if task:
        yield task


def move(operation: Callable[[int, Sequence[Any], int], int], descriptor: int, task: Iterable[Call]) -> int | None:
    """Makes calls of `os.preadv` or `os.pwritev`.

    Returns:
      the offset from which on nothing came, where the file ends too early; else None.
    """
    for at, nbytes, buffers in task:
        while (count := operation(descriptor, buffers, at)) < nbytes:
            if not count:
                return at
            at, nbytes, buffers = at + count, nbytes - count, _rest(buffers, count)  # noqa: PLW2901 - the same call goes on
    return None


def _rest(buffers: Sequence[Array], count: int) -> list[Array]:
    """What is left of buffers of which so many bytes have moved."""
    left = []
    for buffer in buffers:
        if count < buffer.nbytes:
            left.append(_flat(buffer)[count:])
        count = max(0, count - buffer.nbytes)
    return left
