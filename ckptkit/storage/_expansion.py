"""How large stored bytes become when they are decompressed, from their headers: what a few bytes may stand for is known first.

TensorStore stops where a chunk of zstd, gzip or bzip2 holds more than its cell, but allocates what the header of a blosc chunk
asks for. Format: README_CHUNK_FORMAT of https://github.com/Blosc/c-blosc.
"""

from __future__ import annotations

__all__ = ["blosc_nbytes"]


def blosc_nbytes(data: bytes) -> int:
    """Bytes that a blosc chunk says it decodes to."""
    return int.from_bytes(data[4:8], "little")
