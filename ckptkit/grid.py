"""Arrays as storage sees them: a name, a shape, a dtype, and a regular grid of chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import attrs
import numpy as np
import numpy.typing as npt

__all__ = [
    "Array",
    "ArraySpec",
    "Chunk",
    "Index",
    "chunk_count",
    "chunk_indices",
    "fit_chunk_shape",
    "index_nbytes",
    "index_shape",
    "is_cell",
    "whole",
]

Index = tuple[tuple[int, int], ...]
"""Start and stop per axis, global coordinates; `()` for a 0-d array."""

Array = npt.NDArray[Any]
"""A numpy array of any dtype and shape."""


class ArraySpec(NamedTuple):
    """All that a backend knows of an array.

    Attributes:
      name: unique in the checkpoint; any string.
      shape: sizes per axis; zeros allowed.
      dtype: a numpy dtype, ml_dtypes' included.
      chunk_shape: the grid's cell, per axis at least 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


@attrs.define(eq=False)  # frozen ones take three times as long to make
class Chunk:
    """One cell of an array's grid with its values, C-contiguous, of shape `stop - start` per axis."""

    array: ArraySpec
    index: Index
    data: Array


def whole(shape: Sequence[int]) -> Index:
    """The index of a whole array of this shape."""
    return tuple((0, n) for n in shape)


def chunk_indices(array: ArraySpec, within: Index | None = None) -> Iterator[Index]:
    """The grid cells, in C order, that overlap `within` (default: the whole array); none for an empty one."""
    bounds = whole(array.shape) if within is None else within
    axes = [
        [(i, min(i + c, n)) for i in range(start - start % c, stop, c)] if stop > start else []
        for (start, stop), c, n in zip(bounds, array.chunk_shape, array.shape, strict=True)
    ]
    return product(*axes)


def is_cell(array: ArraySpec, index: Index) -> bool:
    """Whether a part of an array is a cell of its grid; an empty part may count as one, of which nothing is stored."""
    begins = [start - start % c for (start, _), c in zip(index, array.chunk_shape, strict=True)]
    return index == tuple([(i, min(i + c, n)) for i, c, n in zip(begins, array.chunk_shape, array.shape, strict=True)])


def chunk_count(array: ArraySpec) -> int:
    """How many cells the grid of an array has; 1 for a 0-d array, 0 for an empty one."""
    if array.chunk_shape == array.shape:  # most arrays, of which there may be many; a chunk is never empty
        return 1
    count = 1
    for n, c in zip(array.shape, array.chunk_shape, strict=True):
        count *= -(-n // c)
    return count


def index_shape(index: Index) -> tuple[int, ...]:
    """The lengths of an index per axis."""
    return tuple([stop - start for start, stop in index])


def index_nbytes(array: ArraySpec, index: Index) -> int:
    """Bytes of a part of an array in memory."""
    size = array.dtype.itemsize
    for start, stop in index:
        size *= stop - start
    return size


def fit_chunk_shape(
    shape: Sequence[int], itemsize: int, max_byte_size: int, axes: Sequence[int] = (), shard: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The cell of a grid: at most `max_byte_size` bytes, one element at least, and never so small that cells are without number.

    Axes are cut in the order `axes`, then from the first on, which keeps a cell's bytes in one run. Lengths divide those of the
    shard where that makes cells of half the size wanted. Else an axis that no shard cuts is divided evenly, the last cell being
    shorter; one that shards do cut takes its next larger divisor where smaller ones make over four times the cells it takes,
    so that a cell may be larger than asked for, at most a shard, but never straddles two.

    Args:
      shape: of the array.
      itemsize: bytes of an element.
      max_byte_size: what a cell should not exceed.
      axes: to cut first.
      shard: the shape of the parts that devices hold; None for the whole array.
    """
    shard = shape if shard is None else shard
    cell = [max(n, 1) for n in shard]
    order = dict.fromkeys([*(axis % len(cell) for axis in axes), *range(len(cell))]) if cell else {}
    for axis in order:
        size = math.prod(cell) * itemsize
        if size <= max_byte_size:
            break
        wanted = max(1, max_byte_size * cell[axis] // size)
        cell[axis] = _fit_length(cell[axis], wanted, is_whole=shard[axis] == shape[axis])
    return tuple(cell)


def _fit_length(n: int, wanted: int, *, is_whole: bool) -> int:
    """The length of a cell on an axis of `n` elements in each shard, of which there is one if `is_whole`."""
    count = -(-n // wanted)
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = [*small, *(n // d for d in small)]
    divisor = max(d for d in divisors if d <= wanted)
    if 2 * divisor >= wanted:
        return divisor
    if is_whole:
        return -(-n // count)
    return divisor if n // divisor <= 4 * count else min(d for d in divisors if d > wanted)
