"""The file `checkpoint` of older releases of Orbax: a tree in msgpack, its arrays as extension types.

The tree is made of maps with str keys and arrays; extension 1 is an array of numbers (shape, dtype's name, bytes), 2 a
complex number, 3 a single numpy number, written as 1, and 4 a tuple. Format: https://github.com/msgpack/msgpack/blob/master/spec.md.

It is decoded here, since of a stranger's file nothing may be believed: a length is checked against the bytes that are left
before anything is made of it, and arrays are views of the file's bytes, never copies.
"""

from __future__ import annotations

import math
import re
import reprlib
import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ckptkit import errors
from ckptkit.grid import Array
from ckptkit.metadata.json import malformed, shape_of

__all__ = ["AGGREGATE_FILE", "decode_aggregate"]

AGGREGATE_FILE = "checkpoint"

_MAX_DEPTH: Final = 100
_MAX_VALUES: Final = 1 << 20  # each may take a hundred times its one byte as a Python object
_MAX_RANK: Final = 32

_CONSTANTS: Final = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS: Final = {0xCA: ">f", 0xCB: ">d"} | {0xCC + i: f">{code}" for i, code in enumerate("BHIQbhiq")}
_SIZED: Final = {
    **{0xC4 + i: ("bin", f">{code}") for i, code in enumerate("BHI")},
    **{0xC7 + i: ("ext", f">{code}") for i, code in enumerate("BHI")},
    **{0xD9 + i: ("str", f">{code}") for i, code in enumerate("BHI")},
    **{0xDC + i: ("array", f">{code}") for i, code in enumerate("HI")},
    **{0xDE + i: ("map", f">{code}") for i, code in enumerate("HI")},
}

_USED_BITS: Final = {"int2": 0x03, "uint2": 0x03, "int4": 0x0F, "uint4": 0x0F, "float4_e2m1fn": 0x0F}
"""The bits of a byte that mean something, for dtypes that do not use all of them."""

_CHUNKED = "__msgpack_chunked_array__"  # arrays of more than 2**30 bytes, in pieces


def decode_aggregate(data: bytes, where: str) -> Any:
    """The tree in the file: dicts, lists, tuples, None, bool, int, float, complex, str, and numpy arrays and numbers.

    Raises:
      errors.FormatError: not msgpack, cut off, nested more than 100 deep, or with values that no release wrote.
    """
    return _Decoder(memoryview(data), where).whole()


class _Decoder:
    """Reads one value after another."""

    def __init__(self, data: memoryview, where: str) -> None:
        self._data = data
        self._where = where
        self._at = 0
        self._value_count = 0

    def whole(self) -> Any:
        """The one value that the bytes hold."""
        value = self._value(0)
        if self._left():
            raise self._error(f"{self._left()} bytes after the last value")
        return value

    def _value(self, depth: int) -> Any:
        self._value_count += 1
        if depth > _MAX_DEPTH or self._value_count > _MAX_VALUES:
            raise self._error(f"more than {_MAX_VALUES} values, or more than {_MAX_DEPTH} levels of them")
        kind, found = self._header()
        match kind:
            case "value":
                return found
            case "str":
                return self._text(found)
            case "bin":
                return self._take(found)
            case "array":
                return [self._value(depth + 1) for _ in range(self._count(found, 1))]
            case "map":
                return self._map(self._count(found, 2), depth)
        return self._extension(found, depth)

    def _header(self) -> tuple[str, Any]:
        """What comes next, and its value or its size."""
        first = self._number(">B")
        if first < 0x80 or first >= 0xE0:
            return "value", first if first < 0x80 else first - 0x100
        if first < 0xC0:
            return ("map", first & 0x0F) if first < 0x90 else ("array", first & 0x0F) if first < 0xA0 else ("str", first & 0x1F)
        if first in _CONSTANTS:
            return "value", _CONSTANTS[first]
        if first in _NUMBERS:
            return "value", self._number(_NUMBERS[first])
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first not in _SIZED:
            raise self._error(f"a byte {first:#x} where a value begins, which msgpack does not have")
        kind, size = _SIZED[first]
        return kind, self._number(size)

    def _left(self) -> int:
        return len(self._data) - self._at

    def _count(self, count: int, least_nbytes: int) -> int:
        """The count of a container's elements, each of which takes some bytes."""
        if count * least_nbytes > self._left():
            raise self._error(f"{count} elements announced, {self._left()} bytes left")
        return count

    def _take(self, size: int) -> memoryview:
        start = self._at
        self._at += self._count(size, 1)
        return self._data[start : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _text(self, size: int) -> str:
        try:
            return str(self._take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"a string that is not UTF-8 ({error})") from error

    def _map(self, count: int, depth: int) -> Any:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise self._error(f"the key {reprlib.repr(key)} in a map, expected different strings")
            found[key] = self._value(depth + 1)
        return self._joined(found) if _CHUNKED in found else found

    def _extension(self, size: int, depth: int) -> Any:
        code, end = self._number(">b"), self._at + self._count(size, 1)
        content = self._value(depth + 1)
        if self._at != end or not isinstance(content, list):
            raise self._error(f"extension {code} of {size} bytes does not hold one array")
        match code, content:
            case (1, [shape, name, memoryview() as data]):
                return self._array(shape, name, data)
            case (2, [float() as real, float() as imaginary]):
                return complex(real, imaginary)
            case (3, [[], name, memoryview() as data]):
                return self._array([], name, data)[()]
            case (4, _):
                return tuple(content)
        raise self._error(f"extension {code} with the values {reprlib.repr(content)}, which no release wrote")

    def _array(self, sizes: Any, name: Any, data: memoryview) -> Array:
        shape, dtype = self._shape(sizes), self._dtype(name)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise self._error(f"an array of shape {shape} and dtype {dtype} in {len(data)} bytes")
        stored: Array = np.ndarray(len(data), np.uint8, data)
        if dtype.kind == "b":
            stored = stored != 0
        elif used := _USED_BITS.get(name):
            stored = np.bitwise_and(stored, used)
        return stored.view(dtype).reshape(shape)

    def _shape(self, value: Any) -> tuple[int, ...]:
        shape = shape_of(value, "the shape of an array", self._where)
        if len(shape) > _MAX_RANK or math.prod(n for n in shape if n) > 1 << 58:
            raise self._error(f"an array of shape {reprlib.repr(shape)}")
        return shape

    def _dtype(self, name: Any) -> np.dtype[Any]:
        """A dtype of numbers by its name, numpy's or jax's."""
        if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]{0,31}", name):
            raise self._error(f"the dtype {reprlib.repr(name)}")
        try:
            dtype = np.dtype(name)
        except TypeError as error:
            raise self._error(f"the dtype {name!r}, which this version does not know") from error
        if dtype.name != name or dtype.kind not in "biufcV" or dtype.type is np.void:
            raise self._error(f"the dtype {name!r}, expected one of numbers")
        return dtype

    def _joined(self, found: Mapping[str, Any]) -> Array:
        """The array whose flat pieces a map holds."""
        chunks = self._tuple(found.get("chunks"))
        shape = self._shape(list(self._tuple(found.get("shape"))))
        if not chunks or not all(isinstance(chunk, np.ndarray) and chunk.dtype == chunks[0].dtype for chunk in chunks):
            raise self._error("an array in pieces that are none, or of different types")
        flat = np.concatenate([chunk.reshape(-1) for chunk in chunks])
        if flat.size != math.prod(shape):
            raise self._error(f"an array of shape {shape} in pieces of {flat.size} values")
        return flat.reshape(shape)

    def _tuple(self, value: Any) -> tuple[Any, ...]:
        """A tuple that was written as a map of its positions."""
        names = [str(i) for i in range(len(value))] if isinstance(value, dict) else []
        if not isinstance(value, dict) or value.keys() != set(names):
            raise self._error("an array in pieces without its shape or its pieces")
        return tuple([value[name] for name in names])

    def _error(self, found: str) -> errors.FormatError:
        return malformed(self._where, found)
