"""What an OCDBT database holds under each key, and where: the B+tree walked once, values read from their files.

Format: https://google.github.io/tensorstore/kvstore/ocdbt. TensorStore decodes the nodes (0.035 s for 20,000 keys);
through its key-value interface the same keys take ten times as long. A database may come from a stranger: its file names
must stay inside the directory, and its offsets and lengths inside the files.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import tensorstore as ts

from ckptkit import errors
from ckptkit.location import Location, mapped_os_errors
from ckptkit.storage._tensorstore import mapped_tensorstore_errors

__all__ = ["MANIFEST", "Extent", "Value", "Values", "key_prefix", "nbytes_of"]

MANIFEST = "manifest.ocdbt"

Bytes = npt.NDArray[np.uint8]

_MAX_BUFFERS_PER_READ = 1024  # IOV_MAX on Linux and macOS


def key_prefix(name: str) -> str:
    """What the keys of an array's document and chunks begin with: its name as a directory, by TensorStore's rule."""
    if name in ("", "/"):
        return ""
    return name if name.endswith("/") else f"{name}/"


class Extent(NamedTuple):
    """A value that lies in a file.

    Attributes:
      path: of the file, below the database's directory.
      offset, nbytes: its place there.
      reference: the same as TensorStore writes it.
    """

    path: str
    offset: int
    nbytes: int
    reference: str


Value = bytes | Extent
"""The value itself where the tree's node holds it, else where it is."""


def nbytes_of(value: Value) -> int:
    """Stored bytes of a value."""
    return value.nbytes if isinstance(value, Extent) else len(value)


class Values:
    """The newest version of the database at a location."""

    def __init__(self, location: Location, base: ts.KvStore, context: ts.Context) -> None:
        self._location = location
        self._base = base
        self._context = context

    def entries(self) -> dict[bytes, Value]:
        """Every key with its value, in the order of keys.

        Raises:
          errors.NotFoundError: there is no database, or a file of it is missing.
          errors.CorruptCheckpointError: a node cannot be decoded, or the tree is none, or a file is shorter than it says.
          errors.FormatError: a file's name leads elsewhere.
        """
        self._check_manifest()
        with mapped_tensorstore_errors(self._location.url):
            values = dict(self._walk(self._root()))
        self._check_files(values.values())
        return values

    def read_into(self, wanted: Iterable[tuple[Value, Bytes]]) -> None:
        """Fills each buffer with the first bytes of its value.

        Raises:
          errors.NotFoundError, errors.StorageError, errors.CorruptCheckpointError: a file is missing, unreadable, too short.
        """
        extents = []
        for value, buffer in wanted:
            if isinstance(value, Extent):
                extents.append((value, buffer))
            else:
                buffer[:] = np.frombuffer(value, np.uint8, buffer.size)
        if self._location.local_path is None:
            self._read_remote(extents)
        else:
            self._read_files(self._location.local_path, extents)

    def read(self, values: Sequence[Value], limit: int = sys.maxsize) -> list[bytes]:
        """Of each value the first `limit` bytes; raises what `read_into` raises."""
        extents = [(v, np.empty(min(limit, v.nbytes), np.uint8)) for v in values if isinstance(v, Extent)]
        self.read_into(extents)
        buffers = (buffer.tobytes() for _, buffer in extents)
        return [next(buffers) if isinstance(value, Extent) else value[:limit] for value in values]

    def _check_manifest(self) -> None:
        """A local manifest is a regular file: TensorStore would wait for ever on a named pipe."""
        if self._location.local_path is not None:
            self._size(self._location.local_path, MANIFEST)
        elif not self._location.exists(MANIFEST):
            raise errors.NotFoundError(errno.ENOENT, f"a required file is missing: {MANIFEST}", self._location.url)

    def _root(self) -> dict[str, Any] | None:
        """The newest version's root, which the manifest lists last; None where that version is empty."""
        manifest = ts.ocdbt.dump(self._base, context=self._context).result()
        if not manifest["versions"]:
            raise errors.CorruptCheckpointError(f"{self._location.url}: {MANIFEST} lists no version of the database.")
        version = manifest["versions"][-1]
        root = version["root"]
        return {"location": root["location"], "height": version["root_height"]} if "location" in root else None

    def _walk(self, root: dict[str, Any] | None) -> Iterator[tuple[bytes, Value]]:
        """Keys and values from left to right. They must ascend, so that no node is walked twice, whatever refers to it."""
        pending = [] if root is None else [(root["location"], root["height"], b"")]
        last = None
        while pending:
            reference, height, prefix = pending.pop()
            entries = self._node(reference, height)
            if height:
                below = [(e["location"], height - 1, prefix + e["subtree_common_prefix"]) for e in entries]
                pending.extend(reversed(below))
                continue
            for entry in entries:
                key = prefix + entry["key"]
                if last is not None and key <= last:
                    raise self._not_a_tree(f"key {key!r} after {last!r}")
                last = key
                yield key, entry["inline_value"] if "inline_value" in entry else _extent(entry["indirect_value"])

    def _node(self, reference: str, height: int) -> list[dict[str, Any]]:
        """The entries of a node, of which there is at least one."""
        extent = _extent(reference)
        if self._location.local_path is not None:
            self._check_end(extent.path, extent.offset + extent.nbytes)
        node = ts.ocdbt.dump(self._base, reference, context=self._context).result()
        entries: list[dict[str, Any]] = node["entries"]
        if node["height"] != height or not entries:
            raise self._not_a_tree(f"a node of height {node['height']} with {len(entries)} entries, expected height {height}")
        return entries

    def _not_a_tree(self, found: str) -> errors.CorruptCheckpointError:
        return errors.CorruptCheckpointError(f"{self._location.url}: the database's B+tree is damaged: {found}.")

    def _check_files(self, values: Iterable[Value]) -> None:
        """Every value lies inside its file, so that no length is believed that the disk does not hold."""
        if self._location.local_path is None:
            return
        ends: dict[str, int] = {}
        for value in values:
            if isinstance(value, Extent):
                ends[value.path] = max(ends.get(value.path, 0), value.offset + value.nbytes)
        for path, end in ends.items():
            self._check_end(path, end)

    def _check_end(self, path: str, end: int) -> None:
        size = self._size(self._location.local_path or "", path)
        if end > size:
            raise _too_short(os.path.join(self._location.url, path), size, end)

    def _size(self, directory: str, path: str) -> int:
        """Bytes of a regular file that lies in the directory, links resolved."""
        full = os.path.join(directory, path)
        if not os.path.realpath(full).startswith(os.path.realpath(directory) + os.sep):
            raise errors.FormatError(f"{directory}: the database refers to {path!r}, which lies outside the directory.")
        with mapped_os_errors(full, "read"):
            status = os.stat(full)
        if not stat.S_ISREG(status.st_mode):
            raise errors.FormatError(f"{full}: expected a regular file.")
        return status.st_size

    def _read_remote(self, wanted: Sequence[tuple[Extent, Bytes]]) -> None:
        with mapped_tensorstore_errors(self._location.url):
            reads = [ts.ocdbt.dump(self._base, extent.reference, context=self._context) for extent, _ in wanted]
            for (_, buffer), read in zip(wanted, reads, strict=True):
                buffer[:] = np.frombuffer(read.result(), np.uint8, buffer.size)

    def _read_files(self, directory: str, wanted: Sequence[tuple[Extent, Bytes]]) -> None:
        by_path: dict[str, list[tuple[int, Bytes]]] = {}
        for extent, buffer in wanted:
            by_path.setdefault(extent.path, []).append((extent.offset, buffer))
        for path, places in by_path.items():
            full = os.path.join(directory, path)
            with mapped_os_errors(full, "read"), open(full, "rb", buffering=0) as file:
                for offset, buffers in _runs(sorted(places, key=lambda place: place[0])):
                    _preadv(file.fileno(), buffers, offset, full)


def _extent(reference: str) -> Extent:
    """Parses `kind:base:path:offset:nbytes`, both names percent-encoded, which TensorStore has written."""
    _, base, path, offset, nbytes = reference.split(":")
    return Extent(unquote(base + path) if "%" in reference else base + path, int(offset), int(nbytes), reference)


def _runs(places: Sequence[tuple[int, Bytes]]) -> Iterator[tuple[int, list[Bytes]]]:
    """Buffers whose places in the file follow on each other, together: 10,000 reads of 1 KB become 10."""
    run: list[Bytes] = []
    start = end = -1
    for offset, buffer in places:
        if offset != end or len(run) == _MAX_BUFFERS_PER_READ:
            if run:
                yield start, run
            run, start, end = [], offset, offset
        run.append(buffer)
        end += buffer.size
    if run:
        yield start, run


def _preadv(descriptor: int, buffers: list[Bytes], offset: int, path: str) -> None:
    """Fills the buffers from `offset` on; the kernel may stop early, and does at 2 GiB."""
    first = 0
    while first < len(buffers):
        count = os.preadv(descriptor, cast("list[Any]", buffers[first:]), offset)
        if count == 0:
            raise _too_short(path, offset, offset + sum(buffer.size for buffer in buffers[first:]))
        offset += count
        while first < len(buffers) and count >= buffers[first].size:
            count -= buffers[first].size
            first += 1
        if count:
            buffers[first] = buffers[first][count:]


def _too_short(path: str, size: int, end: int) -> errors.CorruptCheckpointError:
    return errors.CorruptCheckpointError(
        f"{path}: the file ends at byte {size}, the database needs {end}: it was cut off; restore another checkpoint."
    )
