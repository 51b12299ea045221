"""Storage backends and places: what an author of one needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit._lazy import lazy_names

if TYPE_CHECKING:
    from ckptkit._threads import Workers as Workers
    from ckptkit.file_list import saved_names as saved_names
    from ckptkit.grid import ArraySpec as ArraySpec
    from ckptkit.grid import Chunk as Chunk
    from ckptkit.grid import Index as Index
    from ckptkit.grid import chunk_count as chunk_count
    from ckptkit.grid import chunk_indices as chunk_indices
    from ckptkit.grid import fit_chunk_shape as fit_chunk_shape
    from ckptkit.grid import whole as whole
    from ckptkit.location import FileLocation as FileLocation
    from ckptkit.location import Location as Location
    from ckptkit.location import LocationPath as LocationPath
    from ckptkit.location import MarkerLocation as MarkerLocation
    from ckptkit.location import mapped_os_errors as mapped_os_errors
    from ckptkit.processes import Job as Job
    from ckptkit.storage._futures import Pending as Pending
    from ckptkit.storage._futures import joined as joined
    from ckptkit.storage.base import ManyWriters as ManyWriters
    from ckptkit.storage.base import PartialReader as PartialReader
    from ckptkit.storage.base import Reader as Reader
    from ckptkit.storage.base import StorageBackend as StorageBackend
    from ckptkit.storage.base import Writer as Writer
    from ckptkit.storage.kvstore import KvStoreLocation as KvStoreLocation
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "ArraySpec": "ckptkit.grid",
            "Chunk": "ckptkit.grid",
            "FileLocation": "ckptkit.location",
            "Index": "ckptkit.grid",
            "Job": "ckptkit.processes",
            "KvStoreLocation": "ckptkit.storage.kvstore",
            "Location": "ckptkit.location",
            "LocationPath": "ckptkit.location",
            "ManyWriters": "ckptkit.storage.base",
            "MarkerLocation": "ckptkit.location",
            "PartialReader": "ckptkit.storage.base",
            "Pending": "ckptkit.storage._futures",
            "Reader": "ckptkit.storage.base",
            "StorageBackend": "ckptkit.storage.base",
            "Workers": "ckptkit._threads",
            "Writer": "ckptkit.storage.base",
            "chunk_count": "ckptkit.grid",
            "chunk_indices": "ckptkit.grid",
            "fit_chunk_shape": "ckptkit.grid",
            "joined": "ckptkit.storage._futures",
            "mapped_os_errors": "ckptkit.location",
            "saved_names": "ckptkit.file_list",
            "whole": "ckptkit.grid",
        },
    )
