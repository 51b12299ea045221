"""The storage backend without a database: each array a directory of zarr files, as Orbax writes with `use_ocdbt=False`.

Thousands of arrays are thousands of files, which cost far more than a database does; single arrays, and programs that read
zarr, are what it is for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import tensorstore as ts

from ckptkit.location import Location
from ckptkit.options import StorageOptions
from ckptkit.processes import Job
from ckptkit.storage import _remote_values
from ckptkit.storage._chunk_reader import ChunkReader
from ckptkit.storage._tensorstore import context_for, mapped_tensorstore_errors
from ckptkit.storage._zarr_files import FileValues, FileWriter, create_file, holds_document
from ckptkit.storage._zarr_names import name_refusals
from ckptkit.storage.base import ArraySpec, ManyWriters, Reader, Writer
from ckptkit.storage.zarr_documents import refusal

__all__ = ["ZarrBackend"]

_REMOTE_THREADS = 8  # each waits for a server most of the time, and holds one chunk


class ZarrBackend(ManyWriters):
    """Arrays as directories of files."""

    name = "zarr"

    def refuse(self, arrays: Sequence[ArraySpec]) -> Sequence[str | None]:
        return [refusal(array) for array in arrays]

    def refuse_names(self, names: Sequence[str]) -> Sequence[str | None]:
        return name_refusals(names)

    def writer(self, location: Location, arrays: Sequence[ArraySpec], options: StorageOptions, job: Job) -> Writer:
        directory = location.local_path

        def create(name: str, data: Any) -> None:
            if directory is None:
                location.write_bytes(name, bytes(data))
            else:
                create_file(os.path.join(directory, name), data, sync=not job.is_primary)

        threads = _REMOTE_THREADS if directory is None else min(4, os.cpu_count() or 1)
        return FileWriter(create, threads, arrays, options, job)

    def merge(self, location: Location, job: Job) -> Iterable[str]:
        return ()  # every chunk is a file, whoever wrote it

    def reader(self, location: Location) -> Reader:
        """A reader of a directory of arrays, whatever program wrote it."""
        if location.local_path is not None:
            return ChunkReader(location, FileValues(location.local_path))
        return ChunkReader(location, _remote_values.RemoteValues(_store(location), location.url))

    def data_directories(self, names: Iterable[str]) -> Iterable[str]:
        return (name.rstrip("/") for name in names)

    def recognises(self, location: Location) -> bool:
        if location.exists("manifest.ocdbt"):
            return False
        if location.local_path is not None:
            return holds_document(location.local_path)
        with mapped_tensorstore_errors(location.url):
            return _remote_values.holds_document(_store(location))


def _store(location: Location) -> ts.KvStore:
    with mapped_tensorstore_errors(location.url):
        return ts.KvStore.open(location.kvstore(), context=context_for(location)).result()
