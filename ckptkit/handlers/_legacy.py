"""What older releases of Orbax left out of `_METADATA`, or had instead of it.

Up to 0.4 every tree had a msgpack file `checkpoint` that held its structure, values saved with `SaveArgs(aggregate=True)`,
and for each leaf kept elsewhere the text `PLACEHOLDER://` and its name. Where there is neither, the structure is in the names
of the arrays: their keys, joined with '.'.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np

from ckptkit import errors
from ckptkit.grid import Array, ArraySpec, Index
from ckptkit.location import Location, mapped_os_errors
from ckptkit.metadata.arrays import STRINGS_FILE
from ckptkit.metadata.json import expect, load
from ckptkit.metadata.msgpack import AGGREGATE_FILE, decode_aggregate
from ckptkit.metadata.tree import DICT, SEQUENCE, Entry, Key, TreeDocument
from ckptkit.storage.base import Reader

__all__ = ["Aggregate", "ArraysReader", "document_of_names", "read_aggregate"]

# Each leaf takes a kilobyte and its path, however few bytes it has in the file; a real file has thousands of leaves.
_MAX_LEAVES: Final = 1 << 18
_MAX_PATHS_NBYTES: Final = 1 << 26

_PREFIXES = ("PLACEHOLDER://", "AGGREGATED://")  # the second is the first's older spelling

Path = tuple[str, ...]


class Aggregate(NamedTuple):
    """The content of the file.

    Attributes:
      document: the tree, with the kinds of leaves that can be told from the file.
      arrays: the numbers in it, by the name that `array_name` gives the leaf.
      strings: the texts in it, by path.
      elsewhere: names of the arrays of leaves that are kept elsewhere, by path.
    """

    document: TreeDocument
    arrays: dict[str, Array]
    strings: dict[Path, str]
    elsewhere: dict[Path, str]

    @staticmethod
    def array_name(path: Path) -> str:
        """Unlike the name of the leaf, another one for every path."""
        return str(path)


def read_aggregate(location: Location, file: str = AGGREGATE_FILE) -> Aggregate | None:
    """What the msgpack file says; None where there is no such file (a directory of that name is an array's).

    Raises:
      errors.FormatError: it is malformed, or holds values that are no leaves, or more leaves than any release wrote.
    """
    if location.names().get(file, True):
        return None
    where = f"{location.url}/{file}"
    tree = decode_aggregate(_whole_file(location, file, where), where)
    texts = _texts(location)
    aggregate = Aggregate(TreeDocument(entries=[], use_ocdbt=None), {}, {}, {})
    leaves = list(islice(_leaves(tree, ()), _MAX_LEAVES + 1))
    paths_nbytes = sum([len(key.name) for keys, _ in leaves for key in keys])
    if len(leaves) > _MAX_LEAVES or paths_nbytes > _MAX_PATHS_NBYTES:
        most = f"{_MAX_LEAVES} leaves, or {_MAX_PATHS_NBYTES} bytes of paths"
        raise errors.FormatError(f"{where}: more than {most}: the file is damaged or not to be trusted.")
    entries = [_entry(keys, value, aggregate, texts, where) for keys, value in leaves]
    return aggregate._replace(document=TreeDocument(entries=entries, use_ocdbt=None))


def _whole_file(location: Location, file: str, where: str) -> bytes:
    """The bytes of the file, which may be larger than others that are read at once, since arrays are in it."""
    if location.local_path is None:
        return location.read_bytes(file)
    with mapped_os_errors(where, "read"):
        size = os.path.getsize(os.path.join(location.local_path, file))
    return location.read_bytes(file, limit=size)


def _texts(location: Location) -> dict[str, str]:
    """The str leaves by name, from their file: here, or as 0.3 had it, in the folder that the first would have as an array."""
    texts: dict[str, str] = {}
    for folder in [location, *(location.child(name) for name, is_directory in location.names().items() if is_directory)]:
        if folder.exists(STRINGS_FILE):
            where = f"{folder.url}/{STRINGS_FILE}"
            found = expect(load(folder.read_bytes(STRINGS_FILE), where), dict, "the document", where)
            texts |= {key: expect(text, str, f"the str leaf {key!r}", where) for key, text in found.items()}
    return texts


def _leaves(node: Any, keys: tuple[Key, ...]) -> Iterator[tuple[tuple[Key, ...], Any]]:
    """The leaves and empty nodes below a node, as deep as the file was decoded."""
    if isinstance(node, dict) and node:
        for name, child in node.items():
            yield from _leaves(child, (*keys, Key(name, DICT)))
    elif isinstance(node, (list, tuple)) and node:
        for i, child in enumerate(node):
            yield from _leaves(child, (*keys, Key(str(i), SEQUENCE)))
    else:
        yield keys, node


_EMPTY: dict[type, str] = {type(None): "None", dict: "Dict", list: "List", tuple: "Tuple"}


def _entry(keys: tuple[Key, ...], value: Any, aggregate: Aggregate, texts: Mapping[str, str], where: str) -> Entry:
    """The entry of a leaf or an empty node; what is known of the leaf goes into `aggregate`."""
    path = tuple([key.name for key in keys])
    if type(value) in _EMPTY:
        return Entry(keys, _EMPTY[type(value)], skip=True)
    if isinstance(value, str):
        prefix = next(filter(value.startswith, _PREFIXES), None)
        name = value.removeprefix(prefix or "")
        if prefix is not None and name not in texts:
            aggregate.elsewhere[path] = name
            return Entry(keys, "np.ndarray")  # the file does not say more
        aggregate.strings[path] = value if prefix is None else texts[name]
        return Entry(keys, "string", skip=True)
    if not isinstance(value, (bool, int, float, complex, np.generic, np.ndarray)):
        raise errors.FormatError(f"{where}: leaf {path} is a {type(value).__name__}, expected a number, an array or a text.")
    aggregate.arrays[aggregate.array_name(path)] = np.asarray(value)
    return Entry(keys, "np.ndarray" if isinstance(value, np.ndarray) else "scalar", skip=True)


def document_of_names(location: Location, keys: Mapping[str, tuple[str, ...]]) -> TreeDocument | None:
    """The tree that the arrays' names tell of by the keys of each; None where they cannot have been written without `_METADATA`.

    A database was written without it only for the one array of `ArrayCheckpointHandler`, and an array below a folder of another
    name belongs to an item of a composite.
    """
    found, names = location.names(), sorted(keys)
    below = any("/" in name and found.get(name.split("/")[0]) for name in names)
    if not names or below or (location.exists("manifest.ocdbt") and (len(names) > 1 or "." in names[0])):
        return None
    entries = [Entry(tuple([Key(key, DICT) for key in keys[name]]), "np.ndarray") for name in names]
    return TreeDocument(entries=entries, use_ocdbt=None)


class ArraysReader(Reader):
    """Arrays in memory, each in one chunk, before those of another reader."""

    def __init__(self, arrays: Mapping[str, Array], rest: Reader) -> None:
        self._values = arrays
        self._rest = rest

    def arrays(self) -> Mapping[str, ArraySpec]:
        cells = {name: tuple([max(1, n) for n in value.shape]) for name, value in self._values.items()}
        own = {name: ArraySpec(name, value.shape, value.dtype, cells[name]) for name, value in self._values.items()}
        rest = self._rest.arrays()
        if taken := [name for name in own if name in rest]:
            raise errors.FormatError(f"an array named {taken[0]!r} stands in the way of a leaf of the file {AGGREGATE_FILE!r}.")
        return ChainMap(own, rest)  # type: ignore[arg-type]  # nobody writes to it

    def read(self, requests: Sequence[tuple[str, Index, Array]]) -> Future[None]:
        for name, _, out in requests:
            if name in self._values:
                np.copyto(out, self._values[name])
        return self._rest.read([request for request in requests if request[0] not in self._values])

    def place(self, name: str, index: Index) -> str:
        return AGGREGATE_FILE if name in self._values else self._rest.place(name, index)

    def close(self) -> None:
        self._rest.close()
