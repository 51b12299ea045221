"""The manifest and the B+tree nodes of an OCDBT database, read from their bytes: the mirror of `_ocdbt_nodes`.

Format: https://google.github.io/tensorstore/kvstore/ocdbt, section "Storage format". What a few bytes stand
for, compressed or as names that share what they begin with, is counted before memory is taken for it; whoever calls says when
that is too much.
"""

from __future__ import annotations

import itertools
import operator
import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import google_crc32c
import numpy as np
import zstandard

from ckptkit.storage._values import Extent

__all__ = ["DecodedNode", "Expand", "Manifest", "Subtree", "decode_manifest", "decode_node"]

_MANIFEST: Final = b"\x0c\xdb\x3a\x2a"
_NODE: Final = b"\x0c\xdb\x20\xde"
_HEADER_NBYTES: Final = 14  # a magic number, the length, the version of the format, the compression
_CHECKSUM_NBYTES: Final = 4
_PLAIN: Final = b"\0\0"  # version and compression
_ZSTD: Final = b"\0\1"

# TensorStore neither writes nor reads more.
_MAX_ENTRIES: Final = 1 << 20
_MAX_NAME_NBYTES: Final = 0xFFFF
_MAX_INLINE_NBYTES: Final = 1 << 20
_MAX_ARITY_LOG2: Final = 16
_ZSTD_LEVELS: Final = range(-(1 << 17), 23)

_MAX_NUMBER: Final = (1 << 63) - 1
_NOWHERE: Final = (1 << 64) - 1  # offset and length of the root of an empty version
_BITS: Final = 7  # of a number in each byte
_MORE: Final = 0x80  # set in all bytes of a number but the last
_MAX_SHIFT: Final = 9 * _BITS
_LAST_BYTES: Final = bytes(range(_MORE))
_FEW_NBYTES: Final = 200  # below which numpy takes longer than a loop
_STEP_NBYTES: Final = 1 << 16
_PATH_NBYTES: Final = 200  # what a path takes in memory beside its bytes

Expand = Callable[[int], None]
"""Is told of bytes that are about to be taken in memory, and raises where they are too many."""


class Subtree(NamedTuple):
    """A reference to a node.

    Attributes:
      extent: of the node's bytes.
      base: what the paths in the node lie below: bytes that the path of its own file begins with.
      height: of the node; leaves have 0.
      prefix: what all keys below begin with, which the node leaves out.
      first: no key below is less.
    """

    extent: Extent
    base: bytes
    height: int
    prefix: bytes = b""
    first: bytes = b""


class Manifest(NamedTuple):
    """What a manifest says of the newest version.

    Attributes:
      config: of the database, the same in all its manifests.
      is_numbered: versions are in other manifests, those with a number.
      generation: number of the newest version.
      root: its root; None where it is empty, or in another manifest.
    """

    config: tuple[bytes | int, ...]
    is_numbered: bool
    generation: int
    root: Subtree | None


class DecodedNode(NamedTuple):
    """The keys of a node, which ascend, with a value for each, or in a node of a height above 0 a subtree."""

    height: int
    keys: list[bytes]
    values: list[bytes | Extent]
    subtrees: list[Subtree]


def decode_manifest(data: bytes, expand: Expand) -> Manifest:
    """What a manifest says of the newest version.

    Raises:
      ValueError: it is damaged.
    """
    body = _Body(_content(data, _MANIFEST, expand))
    uuid = body.take(16)
    (is_numbered,) = body.flags(1)
    limits = body.below(2, 1 << 32)  # of values in nodes, and of nodes
    (arity_log2,) = body.take(1)
    if not 0 < arity_log2 <= _MAX_ARITY_LOG2:
        raise ValueError(f"a version tree of arity 2**{arity_log2}")
    (is_zstd,) = body.below(1, 2)
    (level,) = struct.unpack("<i", body.take(4)) if is_zstd else (0,)
    if level not in _ZSTD_LEVELS:
        raise ValueError(f"a level of compression {level}, which zstd does not have")
    generation, root = (0, None) if is_numbered else _versions(body, arity_log2, expand)
    body.end()
    return Manifest((uuid, *limits, arity_log2, is_zstd, level), bool(is_numbered), generation, root)


def decode_node(data: bytes, base: bytes, prefix: bytes, expand: Expand) -> DecodedNode:
    """What a node holds.

    Args:
      data: its bytes, with header and checksum.
      base: what all paths in it begin with.
      prefix: what all keys in it begin with.
      expand: is told of what is about to be decompressed and built.

    Raises:
      ValueError: it is damaged.
    """
    body = _Body(_content(data, _NODE, expand))
    (height,) = body.take(1)
    files = _files(body, base, expand)
    count = body.count(_MAX_ENTRIES)
    if not count:
        raise ValueError("a node without entries")
    shared, rest = (0, *body.varints(count - 1)), body.varints(count)
    common = body.varints(count) if height else ()
    _check_names(shared, rest, _MAX_NAME_NBYTES)
    names_nbytes = sum(shared) + sum(rest) + count * len(prefix)
    expand(2 * names_nbytes if height else names_nbytes)  # a subtree's prefix is a part of its first key
    keys = _names(body, shared, rest, prefix)
    if not all(map(operator.lt, keys, itertools.islice(keys, 1, None))):
        raise ValueError("keys that do not ascend")
    values = [] if height else _values(body, files, count)
    subtrees = _subtrees(body, files, height - 1, keys, common, len(prefix)) if height else []
    body.end()
    return DecodedNode(height, keys, values, subtrees)


def _versions(body: _Body, arity_log2: int, expand: Expand) -> tuple[int, Subtree | None]:
    """The generation and the root of the newest version, which is the last."""
    files = _files(body, b"", expand)
    count = body.count(1 << arity_log2)
    generations = body.varints(count)
    heights = body.take(count)
    ids = body.below(count, len(files))
    offsets, sizes = (body.varints(count, _NOWHERE) for _ in range(2))
    statistics = [*zip(*[body.varints(count, _NOWHERE) for _ in range(3)], strict=True)]
    times = body.times(count)
    _check_ascending([0, *generations])
    _check_ascending(times)
    if not count or generations[0] <= (generations[-1] - 1) >> arity_log2 << arity_log2:
        raise ValueError(f"{count} versions, in one node of up to {1 << arity_log2}")
    is_empty = [offset == size == _NOWHERE for offset, size in zip(offsets, sizes, strict=True)]
    for i in range(count):
        if is_empty[i] and (heights[i] or any(statistics[i])):
            raise ValueError("an empty version with nodes")
        if not is_empty[i] and max(offsets[i], sizes[i]) > _MAX_NUMBER:
            raise ValueError(f"a root of {sizes[i]} bytes at byte {offsets[i]}")
    _skip_version_nodes(body, len(files), arity_log2, generations[-1], times[0])
    path, base = files[ids[-1]]
    root = None if is_empty[-1] else Subtree(Extent(path, offsets[-1], sizes[-1]), base, heights[-1])
    return generations[-1], root


def _skip_version_nodes(body: _Body, file_count: int, arity_log2: int, newest: int, end_time: int) -> None:
    """Reads the references to older versions, each of which has a place that the generation of the newest leaves for it."""
    count = body.count(63 // arity_log2)
    generations = body.varints(count)
    body.below(count, file_count)
    body.varints(count)  # offsets
    body.varints(count)  # lengths
    version_counts = body.varints(count)
    _check_ascending([-1, *body.times(count), end_time] if count else [])
    rooms = {}
    height, end = 0, (newest - 1) >> arity_log2 << arity_log2
    while end:
        height += 1
        begin = (end - 1) >> (height + 1) * arity_log2 << (height + 1) * arity_log2
        rooms[height], end = range(begin + 1, end + 1), begin
    for height, generation, versions in zip(body.take(count), generations, version_counts, strict=True):
        room = rooms.pop(height, range(0))
        if generation not in room or not 0 < versions <= generation - room.start + 1:
            raise ValueError(f"a node of height {height} for {versions} versions up to {generation}, of {newest}")


def _check_ascending(numbers: Sequence[int]) -> None:
    if not all(a < b for a, b in itertools.pairwise(numbers)):
        raise ValueError("generations or times that do not ascend")


def _subtrees(
    body: _Body, files: _Files, height: int, keys: list[bytes], common: Sequence[int], prefix_nbytes: int
) -> list[Subtree]:
    count = len(keys)
    ids, offsets, sizes = body.below(count, len(files)), body.varints(count), body.varints(count)
    for _ in range(3):  # keys, bytes of nodes, bytes of values
        body.varints(count)
    found = []
    for key, nbytes, file, offset, size in zip(keys, common, ids, offsets, sizes, strict=True):
        if prefix_nbytes + nbytes > len(key):
            raise ValueError(f"keys that have {nbytes} bytes in common, of {len(key) - prefix_nbytes}")
        path, base = files[file]
        found.append(Subtree(Extent(path, offset, size), base, height, key[: prefix_nbytes + nbytes], key))
    return found


def _values(body: _Body, files: _Files, count: int) -> list[bytes | Extent]:
    sizes = body.varints(count)
    kinds = body.flags(count)  # 1: in a file
    stored = sum(kinds)
    ids, offsets = body.below(stored, len(files)), body.varints(stored)
    places = map(Extent, [files[i][0] for i in ids], offsets, itertools.compress(sizes, kinds))
    if stored == count:
        return list(places)
    inline = [size for size, kind in zip(sizes, kinds, strict=True) if not kind]
    if max(inline) > _MAX_INLINE_NBYTES:
        raise ValueError(f"a value of {max(inline)} bytes in a node")
    data = body.take(sum(inline))
    ends = itertools.accumulate(inline)
    parts = (data[end - size : end] for end, size in zip(ends, inline, strict=True))
    return [next(places) if kind else next(parts) for kind in kinds]


_Files = list[tuple[str, bytes]]  # the path, and what paths lie below in a node that the file holds


def _files(body: _Body, base: bytes, expand: Expand) -> _Files:
    """The table of files."""
    count = body.count(_MAX_ENTRIES)
    if not count:
        return []
    shared, rest, bases = (0, *body.varints(count - 1)), body.varints(count), body.varints(count)
    _check_names(shared, rest, _MAX_NAME_NBYTES - len(base))
    expand(2 * (sum(shared) + sum(rest)) + count * (len(base) + _PATH_NBYTES))
    found = []
    before = 0
    for path, same, nbytes in zip(_names(body, shared, rest, base), shared, bases, strict=True):
        if nbytes > len(path) - len(base) or (same > min(before, nbytes) and before != nbytes):
            raise ValueError(f"a path of {len(path)} bytes, of which {nbytes} are the base")
        found.append((path.decode(), path[: len(base) + nbytes]))
        before = nbytes
    return found


def _check_names(shared: Sequence[int], rest: Sequence[int], most: int) -> None:
    """Each name shares no more with the one before it than that has, and has no more than `most` bytes."""
    sizes = [*map(operator.add, shared, rest)]
    if max(sizes) > most or any(map(operator.gt, itertools.islice(shared, 1, None), sizes)):
        raise ValueError("names that are too long, or share more with the one before than it has")


def _names(body: _Body, shared: Sequence[int], rest: Sequence[int], prefix: bytes) -> list[bytes]:
    """Names that begin with the prefix, and with what they share with the one before, from the bytes that follow on that."""
    data = body.take(sum(rest))
    skipped = len(prefix)
    name = prefix
    names = []
    start = 0
    for same, size in zip(shared, rest, strict=True):
        end = start + size
        name = name[: skipped + same] + data[start:end]
        start = end
        names.append(name)
    return names


def _content(data: bytes, magic: bytes, expand: Expand) -> bytes:
    """What is between header and checksum, decompressed."""
    if len(data) < _HEADER_NBYTES + _CHECKSUM_NBYTES or data[:4] != magic:
        raise ValueError(f"it begins with {data[:4].hex()!r}, expected {magic.hex()!r}")
    if (length := int.from_bytes(data[4:12], "little")) != len(data):
        raise ValueError(f"it has {len(data)} bytes, and its header says {length}")
    end = len(data) - _CHECKSUM_NBYTES
    if google_crc32c.value(data[:end]) != int.from_bytes(data[end:], "little"):
        raise ValueError("its checksum is wrong")
    packed, method = data[_HEADER_NBYTES:end], data[_HEADER_NBYTES - 2 : _HEADER_NBYTES]
    if method == _PLAIN:
        expand(len(packed))
        return packed
    if method == _ZSTD:
        return _decompressed(packed, expand)
    raise ValueError(f"version and compression {method.hex()!r}, expected {_PLAIN.hex()!r} or {_ZSTD.hex()!r}")


def _decompressed(packed: bytes, expand: Expand) -> bytes:
    """What the one frame holds, decompressed twice: into a small buffer first, since only that tells how much it is."""
    try:
        frames = zstandard.ZstdDecompressor()
        with frames.stream_reader(packed) as stream:
            buffer = bytearray(_STEP_NBYTES)
            while count := stream.readinto(buffer):
                expand(count)
        frame = frames.decompressobj()
        content: bytes = frame.decompress(packed)
    except zstandard.ZstdError as error:
        raise ValueError(f"it cannot be decompressed: {error}") from error
    if not frame.eof or frame.unused_data:
        raise ValueError("it is not one whole frame")
    return content


class _Body:
    """Columns of numbers and of bytes, read one after the other."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        begin = self._at
        self._at += count
        if self._at > len(self._content):
            raise ValueError(f"it ends at byte {len(self._content)}, {self._at} are needed")
        return self._content[begin : self._at]

    def end(self) -> None:
        """Refuses a body of which something is left."""
        if self._at != len(self._content):
            raise ValueError(f"it has {len(self._content)} bytes, of which {self._at} are needed")

    def flags(self, count: int) -> bytes:
        """The next bytes, which are 0 or 1."""
        data = self.take(count)
        if max(data, default=0) > 1:
            raise ValueError(f"a kind {max(data)}, expected 0 or 1")
        return data

    def count(self, most: int) -> int:
        """The next number, which is no larger than `most`."""
        (number,) = self.below(1, most + 1)
        return number

    def below(self, count: int, end: int) -> Sequence[int]:
        """The next numbers, all less than `end`."""
        numbers = self.varints(count)
        if (largest := max(numbers, default=-1)) >= end:
            raise ValueError(f"a number {largest}, expected one below {end}")
        return numbers

    def times(self, count: int) -> Sequence[int]:
        """The next times, in nanoseconds."""
        return struct.unpack(f"<{count}Q", self.take(8 * count))

    def varints(self, count: int, most: int = _MAX_NUMBER) -> Sequence[int]:
        """The next numbers, none larger than `most`: seven bits a byte, the lowest first, in no more bytes than it takes."""
        data = rest = self.take(count)
        if data.isascii():
            return data
        while missing := len(rest.translate(None, _LAST_BYTES)):
            rest = self.take(missing)
            data += rest
        return _many_numbers(data) if len(data) > _FEW_NBYTES and most == _MAX_NUMBER else _few_numbers(data, most)


def _few_numbers(data: bytes, most: int) -> list[int]:
    numbers = []
    number = shift = 0
    for byte in data:
        number |= (byte & ~_MORE) << shift
        if number > most or shift > _MAX_SHIFT or (shift and not byte):
            raise ValueError(f"a number above {most}, or of too many bytes")
        if byte & _MORE:
            shift += _BITS
        else:
            numbers.append(number)
            number = shift = 0
    return numbers


def _many_numbers(data: bytes) -> list[int]:
    digits = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(digits < _MORE)
    sizes = np.diff(ends, prepend=-1)
    if _BITS * sizes.max() > _MAX_NUMBER.bit_length() or sizes[digits[ends] == 0].max(initial=1) > 1:
        raise ValueError(f"a number above {_MAX_NUMBER}, or of too many bytes")
    starts = ends - sizes + 1
    shifts = _BITS * (np.arange(digits.size) - np.repeat(starts, sizes)).astype(np.uint64)
    numbers: list[int] = np.add.reduceat((digits & ~np.uint8(_MORE)).astype(np.uint64) << shifts, starts).tolist()
    return numbers
