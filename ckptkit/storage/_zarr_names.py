"""Which names of arrays can be directories, beside each other and beside the other files of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from ckptkit.file_list import FILE_LIST
from ckptkit.index import INDEX_FILE
from ckptkit.metadata.arrays import ARRAYS_DIRECTORY, STRINGS_FILE
from ckptkit.metadata.json import encodable
from ckptkit.metadata.sharding import SHARDING_FILE
from ckptkit.metadata.step import STEP_FILE
from ckptkit.metadata.tree import TREE_FILE

__all__ = ["name_refusals"]

_MAX_PART_NBYTES: Final = 255
"""What Linux, macOS and Windows allow in one name."""

# Compared in lower case, since a file system may not tell the cases apart.
_TAKEN: Final = {
    name.lower()
    for name in (
        *(FILE_LIST, INDEX_FILE, SHARDING_FILE, STEP_FILE, STRINGS_FILE, TREE_FILE, ARRAYS_DIRECTORY),
        *("ckptkit_writer.txt", "commit_success.txt", "manifest.ocdbt", "orbax.checkpoint"),
    )
}

_CHUNK: Final = re.compile(r"\.zarray|\.zattrs|\.zgroup|zarr\.json|c|[0-9.]+")
"""What lies in an array's own directory: its documents and chunks in either version of zarr."""

_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f\\\ufffe\uffff]")
"""Control characters and what else XML, in which object stores list names, cannot hold, and the backslash, by which Windows and
some of those stores divide names: such an array would not be found again, there or after a copy.
"""

_RULE: Final = "without OCDBT it becomes a directory: rename it, or save with OCDBT, where any name will do."


def name_refusals(names: Sequence[str]) -> list[str | None]:
    """For each name the reason why no directory can have it among the others, or None."""
    owners: dict[str, str] = {}
    for name in names:
        owners.setdefault(name.rstrip("/"), name)
    return [_refusal(name) or _clash(name, owners) for name in names]


def _refusal(name: str) -> str | None:
    parts = name.removesuffix("/").split("/")
    if not encodable(name) or _UNSAFE.search(name):
        return f"the name {name!a} holds a character that a name of a file cannot hold everywhere; {_RULE}"
    if any(part in ("", ".", "..") for part in parts):
        return f"the name {name!r} has a part that is empty, '.' or '..'; {_RULE}"
    if parts[0].lower() in _TAKEN:
        return f"the name {name!r} is that of another file of a checkpoint; {_RULE}"
    if any(part.endswith(".__lock") for part in parts):
        return f"the name {name!r} has a part that ends in '.__lock', as the locks of TensorStore do; {_RULE}"
    if any(len(part.encode()) > _MAX_PART_NBYTES for part in parts):
        return f"the name {name[:40]!r}... has a part of more than {_MAX_PART_NBYTES} bytes; {_RULE}"
    return None


def _clash(name: str, owners: dict[str, str]) -> str | None:
    """Why the directory of this name would be, or lie among the files of, that of another one."""
    path = name.removesuffix("/")
    if owners[name.rstrip("/")] != name:
        return f"the names {owners[path]!r} and {name!r} are one directory; {_RULE}"
    above = [i for i, c in enumerate(path) if c == "/"]
    for i in above:
        part = path[i + 1 :].partition("/")[0]
        if path[:i] in owners and _CHUNK.fullmatch(part.lower()):
            return f"{path[: i + 1 + len(part)]!r} may be a chunk of the array {owners[path[:i]]!r}; {_RULE}"
    return None
