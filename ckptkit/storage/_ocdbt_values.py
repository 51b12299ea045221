"""What an OCDBT database holds under each key, and where: the B+tree walked once, values read from their files.

Format: https://google.github.io/tensorstore/kvstore/ocdbt. TensorStore decodes the nodes (0.035 s for 20,000 keys);
through its key-value interface the same keys take ten times as long. A database may come from a stranger: its file names
must stay inside the directory, its offsets and lengths inside the files, no byte of them belongs to two nodes, and what nodes
expand to, and what all values take, stays within bounds: nodes are read here, and TensorStore decodes the copy in memory that
was checked. Places that are no local directory are read by byte ranges (`_remote_values`).
"""

from __future__ import annotations

import bisect
import functools
import os
import re
import stat
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote

import numpy as np
import tensorstore as ts

from ckptkit import errors
from ckptkit.location import Location, checked_parts, mapped_os_errors
from ckptkit.storage._expansion import node_nbytes
from ckptkit.storage._ocdbt_columns import names_nbytes
from ckptkit.storage._ocdbt_nodes import MANIFEST
from ckptkit.storage._remote_values import check_ends, read_ranges
from ckptkit.storage._tensorstore import mapped_tensorstore_errors
from ckptkit.storage._values import Bytes, Extent, Filled, Value, Values, cut_off, places_of, read_files

__all__ = ["OcdbtValues"]

# What all nodes may decode to, and what values may take beyond the files that they lie in, since keys may share one (as arrays
# share a document): Orbax writes nodes of 100 MB, which zeros compress well, but many leaves take many bytes.
_MAX_DECODED_NBYTES: Final = 256 << 20
_MAX_RATIO: Final = 64

# Keys may be this many, and one more for each byte that the nodes take on the disk, since each takes hundreds in memory.
_MAX_KEYS: Final = 1 << 20

# The newest manifest has the highest number where the one without a number says only that there are such: by itself TensorStore
# then finds none. To list a directory first would take as long as all else that a small database needs.
_NUMBERED: Final = re.compile(rb"manifest\.[0-9a-f]{16}")


class OcdbtValues(Values):
    """The newest version of the database at a location."""

    def __init__(self, location: Location, base: ts.KvStore) -> None:
        self._location = location
        self._directory = location.local_path
        self._base = base
        self._begin()

    def _begin(self) -> None:
        self._stored_nbytes = self._decoded_nbytes = 0  # of the nodes read so far
        self._nodes: dict[Hashable, list[tuple[int, int]]] = {}  # where they begin and end, by file, in order

    def entries(self) -> dict[bytes, Value]:
        self._begin()
        with mapped_tensorstore_errors(self._location.url):
            values = dict(self._walk(self._root()))
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

    def _root(self) -> dict[str, Any] | None:
        """The newest version's root, which the manifest lists last; None where that version is empty."""
        manifest = self._manifest()
        if not manifest["versions"]:
            raise errors.CorruptCheckpointError(f"{self._location.url}: {MANIFEST} lists no version of the database.")
        version = manifest["versions"][-1]
        root = version["root"]
        return {"location": root["location"], "height": version["root_height"]} if "location" in root else None

    def _manifest(self) -> dict[str, Any]:
        files = {MANIFEST: self._location.read_bytes(MANIFEST, _MAX_DECODED_NBYTES)}
        try:
            return self._decoded(files)
        except ValueError as error:
            if not str(error).startswith("NOT_FOUND:"):
                raise
        listed = self._base.list(ts.KvStore.KeyRange("manifest.0", "manifest.g")).result()
        for name in sorted(key.decode() for key in listed if _NUMBERED.fullmatch(key))[-1:]:
            files[name] = self._location.read_bytes(name, _MAX_DECODED_NBYTES)
        return self._decoded(files)

    def _walk(self, root: dict[str, Any] | None) -> Iterator[tuple[bytes, Value]]:
        """Keys and values from left to right, which must ascend. TensorStore shares nodes between versions, never within one."""
        pending = [] if root is None else [(root["location"], root["height"], b"")]
        last = None
        count = 0
        while pending:
            reference, height, prefix = pending.pop()
            entries = self._node(reference, height)
            count += len(entries)
            if count > _MAX_KEYS + self._stored_nbytes:
                raise self._not_a_tree(f"{count} keys in {self._stored_nbytes} bytes")
            self._expand(len(prefix) * len(entries))
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
        if extent.nbytes > _MAX_DECODED_NBYTES:
            raise self._not_a_tree(f"{extent.path!r} has a node of {extent.nbytes} bytes, more than any writer makes")
        end = extent.offset + extent.nbytes
        self._take(self._check_end(extent.path, end), extent.offset, end)
        kind, base, path, _, nbytes = reference.split(":")
        files = dict(zip([extent.path], self.read([extent]), strict=True))
        node = self._decoded(files, f"{kind}:{base}:{path}:0:{nbytes}", len(base))
        entries: list[dict[str, Any]] = node["entries"]
        if node["height"] != height or not entries:
            raise self._not_a_tree(f"a node of height {node['height']} with {len(entries)} entries, expected height {height}")
        return entries

    def _take(self, file: Hashable, begin: int, end: int) -> None:
        """Refuses a node that has bytes in common with another: each is read once, and all take no more than the files."""
        taken = self._nodes.setdefault(file, [])
        at = bisect.bisect(taken, (begin, end))
        if (at and taken[at - 1][1] > begin) or (at < len(taken) and taken[at][0] < end):
            raise self._not_a_tree(f"two references lead to one node, or to nodes that overlap, at byte {begin}")
        taken.insert(at, (begin, end))

    def _decoded(self, files: Mapping[str, bytes], reference: str | None = None, base_nbytes: int = 0) -> dict[str, Any]:
        """The manifest, or the node at `reference`, in these files, unless it takes more memory than it should.

        All paths in it are found below one of `base_nbytes`.
        """
        context = ts.Context()
        memory = ts.KvStore.open("memory://", context=context).result()
        for path, data in files.items():
            self._stored_nbytes += len(data)
            try:
                self._expand(node_nbytes(data))
                self._expand(names_nbytes(data, base_nbytes))
            except errors.CheckpointError:
                raise
            except ValueError as error:
                raise self._not_a_tree(f"{path!r} cannot be decoded: {error}") from error
            memory.write(path, data).result()
        decoded: dict[str, Any] = ts.ocdbt.dump(memory, reference, context=context).result()
        return decoded

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
        if "\0" in path or not os.path.realpath(full).startswith(os.path.realpath(self._directory) + os.sep):
            raise errors.FormatError(f"{self._directory}: the database refers to {path!r}, which lies outside the directory.")
        with mapped_os_errors(full, "read"):
            status = os.stat(full)
        if not stat.S_ISREG(status.st_mode):
            raise errors.FormatError(f"{full}: expected a regular file.")
        if status.st_size < end:
            raise cut_off(full, status.st_size, end)
        return status.st_dev, status.st_ino


def _extent(reference: str) -> Extent:
    """Parses `kind:base:path:offset:nbytes`, both names percent-encoded, which TensorStore has written."""
    file, offset, nbytes = reference.rsplit(":", 2)
    return Extent(_path(file), int(offset), int(nbytes))


@functools.lru_cache(maxsize=8)
def _path(file: str) -> str:
    """The path in `kind:base:path`; the values of a database lie in few files."""
    _, base, path = file.split(":")
    return unquote(base + path)
