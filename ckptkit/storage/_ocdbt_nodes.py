"""The tree of an OCDBT database as bytes: B+tree nodes over keys and where their values lie, and the manifest over them.

Format: https://google.github.io/tensorstore/kvstore/ocdbt, section "Storage format". A database here is written once, so it
has one version and no version tree. TensorStore encodes the manifest; it has no call that encodes a node.
"""

from __future__ import annotations

import itertools
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import quote

import google_crc32c
import numpy as np
import tensorstore as ts

__all__ = ["MANIFEST", "MAX_INLINE_NBYTES", "Entry", "Node", "Place", "encode_manifest", "encode_tree"]

MANIFEST: Final = "manifest.ocdbt"

MAX_INLINE_NBYTES: Final = 255
"""Values up to this size lie in the nodes."""

_MAGIC: Final = 0x0CDB20DE
_UNCOMPRESSED: Final = b"\0\0"  # version of the format, compression
_MAX_NODE_NBYTES: Final = 8_000_000
_NUMBERS_NBYTES: Final = 16  # what an entry takes beside key and value

_Item = TypeVar("_Item")


class Place(NamedTuple):
    """Bytes in a data file.

    Attributes:
      base, path: together name the file below the database's directory; what the file refers to lies in `base` too.
      offset, nbytes: where they are in it.
    """

    base: str
    path: str
    offset: int
    nbytes: int


class Entry(NamedTuple):
    """A key and its value: the bytes themselves, or where they lie.

    Attributes:
      group, shared: entries of one group have the first `shared` bytes of their keys in common.
    """

    key: bytes
    value: bytes | Place
    group: int = -1
    shared: int = 0


class Node(NamedTuple):
    """A node that has been stored.

    Attributes:
      key: the first one below it.
      place: of the node's bytes.
      key_count, tree_nbytes, value_nbytes: what is below it: keys, bytes of nodes with its own, bytes of values not in nodes.
    """

    key: bytes
    place: Place
    key_count: int
    tree_nbytes: int
    value_nbytes: int


def encode_tree(entries: Iterable[Entry], store: Callable[[bytes], Place]) -> tuple[Node | None, int]:
    """Stores nodes over all entries; the root, or None where there is no entry, and the root's height.

    Args:
      entries: in any order; their keys differ.
      store: puts the bytes of a node into a data file.
    """
    ordered = sorted(entries)
    inline = [len(entry.value) if isinstance(entry.value, bytes) else 0 for entry in ordered]
    sizes = [len(entry.key) + nbytes + _NUMBERS_NBYTES for entry, nbytes in zip(ordered, inline, strict=True)]
    nodes = [_leaf(part, store) for part in _parts(ordered, sizes)]
    height = 0
    while len(nodes) > 1:
        height += 1
        sizes = [len(node.key) + 2 * _NUMBERS_NBYTES for node in nodes]
        nodes = [_interior(part, height, store) for part in _parts(nodes, sizes)]
    return (nodes[0] if nodes else None), height


def encode_manifest(root: Node | None, height: int) -> bytes:
    """The manifest of a database whose one version has this root."""
    counts = (root.key_count, root.tree_nbytes, root.value_nbytes) if root else (0, 0, 0)
    statistics = dict(zip(("num_keys", "num_tree_bytes", "num_indirect_value_bytes"), counts, strict=True))
    node: dict[str, Any] = {"statistics": statistics}
    if root:
        base, path, offset, nbytes = root.place
        node["location"] = f"btreenode:{quote(base, safe='/')}:{quote(path, safe='/')}:{offset}:{nbytes}"
    config = {
        "uuid": secrets.token_hex(16),
        "max_inline_value_bytes": MAX_INLINE_NBYTES,
        "max_decoded_node_bytes": _MAX_NODE_NBYTES,
        "version_tree_arity_log2": 4,
        "compression": None,
    }
    version = {"generation_number": 1, "commit_time": time.time_ns(), "root_height": height, "root": node}
    return bytes(ts.ocdbt.undump_manifest({"config": config, "version_tree_nodes": [], "versions": [version]}))


def _parts(items: Sequence[_Item], sizes: Iterable[int]) -> Iterator[Sequence[_Item]]:
    """The items node by node; two at least in each but the last, so that a level has fewer nodes than the one below."""
    start = total = 0
    for end, size in enumerate(sizes):
        if total >= _MAX_NODE_NBYTES and end - start > 1:
            yield items[start:end]
            start, total = end, 0
        total += size
    if start < len(items):
        yield items[start:]


def _leaf(entries: Sequence[Entry], store: Callable[[bytes], Place]) -> Node:
    values = [entry.value for entry in entries]
    places = [value for value in values if isinstance(value, Place)]
    inline = [value for value in values if isinstance(value, bytes)]
    shared = [b.shared if a.group == b.group else 0 for a, b in itertools.pairwise(entries)]
    sizes = [value.nbytes if isinstance(value, Place) else len(value) for value in values]
    kinds = bytes([isinstance(value, Place) for value in values])
    files, file_ids = _files(places)
    body = [
        *(b"\0", files, _varints([len(entries)])),
        *_keys([entry.key for entry in entries], shared),
        *(_varints(sizes), kinds, file_ids, _varints([place.offset for place in places]), b"".join(inline)),
    ]
    return _stored(entries[0].key, body, store, len(entries), 0, sum([place.nbytes for place in places]))


def _interior(nodes: Sequence[Node], height: int, store: Callable[[bytes], Place]) -> Node:
    places = [node.place for node in nodes]
    files, file_ids = _files(places)
    lengths, suffixes = _keys([node.key for node in nodes], [0] * (len(nodes) - 1))
    nothing_in_common = bytes(len(nodes))  # nodes below keep whole keys
    counts = [_varints(column) for column in zip(*[node[2:] for node in nodes], strict=True)]
    body = [
        *(bytes([height]), files, _varints([len(nodes)]), lengths, nothing_in_common, suffixes, file_ids),
        *(_varints([place.offset for place in places]), _varints([place.nbytes for place in places]), *counts),
    ]
    below = [sum(column) for column in zip(*[node[2:] for node in nodes], strict=True)]
    return _stored(nodes[0].key, body, store, *below)


def _stored(
    key: bytes, body: Sequence[bytes], store: Callable[[bytes], Place], key_count: int, tree_nbytes: int, value_nbytes: int
) -> Node:
    """Puts header and checksum around a node's body, and stores it."""
    content = _UNCOMPRESSED + b"".join(body)
    data = struct.pack(">I", _MAGIC) + struct.pack("<Q", 4 + 8 + len(content) + 4) + content
    data += struct.pack("<I", google_crc32c.value(data))
    return Node(key, store(data), key_count, tree_nbytes + len(data), value_nbytes)


def _files(places: Sequence[Place]) -> tuple[bytes, bytes]:
    """The table of the files in which the places lie, and for each place the number of its file."""
    numbers: dict[tuple[str, str], int] = {}
    ids = _varints([numbers.setdefault((base, path), len(numbers)) for base, path, _, _ in places])
    names = [(base.encode(), path.encode()) for base, path in numbers]
    count = len(names)
    table = [
        *(_varints([count]), bytes(max(0, count - 1))),  # no name is written as what it shares with the one before it
        *(_varints([len(base) + len(path) for base, path in names]), _varints([len(base) for base, _ in names])),
        *(base + path for base, path in names),
    ]
    return b"".join(table), ids


def _keys(keys: Sequence[bytes], shared: Sequence[int]) -> tuple[bytes, bytes]:
    """The lengths of keys, and the keys, each without the bytes that it shares with the one before it."""
    starts = [0, *shared]
    suffixes = [key[start:] for key, start in zip(keys, starts, strict=True)]
    return _varints(shared) + _varints([len(suffix) for suffix in suffixes]), b"".join(suffixes)


def _varints(numbers: Sequence[int]) -> bytes:
    """Seven bits a byte, the lowest first; all bytes of a number but the last have the highest bit set."""
    largest = max(numbers, default=0)
    if largest <= 0x7F:
        return bytes(numbers)
    rests = np.array(numbers, np.uint64)[:, np.newaxis] >> np.arange(0, largest.bit_length(), 7, dtype=np.uint64)
    digits = (rests & 0x7F | (rests > 0x7F) * np.uint64(0x80)).astype(np.uint8)
    rests[:, 0] = 1  # zero has a byte too
    return digits[rests > 0].tobytes()
