"""The grid of chunks, and the index of their checksums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit import errors
from ckptkit.grid import ArraySpec, Chunk, chunk_count, chunk_indices, fit_chunk_shape, index_shape, is_cell
from ckptkit.index import BLOCK_BYTE_SIZE, Checksums, IndexDocument, block_checksums, decode_index, encode_index
from ckptkit.pipeline.memory import aligned_empty

_shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def _arrays(draw: Any) -> ArraySpec:
    shape = draw(_shapes)
    return ArraySpec("x", shape, np.dtype(np.int16), tuple(draw(st.integers(1, 8)) for _ in shape))


@given(array=_arrays())
def test_the_cells_of_a_grid_cover_every_element_once(array: ArraySpec) -> None:
    seen = np.zeros(array.shape, int)
    cells = list(chunk_indices(array))
    for cell in cells:
        seen[tuple(slice(*bounds) for bounds in cell)] += 1
    assert (seen == 1).all()
    assert len(cells) == chunk_count(array)


@given(shape=st.lists(st.integers(0, 500), max_size=3), itemsize=st.sampled_from([1, 2, 8]), limit=st.integers(1, 5000))
def test_a_fitted_cell_divides_the_shape_and_respects_the_limit(shape: list[int], itemsize: int, limit: int) -> None:
    cell = fit_chunk_shape(shape, itemsize, limit)
    assert all(max(n, 1) % c == 0 for n, c in zip(shape, cell, strict=True))
    assert math.prod(cell) * itemsize <= max(limit, itemsize)


def test_axes_named_are_cut_first() -> None:
    assert fit_chunk_shape((8, 8), 1, 8, axes=(1,)) == (8, 1)
    assert fit_chunk_shape((8, 8), 1, 8) == (1, 8)


def _checked(array: ArraySpec, data: np.ndarray) -> IndexDocument:
    sums = Checksums([array])
    for cell in chunk_indices(array):
        sums.add([Chunk(array, cell, np.ascontiguousarray(data[tuple(slice(*bounds) for bounds in cell)]))])
    return decode_index(encode_index(IndexDocument(sums.texts())), "index")


@given(array=_arrays(), seed=st.integers(0, 99))
def test_a_flipped_bit_in_any_chunk_is_noticed(array: ArraySpec, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 99, array.shape).astype(array.dtype)
    index = _checked(array, data)
    for cell in chunk_indices(array):
        chunk = np.ascontiguousarray(data[tuple(slice(*bounds) for bounds in cell)])
        assert index.check(array, cell, block_checksums(chunk)) is None
        chunk.reshape(-1)[-1] ^= 1
        assert "1 of 1 blocks differ" in str(index.check(array, cell, block_checksums(chunk)))


def test_the_block_that_differs_is_located() -> None:
    data = np.zeros(3 * BLOCK_BYTE_SIZE + 5, np.uint8)
    array = ArraySpec("x", data.shape, data.dtype, data.shape)
    index = _checked(array, data)
    data[2 * BLOCK_BYTE_SIZE + 7] = 1
    assert index.check(array, ((0, data.size),), block_checksums(data)) == (
        f"1 of 4 blocks differ from their recorded checksum, the first at byte {2 * BLOCK_BYTE_SIZE} of the chunk"
    )


def test_a_chunk_that_never_arrived_is_an_error() -> None:
    with pytest.raises(errors.StorageError, match="1 of its chunks"):
        Checksums([ArraySpec("x", (2,), np.dtype("u1"), (2,))]).texts()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"version": 2}',
        b'{"version": 1, "algorithm": "md5", "block_byte_size": 1048576}',
        b'{"version": 1, "algorithm": "xxh3_64", "block_byte_size": 1048576, "checksums": {"x": "00"}}',
        b'{"version": 1, "algorithm": "xxh3_64", "block_byte_size": 1048576, "checksums": [], "typestrs": {"x": 1}}',
        b"[" * 100_000,
    ],
)
def test_an_index_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(errors.FormatError, match="index"):
        decode_index(data, "index")


@given(shape=_shapes, dtype=st.sampled_from(["u1", "f4", "c16"]))
def test_restored_memory_is_aligned_for_the_cpu_backend(shape: tuple[int, ...], dtype: str) -> None:
    array = aligned_empty(shape, np.dtype(dtype))
    assert (array.shape, array.dtype, array.flags.c_contiguous, array.ctypes.data % 64 if array.size else 0) == (
        shape,
        dtype,
        True,
        0,
    )
    assert index_shape(tuple((0, n) for n in shape)) == shape


@given(data=st.data())
def test_a_part_is_a_cell_where_the_grid_has_it(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=3)))
    array = ArraySpec("a", shape, np.dtype("u1"), tuple(data.draw(st.integers(1, 7)) for _ in shape))
    cells = set(chunk_indices(array))
    parts = itertools.product(*[itertools.combinations(range(n + 1), 2) for n in shape])
    assert {part for part in parts if is_cell(array, part)} == cells
