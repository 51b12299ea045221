"""How large stored bytes become when they are decompressed, from their headers: what a few bytes may stand for is known first.

TensorStore stops where a chunk of zstd, gzip or bzip2 holds more than its cell, but allocates what the header of a blosc chunk
asks for, and reads a node of a database whole, however large it gets. Formats: RFC 8878 (zstd), README_CHUNK_FORMAT of
https://github.com/Blosc/c-blosc, https://google.github.io/tensorstore/kvstore/ocdbt (nodes and the manifest).
"""

from __future__ import annotations

from typing import Final

__all__ = ["NODE_HEADER_NBYTES", "PLAIN", "ZSTD", "blosc_nbytes", "node_nbytes"]

NODE_HEADER_NBYTES: Final = 14
"""A magic number, the length, the version of the format, the compression."""

PLAIN: Final = b"\0\0"
ZSTD: Final = b"\0\1"
"""The last two as writers have them; readers take longer numbers too."""

_BLOCK_NBYTES: Final = 128 << 10  # what one zstd block decodes to at most
_FRAME_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_RAW, _RUN, _COMPRESSED = range(3)


def blosc_nbytes(data: bytes) -> int:
    """Bytes that a blosc chunk says it decodes to."""
    return int.from_bytes(data[4:8], "little")


def node_nbytes(data: bytes) -> int:
    """An upper bound of the bytes that an OCDBT node or manifest decompresses to before a decoder ends or refuses it.

    Raises:
      ValueError: its version or compression is not known, or so written that a decoder may read another one.
    """
    method = data[NODE_HEADER_NBYTES - 2 : NODE_HEADER_NBYTES]
    if method not in (PLAIN, ZSTD):
        raise ValueError(f"version and compression {method.hex()!r}, expected {PLAIN.hex()!r} or {ZSTD.hex()!r}")
    return _zstd_nbytes(data[NODE_HEADER_NBYTES:]) if method == ZSTD else len(data)


def _zstd_nbytes(data: bytes) -> int:
    """An upper bound of what frames, one after another, decode to up to the first that is none."""
    total = at = 0
    while data[at : at + 4] == _FRAME_MAGIC or data[at + 1 : at + 4] == b"\x2a\x4d\x18":
        if data[at : at + 4] == _FRAME_MAGIC:
            at, nbytes = _frame(data, at + 4)
            total += nbytes
        else:  # to be skipped
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
    return total


def _frame(data: bytes, at: int) -> tuple[int, int]:
    """Where the frame ends whose magic number ends at `at`, and an upper bound of what it decodes to."""
    descriptor = data[at] if at < len(data) else 0
    single_segment = descriptor >> 5 & 1
    content_size_nbytes = (single_segment, 2, 4, 8)[descriptor >> 6]
    at += 1 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size_nbytes
    total = last = 0
    while not last and at + 3 <= len(data):
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        total += _BLOCK_NBYTES if kind == _COMPRESSED else min(size, _BLOCK_NBYTES)
        at += 3 + (1 if kind == _RUN else size)
    return at + (4 if descriptor >> 2 & 1 else 0), total
