"""What an OCDBT database holds under each key, and where: the B+tree walked once, values read from their files.

Nodes are decoded in `_ocdbt_decoding`; through TensorStore's key-value interface 20,000 keys take ten times as long. A database
may come from a stranger: its file names must stay inside the directory, its offsets and lengths inside the files, no byte of
them belongs to two nodes, and what nodes expand to, and what all values take, stays within bounds. Places that are no local
directory are read by byte ranges (`_remote_values`).
"""

from __future__ import annotations

import bisect
import errno
import os
import re
import stat
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final, TypeVar

import numpy as np
import tensorstore as ts

from ckptkit import errors
from ckptkit.location import Location, checked_parts, mapped_os_errors
from ckptkit.storage._ocdbt_decoding import DecodedNode, Manifest, Subtree, decode_manifest, decode_node
from ckptkit.storage._ocdbt_nodes import MANIFEST
from ckptkit.storage._remote_values import check_ends, read_ranges
from ckptkit.storage._tensorstore import context_for, mapped_tensorstore_errors
from ckptkit.storage._values import Bytes, Extent, Filled, Value, Values, cut_off, places_of, read_files

__all__ = ["OcdbtValues"]

# What all nodes may decode to, and what values may take beyond the files that they lie in, since keys may share one (as arrays
# share a document): Orbax writes nodes of 100 MB, which zeros compress well, but many leaves take many bytes.
_MAX_DECODED_NBYTES: Final = 256 << 20
_MAX_RATIO: Final = 64

# Keys may be this many, and one more for each byte that the nodes take on the disk, since each takes hundreds in memory.
_MAX_KEYS: Final = 1 << 20

# The newest manifest has the highest number where the one without a number says only that there are such.
_NUMBERED: Final = re.compile(r"manifest\.[0-9a-f]{16}")

_Decoded = TypeVar("_Decoded")


class OcdbtValues(Values):
    """The newest version of the database at a location."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._directory = location.local_path
        if self._directory is None:
            with mapped_tensorstore_errors(location.url):
                self._base = ts.KvStore.open(location.kvstore(), context=context_for(location)).result()
        self._begin()

    def _begin(self) -> None:
        self._stored_nbytes = self._decoded_nbytes = 0  # of the nodes read so far
        self._statuses: dict[str, os.stat_result] = {}  # of the files that are regular and lie in the directory
        self._nodes: dict[Hashable, list[tuple[int, int]]] = {}  # where they begin and end, by file, in order

    def entries(self) -> dict[bytes, Value]:
        self._begin()
        values = self._walk(self._root())
        self._check_files(values.values())
        return values

    def read_into(self, wanted: Sequence[tuple[Value, Bytes]], filled: Filled = lambda _: None) -> None:
        for i, (value, buffer) in enumerate(wanted):
            if isinstance(value, bytes):
                buffer[:] = np.frombuffer(value, np.uint8, buffer.size)
                filled(i)
        if self._directory is None:
            read_ranges(self._base, self._location.url, places_of(wanted), filled)
        else:
            read_files(self._directory, places_of(wanted), filled)

    def _root(self) -> Subtree | None:
        """The newest version's root; None where that version is empty."""
        first = self._manifest(MANIFEST)
        if not first.is_numbered:
            return first.root
        files = [name for name, is_directory in self._location.names().items() if not is_directory]
        numbered = max(filter(_NUMBERED.fullmatch, files), default=None)
        if numbered is None:
            raise errors.NotFoundError(errno.ENOENT, "cannot read: no numbered manifest", f"{self._location.url}/{MANIFEST}")
        newest = self._manifest(numbered)
        if newest.config != first.config or f"manifest.{newest.generation:016x}" != numbered:
            raise self._not_a_tree(f"{numbered!r} is no manifest of this database, or of another version")
        return newest.root

    def _manifest(self, name: str) -> Manifest:
        data = self._location.read_bytes(name, _MAX_DECODED_NBYTES)
        return self._decoded(name, data, lambda: decode_manifest(data, self._expand))

    def _walk(self, root: Subtree | None) -> dict[bytes, Value]:
        """Keys and values from left to right, which must ascend. TensorStore shares nodes between versions, never within one."""
        pending = [] if root is None else [root]
        found: dict[bytes, Value] = {}
        last = None
        count = 0
        while pending:
            place = pending.pop()
            node = self._node(place)
            count += len(node.keys)
            if count > _MAX_KEYS + self._stored_nbytes:
                raise self._not_a_tree(f"{count} keys in {self._stored_nbytes} bytes")
            if node.keys[0] < place.first:
                raise self._not_a_tree(f"key {node.keys[0]!r} in a node of keys from {place.first!r} on")
            if node.height:
                pending.extend(reversed(node.subtrees))
                continue
            if last is not None and node.keys[0] <= last:
                raise self._not_a_tree(f"key {node.keys[0]!r} after {last!r}")
            last = node.keys[-1]
            found.update(zip(node.keys, node.values, strict=True))
        return found

    def _node(self, place: Subtree) -> DecodedNode:
        extent = place.extent
        if extent.nbytes > _MAX_DECODED_NBYTES:
            raise self._not_a_tree(f"{extent.path!r} has a node of {extent.nbytes} bytes, more than any writer makes")
        end = extent.offset + extent.nbytes
        self._take(self._check_end(extent.path, end), extent.offset, end)
        (data,) = self.read([extent])
        node = self._decoded(extent.path, data, lambda: decode_node(data, place.base, place.prefix, self._expand))
        if node.height != place.height:
            raise self._not_a_tree(f"a node of height {node.height}, expected height {place.height}")
        return node

    def _take(self, file: Hashable, begin: int, end: int) -> None:
        """Refuses a node that has bytes in common with another: each is read once, and all take no more than the files."""
        taken = self._nodes.setdefault(file, [])
        at = bisect.bisect(taken, (begin, end))
        if (at and taken[at - 1][1] > begin) or (at < len(taken) and taken[at][0] < end):
            raise self._not_a_tree(f"two references lead to one node, or to nodes that overlap, at byte {begin}")
        taken.insert(at, (begin, end))

    def _decoded(self, path: str, data: bytes, decode: Callable[[], _Decoded]) -> _Decoded:
        """What `decode` makes of the bytes of a file, unless that takes more memory than it should."""
        self._stored_nbytes += len(data)
        try:
            return decode()
        except errors.CheckpointError:
            raise
        except ValueError as error:
            raise self._not_a_tree(f"{path!r} cannot be decoded: {error}") from error

    def _expand(self, nbytes: int) -> None:
        """Counts what is about to be decoded."""
        self._decoded_nbytes += nbytes
        if self._decoded_nbytes > _MAX_DECODED_NBYTES + _MAX_RATIO * self._stored_nbytes:
            raise self._not_a_tree(f"{self._stored_nbytes} bytes of nodes stand for {self._decoded_nbytes}")

    def _not_a_tree(self, found: str) -> errors.CorruptCheckpointError:
        return errors.CorruptCheckpointError(f"{self._location.url}: the database's B+tree is damaged: {found}.")

    def _check_files(self, values: Iterable[Value]) -> None:
        """Every value lies inside its file, so that no length is believed that the disk does not hold, nor one too often."""
        ends: dict[str, int] = {}
        referred = 0
        for value in values:
            if isinstance(value, Extent):
                ends[value.path] = max(ends.get(value.path, 0), value.offset + value.nbytes)
                referred += value.nbytes
        files: dict[Hashable, int] = {}
        for path, end in ends.items():
            file = self._check_end(path, end)
            files[file] = max(files.get(file, 0), end)
        if self._directory is None:
            check_ends(self._base, self._location.url, ends)
        held = sum(files.values())
        if referred > held + _MAX_DECODED_NBYTES + _MAX_RATIO * self._stored_nbytes:
            raise self._not_a_tree(f"keys refer to {referred} bytes, of which the files hold {held}")

    def _check_end(self, path: str, end: int) -> Hashable:
        """What tells the file from others, which lies in the directory.

        A local one is regular, since reading a named pipe never ends, long enough, and the same by whatever path or link.
        """
        if self._directory is None:
            checked_parts(path, self._location.url)
            return path
        full = os.path.join(self._directory, path)
        status = self._statuses.get(path) or self._status(full, path)
        if status.st_size < end:
            raise cut_off(full, status.st_size, end)
        return status.st_dev, status.st_ino

    def _status(self, full: str, path: str) -> os.stat_result:
        directory = os.path.realpath(str(self._directory))
        if "\0" in path or not os.path.realpath(full).startswith(directory + os.sep):
            raise errors.FormatError(f"{directory}: the database refers to {path!r}, which lies outside the directory.")
        with mapped_os_errors(full, "read"):
            status = os.stat(full)
        if not stat.S_ISREG(status.st_mode):
            raise errors.FormatError(f"{full}: expected a regular file.")
        self._statuses[path] = status
        return status
