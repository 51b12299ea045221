"""Storage backends and places: what an author of one needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit._lazy import lazy_names

if TYPE_CHECKING:
    from ckptkit.grid import ArraySpec as ArraySpec
    from ckptkit.grid import Chunk as Chunk
    from ckptkit.grid import Index as Index
    from ckptkit.grid import chunk_count as chunk_count
    from ckptkit.grid import chunk_indices as chunk_indices
    from ckptkit.grid import whole as whole
    from ckptkit.location import FileLocation as FileLocation
    from ckptkit.location import Location as Location
    from ckptkit.location import LocationPath as LocationPath
    from ckptkit.location import MarkerLocation as MarkerLocation
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
            "KvStoreLocation": "ckptkit.storage.kvstore",
            "Location": "ckptkit.location",
            "LocationPath": "ckptkit.location",
            "MarkerLocation": "ckptkit.location",
            "Reader": "ckptkit.storage.base",
            "StorageBackend": "ckptkit.storage.base",
            "Writer": "ckptkit.storage.base",
            "chunk_count": "ckptkit.grid",
            "chunk_indices": "ckptkit.grid",
            "whole": "ckptkit.grid",
        },
    )
