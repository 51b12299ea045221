"""Chunks into an OCDBT database: values one after the other into data files, then the tree over them.

The database is written here, not by TensorStore, which copies what it is given, rewrites nodes at every commit, and writes
a data file in one call. Nothing refers to a value before all of them are written, so that no transaction is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from ckptkit.location import Location
from ckptkit.options import StorageOptions
from ckptkit.storage._data_files import data_files
from ckptkit.storage._futures import done
from ckptkit.storage._ocdbt_nodes import MANIFEST, MAX_INLINE_NBYTES, Entry, Place, encode_manifest, encode_tree
from ckptkit.storage._tensorstore import writing_error
from ckptkit.storage._values import Bytes, key_prefix
from ckptkit.storage._zarr_cells import encoded_cell
from ckptkit.storage.base import ArraySpec, Chunk, Writer
from ckptkit.storage.zarr_documents import DOCUMENT_NAMES, Document, documented

__all__ = ["OcdbtWriter"]


class OcdbtWriter(Writer):
    """Appends chunks to data files as they come; the tree is kept in memory, about 100 bytes a chunk, until `commit`."""

    def __init__(self, location: Location, arrays: Sequence[ArraySpec], options: StorageOptions) -> None:
        self._location = location
        self._files = data_files(location, "", options.target_data_file_size)
        self._entries: list[Entry] = []
        self._documents: dict[str, tuple[int, bytes, Document]] = {}
        stored: dict[bytes, Place] = {}  # a model has thousands of arrays and dozens of shapes
        for group, (array, document, data) in enumerate(documented(arrays, options)):
            prefix = key_prefix(array.name).encode()
            self._documents[array.name] = group, prefix, document
            if data not in stored:
                stored[data] = self._store(data)
            name = DOCUMENT_NAMES[document.version].encode()
            self._entries.append(Entry(prefix + name, stored[data], group, len(prefix)))

    def write(self, chunks: Sequence[Chunk]) -> Future[None]:
        values = []
        for chunk in chunks:
            group, prefix, document = self._documents[chunk.array.name]
            values.append((group, prefix, document.chunk_key(chunk.index).encode(), self._encoded(chunk, document)))
        places = iter(self._files.append([value for *_, value in values if value.size > MAX_INLINE_NBYTES]))
        for group, prefix, key, value in values:
            place = next(places) if value.size > MAX_INLINE_NBYTES else value.tobytes()
            self._entries.append(Entry(prefix + key, place, group, len(prefix)))
        return done()

    def commit(self) -> None:
        root, height = encode_tree(self._entries, self._store)
        self._files.finish()
        self._location.write_bytes(MANIFEST, encode_manifest(root, height))
        self._files.close()

    def abort(self) -> None:
        self._files.close()
        self._entries.clear()

    def _store(self, value: bytes) -> Place:
        return self._files.append([np.frombuffer(value, np.uint8)])[0]

    def _encoded(self, chunk: Chunk, document: Document) -> Bytes:
        try:
            return encoded_cell(chunk.data, document)
        except Exception as error:
            raise writing_error(error, self._location.url) from error
