"""Storage backends: what an author of one needs."""

from ckptkit.storage.base import ArraySpec, Chunk, Index, Reader, StorageBackend, Writer, chunk_count, chunk_indices, whole

__all__ = ["ArraySpec", "Chunk", "Index", "Reader", "StorageBackend", "Writer", "chunk_count", "chunk_indices", "whole"]
