"""Storage backends and places: what an author of one needs."""

from ckptkit.grid import fit_chunk_shape
from ckptkit.location import Location
from ckptkit.processes import Job
from ckptkit.storage.base import ArraySpec, Chunk, Index, Reader, StorageBackend, Writer, chunk_count, chunk_indices, whole

__all__ = [
    "ArraySpec",
    "Chunk",
    "Index",
    "Job",
    "Location",
    "Reader",
    "StorageBackend",
    "Writer",
    "chunk_count",
    "chunk_indices",
    "fit_chunk_shape",
    "whole",
]
