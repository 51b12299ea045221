"""What keys and paths of an OCDBT node take once each is whole: in the node, each lacks what it shares with the one before it.

Format: https://google.github.io/tensorstore/kvstore/ocdbt, section "Storage format". Only the columns of lengths are read
(0.2 ms for 10,000 keys). TensorStore decompresses them: its key-value store over a zip file returns the first bytes of an entry
without those that follow, and takes zstd (method 93 of https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import numpy as np
import tensorstore as ts

from ckptkit.storage._expansion import NODE_HEADER_NBYTES, PLAIN, node_nbytes

__all__ = ["names_nbytes"]

_NODE: Final = b"\x0c\xdb\x20\xde"
_MANIFEST: Final = b"\x0c\xdb\x3a\x2a"
_CHECKSUM_NBYTES: Final = 4
_MAX_VARINT_NBYTES: Final = 10
_QUOTED_NBYTES: Final = 3  # what a byte of a path may take in a reference
_MAX_VERSION_HEIGHT: Final = 64
_MAX_ZIP_NBYTES: Final = (1 << 32) - 2
_GUESS_NBYTES: Final = 16 << 10  # decompressed at first where the size is not known


def names_nbytes(data: bytes, base_nbytes: int = 0) -> int:
    """An upper bound of the bytes of all keys, and of all references to files, in an OCDBT node or manifest.

    Args:
      data: may be decompressed here to as many bytes as `node_nbytes` tells.
      base_nbytes: of the path before all paths in it.

    Raises:
      ValueError: it ends too early, or has no such columns.
    """
    if data[:4] == _NODE:
        return _node_names_nbytes(_Body(data), base_nbytes)
    return _manifest_names_nbytes(_Body(data)) if data[:4] == _MANIFEST else 0  # TensorStore refuses what is neither


def _node_names_nbytes(body: _Body, base_nbytes: int) -> int:
    is_interior = body.take(1) > b"\0"
    paths, longest = _paths(body)
    (count,) = body.varints(1)
    keys = sum(body.varints(max(0, count - 1))) + sum(body.varints(count))
    keys *= 1 + is_interior  # what a subtree has in common is a part of its first key
    return paths + keys + count * _QUOTED_NBYTES * (base_nbytes + longest)


def _manifest_names_nbytes(body: _Body) -> int:
    body.take(16)  # the UUID
    kind, _, _ = body.varints(3)  # limits of values in nodes, and of nodes
    if kind:
        return 0  # the versions are in other files
    body.take(1)  # arity of the version tree
    if body.varints(1)[0]:
        body.take(4)  # level of compression
    paths, longest = _paths(body)
    (count,) = body.varints(1)
    return paths + (count + _MAX_VERSION_HEIGHT) * _QUOTED_NBYTES * longest


def _paths(body: _Body) -> tuple[int, int]:
    """Bytes of all paths in the table of files, and an upper bound of those of the longest; skips the table."""
    (count,) = body.varints(1)
    shared, rest, _ = body.varints(max(0, count - 1)), body.varints(count), body.varints(count)
    body.skip(sum(rest))
    return sum(shared) + sum(rest), max(shared, default=0) + max(rest, default=0)


class _Body:
    """What is between header and checksum, decompressed as far as it is asked for."""

    def __init__(self, data: bytes) -> None:
        self._is_plain = data[NODE_HEADER_NBYTES - 2 : NODE_HEADER_NBYTES] == PLAIN
        self._packed = b"" if self._is_plain else data[NODE_HEADER_NBYTES:-_CHECKSUM_NBYTES]
        self._held = data if self._is_plain else b""
        self._at = NODE_HEADER_NBYTES if self._is_plain else 0
        self._end = len(data) - _CHECKSUM_NBYTES if self._is_plain else min(node_nbytes(data), _MAX_ZIP_NBYTES)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start = self._at
        self.skip(count)
        if self._at > len(self._held):
            self._held = self._unpacked(self._at)
        return self._held[start : self._at]

    def skip(self, count: int) -> None:
        self._at += count
        if self._at > self._end:
            raise ValueError(f"{self._at} bytes are needed, there are {self._end} at most")

    def varints(self, count: int) -> Sequence[int]:
        """The next numbers: seven bits a byte, the lowest first; all bytes of a number but the last have the highest bit set."""
        data = self.take(count)
        if data.isascii():
            return data
        rest = data
        while missing := int(np.count_nonzero(np.frombuffer(rest, np.uint8) > 0x7F)):
            rest = self.take(missing)
            data += rest
        return _numbers(np.frombuffer(data, np.uint8))

    def _unpacked(self, nbytes: int) -> bytes:
        """So many bytes at least, and more where there seem to be more, since each call begins anew."""
        for guess in (_content_nbytes(self._packed), max(_GUESS_NBYTES, 2 * nbytes)):
            if nbytes <= guess <= self._end:
                try:
                    return _first(self._packed, guess)
                except ValueError:
                    pass  # it holds less
        return _first(self._packed, nbytes)


def _numbers(data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> list[int]:
    ends = np.flatnonzero(data < 0x80)
    sizes = np.diff(ends, prepend=-1)
    if sizes.max() > _MAX_VARINT_NBYTES:
        raise ValueError(f"a number of {sizes.max()} bytes")
    starts = ends - sizes + 1
    shifts = 7 * (np.arange(data.size) - np.repeat(starts, sizes)).astype(np.uint64)
    numbers: list[int] = np.add.reduceat((data & 0x7F).astype(np.uint64) << shifts, starts).tolist()
    return numbers


def _content_nbytes(frame: bytes) -> int:
    """What the header of a zstd frame says it decodes to; 0 where it does not."""
    descriptor = frame[4] if len(frame) > 4 else 0
    single_segment = descriptor >> 5 & 1
    size = (single_segment, 2, 4, 8)[descriptor >> 6]
    at = 6 - single_segment + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(frame[at : at + size], "little") + (256 if size == 2 else 0)


def _first(frame: bytes, nbytes: int) -> bytes:
    """The first so many bytes that a zstd frame decodes to.

    Raises:
      ValueError: there are fewer, or it is damaged.
    """
    zstd, name = 93, b"f"
    both = struct.pack("<HHHHHIIIHH", 20, 0, zstd, 0, 0x21, 0, len(frame), nbytes, len(name), 0)  # 1980-01-01, no checksum
    local = struct.pack("<I", 0x04034B50) + both + name + frame
    central = struct.pack("<IH", 0x02014B50, 20) + both + bytes(14) + name
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1, 1, len(central), len(local), 0)
    context = ts.Context()
    ts.KvStore.open("memory://", context=context).result().write("zip", local + central + end).result()
    archive = ts.KvStore.open({"driver": "zip", "base": "memory://zip"}, context=context).result()
    found = archive.read(name).result()
    if found.state != "value":
        raise ValueError(f"{len(frame)} bytes do not decode to {nbytes}")
    return bytes(found.value)
