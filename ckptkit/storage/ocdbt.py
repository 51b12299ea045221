"""The default storage backend: zarr chunks in an OCDBT database, in the layout that Orbax reads and writes.

The database lies in the directory itself (`manifest.ocdbt`, `d/`). An array named `a.b` has its document under the key
`a.b/.zarray` and its chunks under `a.b/0.0` and so on (zarr 3: `a.b/zarr.json`, `a.b/c/0/0`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorstore as ts

from ckptkit.location import Location
from ckptkit.options import StorageOptions
from ckptkit.processes import Job
from ckptkit.storage._chunk_reader import ChunkReader
from ckptkit.storage._ocdbt_values import MANIFEST, OcdbtValues
from ckptkit.storage._ocdbt_writer import OcdbtWriter
from ckptkit.storage._tensorstore import mapped_tensorstore_errors, writing_error
from ckptkit.storage._values import key_prefix
from ckptkit.storage.base import ArraySpec, Reader, StorageBackend, Writer
from ckptkit.storage.zarr_documents import refusal

__all__ = ["OcdbtBackend"]

# Every commit rewrites the nodes that it touches, with the values that lie in them.
_CONFIG = {"max_inline_value_bytes": 255, "max_decoded_node_bytes": 8_000_000, "manifest_kind": "single"}


class OcdbtBackend(StorageBackend):
    """Arrays as chunks in one OCDBT database per directory."""

    name = "ocdbt"

    def refuse(self, arrays: Sequence[ArraySpec]) -> Sequence[str | None]:
        owners: dict[str, str] = {}
        return [refusal(array) or _name_refusal(array.name, owners) for array in arrays]

    def writer(self, location: Location, arrays: Sequence[ArraySpec], options: StorageOptions, job: Job) -> Writer:
        spec: dict[str, Any] = {
            "driver": "ocdbt",
            "base": location.kvstore(),
            "config": _CONFIG,
        }
        if options.target_data_file_size is not None:
            spec["target_data_file_size"] = options.target_data_file_size
        # Whoever commits the checkpoint syncs its files once; otherwise each transaction waits for the disk.
        context = ts.Context({"file_io_sync": False})
        try:
            store = ts.KvStore.open(spec, context=context).result()
        except Exception as error:
            raise writing_error(error, location.url) from error
        return OcdbtWriter(location, store, context, arrays, options)

    def reader(self, location: Location) -> Reader:
        context = ts.Context()
        with mapped_tensorstore_errors(location.url):
            base = ts.KvStore.open(location.kvstore(), context=context).result()
        return ChunkReader(location, OcdbtValues(location, base, context))

    def data_directories(self, names: Iterable[str]) -> Iterable[str]:
        return ("d",)  # values of chunks and documents, and nodes, whose checksums TensorStore verifies

    def recognises(self, location: Location) -> bool:
        return location.exists(MANIFEST)


def _name_refusal(name: str, owners: dict[str, str]) -> str | None:
    """Why the name cannot be stored beside the `owners` of key prefixes, which it joins; None where it can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"the name {name!r} holds a lone surrogate, which UTF-8 cannot encode: rename it."
    owner = owners.setdefault(key_prefix(name), name)
    return None if owner == name else f"the names {owner!r} and {name!r} have the same keys in the database: rename one."
