"""Storage backends and places: what an author of one needs."""

from ckptkit._threads import Workers
from ckptkit.grid import fit_chunk_shape
from ckptkit.location import Location, mapped_os_errors
from ckptkit.processes import Job
from ckptkit.storage._futures import joined
from ckptkit.storage.base import (
    ArraySpec,
    Chunk,
    Index,
    ManyWriters,
    PartialReader,
    Reader,
    StorageBackend,
    Writer,
    chunk_count,
    chunk_indices,
    whole,
)

__all__ = [
    "ArraySpec",
    "Chunk",
    "Index",
    "Job",
    "Location",
    "ManyWriters",
    "PartialReader",
    "Reader",
    "StorageBackend",
    "Workers",
    "Writer",
    "chunk_count",
    "chunk_indices",
    "fit_chunk_shape",
    "joined",
    "mapped_os_errors",
    "whole",
]
