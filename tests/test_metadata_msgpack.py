"""The msgpack files of older releases: Orbax's own writer is the judge, and strangers' files are errors."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint.msgpack_utils as orbax_msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit import errors
from ckptkit.metadata.msgpack import decode_aggregate
from ckptkit.testing import strategies

_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(),
    st.builds(np.float32, st.floats(width=32, allow_nan=False)),
)
_trees = st.recursive(
    st.one_of(_scalars, strategies.numpy_arrays()),
    lambda children: st.one_of(st.lists(children, max_size=4), st.dictionaries(st.text(), children, max_size=4)),
    max_leaves=8,
)


def _decode(data: bytes) -> Any:
    return decode_aggregate(data, "here")


def _assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            _assert_same(found[name], expected[name])
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            _assert_same(a, b)
    elif isinstance(expected, np.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())
    else:
        assert (type(found), found) == (type(expected), expected)


@given(_trees)
def test_what_orbax_writes_is_read(tree: Any) -> None:
    _assert_same(_decode(orbax_msgpack.msgpack_serialize(tree)), tree)


def test_tuples_and_jax_arrays_are_read() -> None:
    found = _decode(orbax_msgpack.msgpack_serialize({"t": (1, (2.5, "x"), ()), "j": jax.numpy.arange(3)}))
    assert found["t"] == (1, (2.5, "x"), ())
    np.testing.assert_array_equal(found["j"], np.arange(3, dtype=np.int32), strict=True)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 5)])
def test_arrays_in_pieces_are_joined(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(orbax_msgpack, "MAX_CHUNK_SIZE", 16)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    found = _decode(orbax_msgpack.msgpack_serialize({"a": {"b": array}}))
    np.testing.assert_array_equal(found["a"]["b"], array, strict=True)


def test_large_arrays_are_views_of_the_file() -> None:
    data = orbax_msgpack.msgpack_serialize({"a": np.zeros(1000)})
    found = _decode(data)["a"]
    assert np.shares_memory(found, np.frombuffer(data, np.uint8))


def test_bytes_of_a_bool_other_than_0_and_1_become_true() -> None:
    found = _decode(_array([3], "bool", b"\x00\x01\x07"))
    assert found.tobytes() == b"\x00\x01\x01"


def test_unused_bits_of_an_int4_are_cleared() -> None:
    found = _decode(_array([2], "int4", b"\xff\x07"))
    assert found.dtype == ml_dtypes.int4
    assert found.tolist() == [-1, 7]


def _array(shape: Any, dtype: Any, data: Any, code: int = 1) -> bytes:
    packed: bytes = msgpack.packb(msgpack.ExtType(code, msgpack.packb([shape, dtype, data])))
    return packed


def _pieces(shape: Any, chunks: Any) -> bytes:
    data = {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}
    packed: bytes = msgpack.packb(data, default=lambda a: msgpack.ExtType(1, msgpack.packb([a.shape, a.dtype.name, a.tobytes()])))
    return packed


_ONE = np.ones(1)

HOSTILE = {
    "empty": b"",
    "two values": b"\x01\x01",
    "unused byte": b"\xc1",
    "cut-off number": b"\xcf\x00",
    "cut-off string": b"\xd9\x05ab",
    "long string": b"\xdb\xff\xff\xff\xffab",
    "long bytes": b"\xc6\xff\xff\xff\xff",
    "long array": b"\xdd\xff\xff\xff\xff",
    "long map": b"\xdf\x7f\xff\xff\xff\x01",
    "nested": b"\x91" * 200 + b"\x01",
    "deeply nested": b"\x91" * 1_000_000,
    "nested maps": b"\x81\xa1a" * 100_000,
    "nested extensions": b"".join(bytes([0xC7, 2, 4]) for _ in range(500)),
    "string not UTF-8": b"\xa1\xff",
    "key not a string": b"\x81\x01\x01",
    "key that is a list": b"\x81\x90\x01",
    "key twice": b"\x82\xa1a\x01\xa1a\x02",
    "extension unknown": msgpack.packb(msgpack.ExtType(5, b"\x90")),
    "timestamp": msgpack.packb(msgpack.Timestamp(0, 0)),
    "extension cut off": b"\xc7\x0a\x01\x90",
    "extension without its end": msgpack.packb(msgpack.ExtType(4, b"\x90\x01")),
    "extension beyond its end": b"\x92\xd4\x04\x91\x01",
    "extension not an array": msgpack.packb(msgpack.ExtType(1, b"\x01")),
    "complex of text": msgpack.packb(msgpack.ExtType(2, msgpack.packb(["a", 1.0]))),
    "array without bytes": _array([1], "int8", 5),
    "array with too few bytes": _array([2], "int32", b"\x00" * 7),
    "array with too many bytes": _array([], "int32", b"\x00" * 8),
    "negative size": _array([-1], "int8", b""),
    "size not an integer": _array([1.0], "int8", b"\x00"),
    "size true": _array([True], "int8", b"\x00"),
    "huge shape": _array([2**62, 4], "int8", b""),
    "huge empty shape": _array([0, 2**62, 2**62], "int8", b""),
    "too many axes": _array([1] * 33, "int8", b"\x00"),
    "scalar with axes": _array([1], "int8", b"\x00", code=3),
    "dtype object": _array([1], "object", b"\x00" * 8),
    "dtype O": _array([1], "O", b"\x00" * 8),
    "dtype str": _array([1], "str", b""),
    "dtype void": _array([1], "void64", b"\x00" * 8),
    "dtype of fields": _array([1], "i4,i4", b"\x00" * 8),
    "dtype datetime": _array([1], "datetime64", b"\x00" * 8),
    "dtype with a shape": _array([1], "(1000000000,)f4", b""),
    "dtype not text": _array([1], 5, b"\x00"),
    "dtype unknown": _array([1], "float13", b"\x00"),
    "pieces of nothing": _pieces({"0": 1}, {}),
    "pieces of numbers": _pieces({"0": 1}, {"0": 1}),
    "pieces of two types": _pieces({"0": 2}, {"0": _ONE, "1": np.ones(1, np.int8)}),
    "pieces too small": _pieces({"0": 10**12}, {"0": _ONE}),
    "pieces missing": _pieces({"0": 2}, {"0": _ONE, "2": _ONE}),
    "pieces without a shape": _pieces(5, {"0": _ONE}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_file_is_an_error(name: str) -> None:
    with pytest.raises(errors.FormatError, match="here: "):
        _decode(HOSTILE[name])


_SAMPLE = orbax_msgpack.msgpack_serialize(
    {"a": np.arange(6.0).reshape(2, 3), "b": [1, -5, 2.5, "text", None, (1, 2)], "c": {"d": np.float32(1), "e": 1j}}
)


@given(st.data())
@settings(max_examples=300)
def test_damage_never_raises_anything_else(data: Any) -> None:
    damaged = bytearray(_SAMPLE[: data.draw(st.integers(0, len(_SAMPLE)))])
    for position in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=4)):
        if damaged:
            damaged[position] = data.draw(st.integers(0, 255))
    try:
        _decode(bytes(damaged))
    except errors.FormatError:
        return


@given(st.binary(max_size=64))
@settings(max_examples=300)
def test_noise_never_raises_anything_else(data: bytes) -> None:
    try:
        _decode(data)
    except errors.FormatError:
        return
