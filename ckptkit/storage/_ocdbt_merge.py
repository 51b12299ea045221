"""One database of several: each process writes one of its own, and the primary a tree over the values of all of them.

Values stay where they are. The own databases lie below the common one, in `ocdbt.process_<k>/`, as Orbax lays them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import attrs
import numpy as np

from ckptkit import _filesystem
from ckptkit._gc import paused_gc
from ckptkit._threads import Workers
from ckptkit.location import Location
from ckptkit.options import StorageOptions
from ckptkit.processes import Job
from ckptkit.storage._data_files import data_files
from ckptkit.storage._ocdbt_nodes import MANIFEST, Entry, Place, encode_manifest, encode_tree
from ckptkit.storage._ocdbt_values import OcdbtValues
from ckptkit.storage._ocdbt_writer import OcdbtWriter
from ckptkit.storage._values import Extent
from ckptkit.storage.base import ArraySpec

__all__ = ["PartWriter", "merge"]

_REMOTE_READERS: Final = 16
"""To read a database takes several round trips, one after the other; of local files a thread parses as many as several do."""


class PartWriter(OcdbtWriter):
    """Writes the database of one process among several; that of the primary holds the arrays' documents."""

    def __init__(self, location: Location, arrays: Sequence[ArraySpec], options: StorageOptions, job: Job) -> None:
        self._part = location.child(_directory(job.process_index))
        self._synced_here = not job.is_primary
        if options.compression == "auto":  # by an array's first chunk, which is another one in each process
            options = attrs.evolve(options, compression=None)
        super().__init__(self._part, arrays, options, documents=job.is_primary)

    def commit(self) -> None:
        super().commit()
        if self._synced_here and self._part.local_path is not None:
            _filesystem.sync_directory(self._part.local_path)


def _directory(process: int) -> str:
    """Where a process writes its own database, relative to the common one."""
    return f"ocdbt.process_{process}"


def merge(location: Location, processes: Iterable[int]) -> list[str]:
    """Writes the tree of the common database; the directories of the others, each of which is read once its process comes.

    Raises:
      errors.NotFoundError: a process has written no database.
      errors.StorageError: the system refused.
    """
    entries: dict[bytes, Entry] = {}
    with Workers(_REMOTE_READERS if location.local_path is None else 0, "ckptkit-merge") as readers:
        parts = {(directory := _directory(process)): readers.submit(_entries, location, directory) for process in processes}
        for part in parts.values():
            entries |= part.result()
    _write_tree(location, entries.values())
    return [*parts]


@paused_gc()
def _write_tree(location: Location, entries: Iterable[Entry]) -> None:
    files = data_files(location, "", None)
    try:
        root, height = encode_tree(entries, lambda node: files.append([np.frombuffer(node, np.uint8)])[0])
        files.finish()
    finally:
        files.close()
    location.write_bytes(MANIFEST, encode_manifest(root, height))


@paused_gc()
def _entries(location: Location, directory: str) -> dict[bytes, Entry]:
    """What the database of one process holds, by key, with places below the common one."""
    part, base, found = location.child(directory), f"{directory}/", {}
    for key, value in OcdbtValues(part).entries().items():
        assert isinstance(value, Extent | bytes)  # which is all that a database gives
        found[key] = Entry(key, Place(base, *value) if isinstance(value, Extent) else value)
    return found
