"""The default storage backend: zarr chunks in an OCDBT database, in the layout that Orbax reads and writes.

The database lies in the directory itself (`manifest.ocdbt`, `d/`). An array named `a.b` has its document under the key
`a.b/.zarray` and its chunks under `a.b/0.0` and so on (zarr 3: `a.b/zarr.json`, `a.b/c/0/0`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptkit.location import Location
from ckptkit.options import StorageOptions
from ckptkit.processes import Job
from ckptkit.storage._chunk_reader import ChunkReader
from ckptkit.storage._ocdbt_merge import PartWriter, merge
from ckptkit.storage._ocdbt_nodes import MANIFEST
from ckptkit.storage._ocdbt_values import OcdbtValues
from ckptkit.storage._ocdbt_writer import OcdbtWriter
from ckptkit.storage._values import key_prefix
from ckptkit.storage.base import ArraySpec, ManyWriters, Reader, Writer
from ckptkit.storage.zarr_documents import refusal

__all__ = ["OcdbtBackend"]


class OcdbtBackend(ManyWriters):
    """Arrays as chunks in one OCDBT database per directory."""

    name = "ocdbt"

    def refuse(self, arrays: Sequence[ArraySpec]) -> Sequence[str | None]:
        return [refusal(array) for array in arrays]

    def refuse_names(self, names: Sequence[str]) -> Sequence[str | None]:
        text = "\n".join(["", *names, ""])  # with which most trees are seen through at once
        if "/\n" not in text and "\n\n" not in text and _is_encodable(text):
            return [None] * len(names)
        owners: dict[str, str] = {}
        return [_name_refusal(name, owners) for name in names]

    def writer(self, location: Location, arrays: Sequence[ArraySpec], options: StorageOptions, job: Job) -> Writer:
        return PartWriter(location, arrays, options, job) if job.others else OcdbtWriter(location, arrays, options)

    def merge(self, location: Location, processes: Iterable[int]) -> Iterable[str]:
        return merge(location, processes)

    def reader(self, location: Location) -> Reader:
        return ChunkReader(location, OcdbtValues(location))

    def data_directories(self, names: Iterable[str]) -> Iterable[str]:
        return ("d",)  # values of chunks and documents, and nodes, which have checksums of their own

    def recognises(self, location: Location) -> bool:
        return location.exists(MANIFEST)


def _name_refusal(name: str, owners: dict[str, str]) -> str | None:
    """Why the name cannot be stored beside the `owners` of key prefixes, which it joins; None where it can."""
    if not _is_encodable(name):
        return f"the name {name!r} holds a lone surrogate, which UTF-8 cannot encode: rename it."
    owner = owners.setdefault(key_prefix(name), name)
    return None if owner == name else f"the names {owner!r} and {name!r} have the same keys in the database: rename one."


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
