"""Chunks into an OCDBT database: values one after the other into data files, then the tree over them.

The database is written here, not by TensorStore, which copies what it is given and rewrites nodes at every commit. Nothing
refers to a value before all of them are written, so that no transaction is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final, Literal

import attrs
import numpy as np

from ckptkit.location import Location
from ckptkit.options import StorageOptions
from ckptkit.storage._data_files import data_files
from ckptkit.storage._futures import done
from ckptkit.storage._ocdbt_nodes import MANIFEST, MAX_INLINE_NBYTES, Entry, Place, encode_manifest, encode_tree
from ckptkit.storage._tensorstore import writing_error
from ckptkit.storage._values import Bytes, key_prefix
from ckptkit.storage._zarr_cells import compresses_well, encoded_cell
from ckptkit.storage.base import ArraySpec, Chunk, Writer
from ckptkit.storage.zarr_documents import DOCUMENT_NAMES, Document, documented

__all__ = ["OcdbtWriter"]

# Below this size a sample tells little, and to decompress a cell takes longer than to read it.
_SAMPLED_NBYTES: Final = 1 << 20


class OcdbtWriter(Writer):
    """Appends chunks to data files as they come; the tree is kept in memory, about 100 bytes a chunk, until `commit`."""

    def __init__(
        self, location: Location, arrays: Sequence[ArraySpec], options: StorageOptions, *, documents: bool = True
    ) -> None:
        """As `StorageBackend.writer`; `documents` says whether the database holds those of the arrays, not only chunks."""
        self._location = location
        self._files = data_files(location, "", options.target_data_file_size)
        self._entries: list[Entry] = []
        self._options = options
        self._documents: dict[str, tuple[int, bytes, Document]] = {}
        self._with_documents = documents
        self._stored: dict[bytes, Place] = {}  # documents; a model has thousands of arrays and dozens of shapes
        sampled = [array for array in arrays if options.compression == "auto" and _cell_nbytes(array) >= _SAMPLED_NBYTES]
        self._undecided = {array.name: array for array in sampled}
        try:
            self._describe([array for array in arrays if array.name not in self._undecided], options)
        except BaseException:
            self._files.close()
            raise

    def write(self, chunks: Sequence[Chunk]) -> Future[None]:
        values = []
        for chunk in chunks:
            if chunk.array.name in self._undecided:
                self._decide(chunk)
            group, prefix, document = self._documents[chunk.array.name]
            values.append((group, prefix, document.chunk_key(chunk.index).encode(), self._encoded(chunk, document)))
        places = iter(self._files.append([value for *_, value in values if value.size > MAX_INLINE_NBYTES]))
        for group, prefix, key, value in values:
            place = next(places) if value.size > MAX_INLINE_NBYTES else value.tobytes()
            self._entries.append(Entry(prefix + key, place, group, len(prefix)))
        return done()

    def commit(self) -> None:
        self._describe([*self._undecided.values()], self._options)
        root, height = encode_tree(self._entries, self._store)
        self._files.finish()
        self._location.write_bytes(MANIFEST, encode_manifest(root, height))
        self._files.close()

    def abort(self) -> None:
        self._files.close()
        self._entries.clear()

    def _decide(self, chunk: Chunk) -> None:
        """Compresses the array, or not, by what its first chunk looks like."""
        compression: Literal["zstd"] | None = "zstd" if compresses_well(chunk.data) else None
        self._describe([self._undecided.pop(chunk.array.name)], attrs.evolve(self._options, compression=compression))

    def _describe(self, arrays: Sequence[ArraySpec], options: StorageOptions) -> None:
        for group, (array, document, data) in enumerate(documented(arrays, options), len(self._documents)):
            prefix = key_prefix(array.name).encode()
            self._documents[array.name] = group, prefix, document
            if not self._with_documents:
                continue
            if data not in self._stored:
                self._stored[data] = self._store(data)
            name = DOCUMENT_NAMES[document.version].encode()
            self._entries.append(Entry(prefix + name, self._stored[data], group, len(prefix)))

    def _store(self, value: bytes) -> Place:
        return self._files.append([np.frombuffer(value, np.uint8)])[0]

    def _encoded(self, chunk: Chunk, document: Document) -> Bytes:
        try:
            return encoded_cell(chunk.data, document)
        except Exception as error:
            raise writing_error(error, self._location.url) from error


def _cell_nbytes(array: ArraySpec) -> int:
    return math.prod(array.chunk_shape) * array.dtype.itemsize
