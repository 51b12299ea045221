"""The storage backend without a database: each array a directory of zarr files, as Orbax writes with `use_ocdbt=False`.

Thousands of arrays are thousands of files, which cost far more than a database does; single arrays, and programs that read
zarr, are what it is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptkit import errors
from ckptkit.location import Location
from ckptkit.options import StorageOptions
from ckptkit.processes import Job
from ckptkit.storage._chunk_reader import ChunkReader
from ckptkit.storage._zarr_files import FileValues, FileWriter, holds_document
from ckptkit.storage._zarr_names import name_refusals
from ckptkit.storage.base import ArraySpec, Reader, StorageBackend, Writer
from ckptkit.storage.zarr_documents import refusal

__all__ = ["ZarrBackend"]


class ZarrBackend(StorageBackend):
    """Arrays as directories of files on this machine."""

    name = "zarr"

    def refuse(self, arrays: Sequence[ArraySpec]) -> Sequence[str | None]:
        names = name_refusals([array.name for array in arrays])
        return [refusal(array) or name for array, name in zip(arrays, names, strict=True)]

    def writer(self, location: Location, arrays: Sequence[ArraySpec], options: StorageOptions, job: Job) -> Writer:
        """A writer into an empty directory.

        Raises:
          errors.ArgsError: the location is no directory of this machine.
        """
        return FileWriter(_directory(location), arrays, options)

    def reader(self, location: Location) -> Reader:
        """A reader of a directory of arrays, whatever program wrote it.

        Raises:
          errors.ArgsError: the location is no directory of this machine.
        """
        return ChunkReader(location, FileValues(_directory(location)))

    def data_directories(self, names: Iterable[str]) -> Iterable[str]:
        return (name.rstrip("/") for name in names)

    def recognises(self, location: Location) -> bool:
        directory = location.local_path
        return directory is not None and not location.exists("manifest.ocdbt") and holds_document(directory)


def _directory(location: Location) -> str:
    if location.local_path is None:
        raise errors.ArgsError(
            f"{location.url} is no directory of this machine, which storage='zarr' needs; use OCDBT there, or copy it here."
        )
    return location.local_path
