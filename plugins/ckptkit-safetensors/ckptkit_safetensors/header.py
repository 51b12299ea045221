"""The header of a safetensors file (https://github.com/huggingface/safetensors#format), from and to bytes.

A file is the length of its header as 8 bytes, little-endian; the header, a JSON object padded with spaces; and the arrays'
bytes without gaps, little-endian, in C order. What is read may be a stranger's: nothing is believed before it is checked.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
import orjson

from ckptkit import errors
from ckptkit.storage import ArraySpec, chunk_count

__all__ = ["LENGTH_NBYTES", "MAX_NBYTES", "METADATA_KEY", "WORDS", "Tensor", "encode", "order", "parse", "sizes"]

METADATA_KEY: Final = "__metadata__"
LENGTH_NBYTES: Final = 8
MAX_NBYTES: Final = 100_000_000
"""The library's own bound of a header."""

_CHUNKS_KEY: Final = "ckptkit.chunk_shapes"
_ALIGNMENT: Final = 64  # of the first array in the file: what programs that map the file into memory like
_MAX_RANK: Final = 64  # numpy's
_MAX_CHUNKS: Final = 1 << 22  # no checkpoint of 32 MiB chunks comes near; more would only cost time and memory

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    word: np.dtype(kind)
    for word, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "I64": np.int64,
        "U64": np.uint64,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
WORDS: Final[Mapping[np.dtype[Any], str]] = {dtype: word for word, dtype in DTYPES.items()}


_INT: Final = frozenset({int})
_Layout = tuple[tuple[int, ...], np.dtype[Any], tuple[int, ...], int]


class Tensor(NamedTuple):
    """An array in a file.

    Attributes:
      array: the array.
      start: where its bytes begin, counted from the end of the header.
      exact: whether the file says that ckptkit wrote it: true is the byte 1 then, and any byte but 0 in files of others.
    """

    array: ArraySpec
    start: int
    exact: bool


def sizes(arrays: Sequence[ArraySpec]) -> list[int]:
    """The bytes that each array takes in a file."""
    known: dict[tuple[Any, ...], int] = {}  # of which 10,000 arrays have few
    return [known.get(a[1:]) or known.setdefault(a[1:], a.nbytes) for a in arrays]


def order(arrays: Sequence[ArraySpec]) -> list[ArraySpec]:
    """The arrays as they follow on each other in a file: larger items first, so that each begins at a multiple of its own."""
    return sorted(arrays, key=lambda array: -array.dtype.itemsize)


def encode(arrays: Sequence[ArraySpec]) -> tuple[bytes, dict[str, int], int]:
    """What stands before the arrays in a file that holds them in this order, where each begins behind it, and their bytes in all.

    The chunks that checksums were taken of are recorded where an array is not one chunk. The format is called 'pt', as by most
    writers: transformers refuses files that do not say one it knows.

    Raises:
      errors.ArgsError: the header would be larger than the library reads.
    """
    chunks = {a.name: a.chunk_shape for a in arrays if a.chunk_shape != a.shape and a.chunk_shape != _one_chunk(a.shape)}
    document: dict[str, Any] = {METADATA_KEY: {"format": "pt", _CHUNKS_KEY: orjson.dumps(chunks).decode()}}
    starts, end = {}, 0
    for (name, shape, dtype, _), nbytes in zip(arrays, sizes(arrays), strict=True):
        starts[name] = start = end
        end += nbytes
        document[name] = {"dtype": WORDS[dtype], "shape": shape, "data_offsets": (start, end)}
    text = orjson.dumps(document)
    text += b" " * (-(LENGTH_NBYTES + len(text)) % _ALIGNMENT)
    if len(text) > MAX_NBYTES:
        raise errors.ArgsError(
            f"The names and shapes of {len(arrays)} arrays take {len(text)} bytes, more than the {MAX_NBYTES} that the header of "
            "a safetensors file may have; set a smaller target_data_file_size."
        )
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text, starts, end


def _one_chunk(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple([max(1, n) for n in shape])


def parse(text: bytes, size: int, where: str) -> Mapping[str, Tensor]:
    """The arrays that a header tells of, by name; `size` is how many bytes follow it in the file.

    Raises:
      errors.FormatError: not a header, or one that does not fit the file.
    """
    document = _load(text, where)
    if not isinstance(document, dict):
        raise errors.FormatError(f"{where}: the header is a JSON {type(document).__name__}, expected an object.")
    metadata = document.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise errors.FormatError(f"{where}: {METADATA_KEY} is {_shown(metadata)}, expected an object of texts.")
    exact, layouts = _CHUNKS_KEY in metadata, functools.cache(_layout)  # arrays share most of theirs
    found = {name: _tensor(name, entry, exact, layouts, where) for name, entry in document.items()}
    _check_places(found, size, where)
    return _with_chunks(found, metadata.get(_CHUNKS_KEY, "{}"), where)


def _load(text: bytes, where: str) -> Any:
    try:
        document = orjson.loads(text)
        if orjson.dumps(document) != text.rstrip(b" "):  # not written in the one way that leaves nothing open
            document = json.loads(text.decode(), object_pairs_hook=_unique)
    except (TypeError, ValueError, RecursionError) as error:  # the first where it is nested deeper than orjson writes
        raise errors.FormatError(f"{where}: not a safetensors file: the header is no JSON ({error}).") from error
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, none of whose names occurs twice: readers would not agree which of them counts."""
    document = dict(pairs)
    if len(document) != len(pairs):
        ((name, _),) = Counter([name for name, _ in pairs]).most_common(1)
        raise ValueError(f"the name {name[:100]!r} occurs twice")
    return document


def _tensor(
    name: str,
    entry: Any,
    exact: bool,  # noqa: FBT001 - never called with a bare True
    layouts: Callable[[str, tuple[int, ...]], _Layout | str],
    where: str,
) -> Tensor:
    """An entry, with the whole array as its one chunk."""
    try:
        word, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        name.encode()
    except (TypeError, KeyError, ValueError) as error:
        raise _malformed(name, entry, "dtype, shape and two data_offsets", where) from error
    if type(word) is not str or type(shape) is not list or not _INT.issuperset(map(type, shape)):
        raise _malformed(name, entry, f"a dtype among {', '.join(DTYPES)}, and a shape of integers", where)
    layout = layouts(word, tuple(shape))
    if isinstance(layout, str):
        raise _malformed(name, entry, layout, where)
    shape, dtype, cell, nbytes = layout
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop or stop - start != nbytes:
        raise _malformed(name, entry, f"data_offsets that are {nbytes} bytes apart", where)
    return Tensor(ArraySpec(name, shape, dtype, cell), start, exact)


def _layout(word: str, shape: tuple[int, ...]) -> _Layout | str:
    """Shape, dtype, the one chunk and the bytes of an array; of what cannot be, what is expected instead."""
    if (dtype := DTYPES.get(word)) is None:
        return f"a dtype among {', '.join(DTYPES)}"
    if len(shape) > _MAX_RANK or min(shape, default=0) < 0:
        return f"a shape of at most {_MAX_RANK} lengths"
    cell = _one_chunk(shape)
    if math.prod(cell) * dtype.itemsize >= 1 << 63:  # of an empty array too: numpy refuses more
        return "a shape that fits into memory"
    return shape, dtype, cell, math.prod(shape) * dtype.itemsize


def _check_places(tensors: Mapping[str, Tensor], size: int, where: str) -> None:
    """The arrays follow on each other, from the end of the header to the end of the file."""
    end = 0
    for array, start, _ in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.array.nbytes)):
        if start != end:
            what = "overlaps another one" if start < end else f"leaves {start - end} bytes before it unused"
            raise errors.FormatError(
                f"{where}: array {array.name[:100]!r} at byte {start} of the data {what}: the file is damaged."
            )
        end += array.nbytes
    if end != size:
        cut = "it was cut off; restore another copy" if end > size else "it is damaged, or something was appended"
        raise errors.FormatError(f"{where}: the header describes {end} bytes of data, but {size} are in the file: {cut}.")


def _with_chunks(tensors: dict[str, Tensor], text: str, where: str) -> Mapping[str, Tensor]:
    """The arrays with the chunks that `encode` recorded."""
    recorded = _load(text.encode(errors="replace"), where)
    if not isinstance(recorded, dict):
        raise errors.FormatError(f"{where}: {_CHUNKS_KEY} is {_shown(recorded)}, expected an object.")
    for name, shape in recorded.items():
        tensor = tensors.get(name)
        fits = tensor is not None and isinstance(shape, list) and len(shape) == len(tensor.array.shape)
        if tensor is None or not fits or not all(type(n) is int and 0 < n < 1 << 63 for n in shape):
            raise errors.FormatError(f"{where}: the chunks of array {name[:100]!r} are {_shown(shape)}, which does not suit it.")
        array = tensor.array._replace(chunk_shape=tuple(shape))
        if chunk_count(array) > _MAX_CHUNKS:
            raise errors.FormatError(
                f"{where}: array {name[:100]!r} has {chunk_count(array)} chunks, more than are ever written."
            )
        tensors[name] = tensor._replace(array=array)
    return tensors


def _malformed(name: str, entry: Any, expected: str, where: str) -> errors.FormatError:
    return errors.FormatError(f"{where}: array {name[:100]!a} is described as {_shown(entry)}; expected {expected}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
