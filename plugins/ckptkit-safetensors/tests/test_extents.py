"""Parts of arrays are runs of bytes: those that numpy would take, whatever the shape."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit_safetensors.extents import calls, cut, extents, inside, move, row_axis, tasks, widened

_shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def parts(draw):
    shape = draw(_shapes)
    index = tuple(tuple(sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))) for n in shape)
    return shape, index


def lengths(index):
    return [stop - start for start, stop in index]


@given(parts(), st.integers(0, 99))
def test_the_extents_of_a_part_hold_its_bytes(part, offset):
    shape, index = part
    array = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    memory = bytes(offset) + array.tobytes()
    out = np.zeros(lengths(index), np.int32)
    for start, view in extents(offset, shape, index, out):
        view[...] = np.frombuffer(memory[start : start + view.size], np.uint8)
    np.testing.assert_array_equal(out, array[tuple(slice(*bounds) for bounds in index)])


@given(parts(), st.sampled_from([1, 1 << 10, 1 << 18, 1 << 20]))
def test_a_part_is_cut_into_parts_of_at_most_1_mib(part, itemsize):
    shape, index = part
    count = np.zeros(shape, int)
    for piece in cut(index, itemsize * math.prod(lengths(index))):
        count[tuple(slice(*bounds) for bounds in piece)] += 1
        assert itemsize * math.prod(lengths(piece)) <= 1 << 20
    expected = np.zeros(shape, int)
    expected[tuple(slice(*bounds) for bounds in index)] = 1
    np.testing.assert_array_equal(count, expected)


def test_short_runs_move_as_rows_unless_the_rows_are_long():
    assert row_axis((100, 8), 4, (100, 1)) == 1
    assert row_axis((100, 8), 4, (100, 8)) == 2
    assert row_axis((100, 8), 4, (50, 8)) == 2
    assert row_axis((100, 1024), 4, (100, 128)) == 2  # runs of 512 bytes
    assert row_axis((100, 1 << 20), 4, (100, 1)) == 2  # rows of 4 MiB
    assert row_axis((100, 4, 8), 4, (100, 2, 1)) == 1
    assert widened(((3, 5), (0, 2), (1, 2)), (100, 4, 8), 1) == ((3, 5), (0, 4), (0, 8))


def test_where_parts_overlap():
    assert inside(((2, 6), (0, 4)), ((4, 9), (1, 2))) == (slice(2, 4), slice(1, 2))


def test_a_task_is_at_most_16_mib_in_the_order_of_the_file():
    mib = np.zeros(1 << 20, np.uint8)
    found = list(tasks([(i << 20, mib) for i in reversed(range(40))]))
    assert [len(task) for task in found] == [16, 16, 8]
    assert [call.offset >> 20 for task in found for call in task] == list(range(40))


def test_what_follows_on_each_other_in_the_file_moves_in_one_call_of_at_most_1_mib():
    kib = np.zeros((2, 128), np.float32)
    offsets = [*range(0, 3 << 20, 1 << 10), 4 << 20, 5 << 20]
    found = list(calls([(offset, kib) for offset in offsets]))
    assert [(call.offset, call.nbytes, len(call.buffers)) for call in found] == [
        *((i << 20, 1 << 20, 1 << 10) for i in range(3)),
        (4 << 20, 1 << 10, 1),
        (5 << 20, 1 << 10, 1),
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.bool_, jnp.bfloat16])
def test_a_call_that_moves_less_than_it_was_asked_to_goes_on_where_it_ended(dtype):
    memory = np.arange(12).astype(dtype).reshape(3, 4)
    found = [(0, memory), (memory.nbytes, np.array(1, dtype))]
    stored = {}

    def write_five(_, buffers, offset):
        data = b"".join(buffers)[:5]
        stored.update(zip(itertools.count(offset), data, strict=False))
        return len(data)

    assert move(write_five, 0, calls(found)) is None
    assert bytes(stored[i] for i in sorted(stored)) == memory.tobytes() + np.array(1, dtype).tobytes()
