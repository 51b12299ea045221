"""Parts of arrays as runs of bytes in a file, and their way to and from memory.

An extent is an offset in a file and the memory for its bytes. Those that follow on each other in the file move in one call, so
that 10,000 arrays of 1 KB take ten; no call moves more than 1 MiB, since some kernels now and then take very long over larger
writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptkit.storage import Index, whole

__all__ = ["Bytes", "Extent", "cut", "extents", "flat", "inside", "move", "row_axis", "tasks", "widened"]

Bytes = npt.NDArray[Any]
"""Items of one byte, in one run."""

Extent = tuple[int, Bytes]

_CALL_NBYTES: Final = 1 << 20
_CALL_BUFFERS: Final = 1024  # IOV_MAX on Linux and macOS
_TASK_NBYTES: Final = 16 << 20
_TASK_EXTENTS: Final = 1 << 14

# A call for a run costs about 3 us, in which 16 KiB are copied: shorter runs move with what lies between them.
_MIN_RUN_NBYTES: Final = 512
_MAX_ROW_NBYTES: Final = 16 << 10


def flat(data: npt.NDArray[Any]) -> Bytes:
    """The bytes of a C-contiguous array; those of bool stay bool, so that one knows to check them."""
    return data.reshape(-1) if data.dtype == bool else data.reshape(-1).view(np.uint8)


def extents(offset: int, shape: Sequence[int], index: Index, data: npt.NDArray[Any]) -> Iterator[Extent]:
    """The runs of a part of an array that begins at `offset` in the file; `data` is the memory of the part, C-contiguous."""
    starts, nbytes = _runs(shape, data.dtype.itemsize, index)
    memory = flat(data)
    if len(starts) == 1 and nbytes <= _CALL_NBYTES:
        yield offset + starts[0], memory
        return
    for i, start in enumerate(starts):
        for at in range(0, nbytes, _CALL_NBYTES):
            yield offset + start + at, memory[i * nbytes + at : i * nbytes + min(at + _CALL_NBYTES, nbytes)]


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


def row_axis(shape: Sequence[int], itemsize: int, lengths: Sequence[int]) -> int:
    """The axis from which on parts of these lengths move as whole rows; the array's rank where their runs are long enough."""
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


def tasks(found: Iterable[Extent]) -> Iterator[list[Extent]]:
    """Extents in the order of the file, in lists for one thread each."""
    task: list[Extent] = []
    size = 0
    for extent in sorted(found, key=lambda extent: extent[0]):
        task.append(extent)
        size += extent[1].size
        if size >= _TASK_NBYTES or len(task) == _TASK_EXTENTS:
            yield task
            task, size = [], 0
    if task:
        yield task


def move(operation: Callable[[int, list[Any], int], int], descriptor: int, task: Iterable[Extent]) -> int | None:
    """Calls `os.preadv` or `os.pwritev` for extents in the order of the file.

    Returns:
      the offset from which on nothing came, where the file ends too early; else None.
    """
    for offset, buffers in _calls(task):
        at = offset
        while buffers:
            count = operation(descriptor, buffers, at)
            if not count:
                return at
            at += count
            while buffers and count >= buffers[0].size:
                count -= buffers.pop(0).size
            if count:
                buffers[0] = buffers[0][count:]
    return None


def _calls(task: Iterable[Extent]) -> Iterator[tuple[int, list[Bytes]]]:
    """Offset and memory of each call."""
    start = end = -1
    call: list[Bytes] = []
    for offset, memory in task:
        if call and (offset != end or end - start + memory.size > _CALL_NBYTES or len(call) == _CALL_BUFFERS):
            yield start, call
            call = []
        if not call:
            start = end = offset
        call.append(memory)
        end += memory.size
    if call:
        yield start, call
