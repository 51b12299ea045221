"""The index that ckptkit writes beside the data: a checksum for every block of every chunk.

Checksums are XXH3 with 64 bits (https://github.com/Cyan4973/xxHash), over blocks of 1 MiB of a chunk's bytes as they are
in memory; the last block of a chunk is what is left. They are written as 16 hexadecimal digits a block, one string a chunk,
the chunks of an array in C order of its grid. Beside them stands what each array is, so that whatever a store says of it is
checked too: together they make up for a store without checksums of its own. Orbax ignores the file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import orjson
import xxhash

from ckptkit import errors
from ckptkit.grid import ArraySpec, Chunk, Index, chunk_count
from ckptkit.metadata import json

__all__ = [
    "BLOCK_BYTE_SIZE",
    "INDEX_FILE",
    "Checksums",
    "IndexDocument",
    "array_text",
    "block_checksums",
    "decode_index",
    "encode_index",
]

INDEX_FILE = "ckptkit_index.json"
BLOCK_BYTE_SIZE = 1 << 20
_VERSION = 1
_DIGITS = 16


def block_checksums(data: npt.NDArray[Any]) -> str:
    """The checksums of a C-contiguous array's bytes, block by block; '' for no bytes."""
    memory: Any = data  # hashed as it is, since views of 10,000 small arrays take longer than their checksums
    if 0 < data.nbytes <= BLOCK_BYTE_SIZE:
        return xxhash.xxh3_64_hexdigest(memory)
    flat = memory.reshape(-1).view(np.uint8)
    return "".join(xxhash.xxh3_64_hexdigest(flat[i : i + BLOCK_BYTE_SIZE]) for i in range(0, flat.size, BLOCK_BYTE_SIZE))


class Checksums:
    """The checksums of arrays while their chunks arrive in any order."""

    def __init__(self, arrays: Iterable[ArraySpec]) -> None:
        self._arrays = {array.name: array for array in arrays}
        self._whole: dict[str, str] = {}  # of arrays that are one chunk, as most are where there are many
        self._chunks: dict[str, dict[int, str]] = {}

    def add(self, chunks: Iterable[Chunk]) -> None:
        """Checksums chunks."""
        for chunk in chunks:
            array, text = chunk.array, block_checksums(chunk.data)
            if array.chunk_shape == array.shape:
                self._whole[array.name] = text
            else:
                self._chunks.setdefault(array.name, {})[_position(array, chunk.index)] = text

    def known(self) -> Mapping[str, Mapping[int, str]]:
        """Those that have arrived, by the array's name and the chunk's place in C order of its grid."""
        return {name: {0: text} for name, text in self._whole.items()} | self._chunks

    def learn(self, name: str, known: Mapping[int, str], where: str) -> None:
        """Adds what another process, which saves to `where` too, knows of an array.

        Raises:
          errors.StorageError: there is no such array, or a chunk was written twice, or is none of this array's.
        """
        if (array := self._arrays.get(name)) is None:
            raise errors.StorageError(f"{where}: a process has checksums of {name!r}, which this process does not save.")
        if name in self._whole:
            self._chunks[name] = {0: self._whole.pop(name)}
        own, count = self._chunks.setdefault(name, {}), chunk_count(array)
        for position, text in known.items():
            if not 0 <= position < count or position in own:
                raise errors.StorageError(f"{where}: chunk {position} of array {name!r} was written by two processes.")
            own[position] = text

    def texts(self) -> dict[str, list[str]]:
        """By array, one string a chunk, in C order of the grid.

        Raises:
          errors.StorageError: a chunk never arrived.
        """
        texts = {}
        for name, array in self._arrays.items():
            if (text := self._whole.get(name)) is not None:
                texts[name] = [text]
                continue
            known, count = self._chunks.get(name, {}), chunk_count(array)
            if len(known) != count:
                raise errors.StorageError(f"array {name!r}: {count - len(known)} of its chunks were never written.")
            texts[name] = [known[position] for position in range(count)]
        return texts


@attrs.define
class IndexDocument:
    """What the index says.

    Attributes:
      checksums: array name -> its checksums, as `Checksums.texts` gives them.
      typestrs: leaf name -> type string, for leaves whose type handler is not one of Orbax's words.
      providers: type string -> who provides its handler ('distribution version').
      storage: the name of the storage backend that wrote the arrays -> who provides it; empty in older indices.
      extras: leaf name -> JSON that its type handler wants back.
      arrays: shape, dtype and grid, as `array_text` has them -> the arrays that are so; empty in indices written before there
        was such a table.
    """

    checksums: dict[str, list[str]]
    typestrs: dict[str, str] = attrs.field(factory=dict)
    providers: dict[str, str] = attrs.field(factory=dict)
    storage: dict[str, str] = attrs.field(factory=dict)
    extras: dict[str, Any] = attrs.field(factory=dict)
    arrays: dict[str, list[str]] = attrs.field(factory=dict)
    _texts: dict[str, str] | None = attrs.field(default=None, init=False, eq=False)

    def check_array(self, array: ArraySpec) -> str | None:
        """What is wrong with what a store says an array is, or None."""
        if not self.arrays:
            return None
        if self._texts is None:
            self._texts = {name: text for text, names in self.arrays.items() for name in names}
        found, written = array_text(array), self._texts.get(array.name)
        return None if found == written else f"array {array.name!r} is stored as {found}, but was written as {written}"

    def check(self, array: ArraySpec, index: Index, found: str) -> str | None:
        """What is wrong with the bytes of a chunk of which `block_checksums` says what was found, or None."""
        texts, position = self.checksums.get(array.name, ()), _position(array, index)
        if position >= len(texts):
            return "no checksum is recorded for this chunk"
        expected = texts[position]
        if found == expected:
            return None
        wrong = [i for i in range(0, len(found), _DIGITS) if found[i : i + _DIGITS] != expected[i : i + _DIGITS]]
        at = f", the first at byte {wrong[0] // _DIGITS * BLOCK_BYTE_SIZE} of the chunk" if wrong else ""
        return f"{len(wrong)} of {len(found) // _DIGITS} blocks differ from their recorded checksum{at}"


def array_text(array: ArraySpec) -> str:
    """Shape, dtype and grid of an array, in words."""
    return _array_text(array.shape, array.dtype, array.chunk_shape)


@functools.lru_cache(maxsize=1024)  # a model has thousands of arrays and dozens of shapes
def _array_text(shape: tuple[int, ...], dtype: np.dtype[Any], chunk_shape: tuple[int, ...]) -> str:
    return f"{dtype.name} of shape {shape} in chunks of {chunk_shape}"


def encode_index(document: IndexDocument) -> bytes:
    """The file's bytes."""
    return orjson.dumps(
        {
            "version": _VERSION,
            "algorithm": "xxh3_64",
            "block_byte_size": BLOCK_BYTE_SIZE,
            **{name: getattr(document, name) for name in _TABLES},
        }
    )


def decode_index(data: bytes, where: str) -> IndexDocument:
    """The index in a file's bytes.

    Raises:
      errors.FormatError: not an index, or one of a later version.
    """
    document = json.load(data, where)
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        found = document.get("version") if isinstance(document, dict) else type(document).__name__
        raise errors.FormatError(
            f"{where}: index version {found!r}, expected {_VERSION}; a newer ckptkit wrote it, or it is damaged."
        )
    if (document.get("algorithm"), document.get("block_byte_size")) != ("xxh3_64", BLOCK_BYTE_SIZE):
        raise errors.FormatError(f"{where}: unknown checksum algorithm {document.get('algorithm')!r}.")
    tables = {name: document.get(name, {}) for name in _TABLES}
    for name, table in tables.items():
        if not isinstance(table, dict) or not all(map(_TABLES[name], table.values())):
            raise errors.FormatError(f"{where}: {name!r} does not hold what an index holds; the file is damaged.")
    return IndexDocument(**tables)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


_TABLES = {
    "checksums": _is_texts,
    "typestrs": _is_text,
    "providers": _is_text,
    "storage": _is_text,
    "extras": _is_object,
    "arrays": _is_texts,
}


def _position(array: ArraySpec, index: Index) -> int:
    """Where a chunk stands in C order of the grid."""
    if array.chunk_shape == array.shape:  # most arrays, of which there may be many
        return 0
    position = 0
    for (start, _), n, c in zip(index, array.shape, array.chunk_shape, strict=True):
        position = position * -(-n // c) + start // c
    return position
