"""`array_metadatas/process_N` and `_strings.json`: what is kept of each jax.Array, and the values of str leaves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ckptkit import errors
from ckptkit.metadata.json import dump, expect, load, malformed, shape_of, unexpected

__all__ = [
    "ARRAYS_DIRECTORY",
    "STRINGS_FILE",
    "ArrayRecord",
    "arrays_file",
    "decode_arrays",
    "decode_strings",
    "encode_arrays",
    "encode_strings",
]

STRINGS_FILE = "_strings.json"
ARRAYS_DIRECTORY = "array_metadatas"


def arrays_file(process_index: int) -> str:
    """Where a process records its arrays, relative to the checkpoint."""
    return f"{ARRAYS_DIRECTORY}/process_{process_index}"


class ArrayRecord(NamedTuple):
    """What a process records of a jax.Array that it wrote.

    Attributes:
      write_shape: shape of the part that one device held.
      chunk_shape: shape of a stored chunk.
      ext_metadata: further JSON; `{"random_key_impl": name}` for a typed PRNG key.
    """

    write_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    ext_metadata: dict[str, Any] | None = None


def encode_arrays(records: Mapping[str, ArrayRecord]) -> bytes:
    """The bytes of `array_metadatas/process_N`, from the arrays' names and records."""
    documents = [
        {"array_metadata": {"param_name": name, "write_shape": write_shape, "chunk_shape": chunk_shape, "ext_metadata": extra}}
        for name, (write_shape, chunk_shape, extra) in records.items()
    ]
    return dump({"array_metadatas": documents})


def decode_arrays(data: bytes, where: str) -> dict[str, ArrayRecord]:
    """The records of the arrays by name.

    Raises:
      errors.FormatError: not the document that `encode_arrays` makes, or one array twice.
    """
    document = expect(load(data, where), dict, "the document", where)
    items = expect(document.get("array_metadatas", []), list, "array_metadatas", where)
    records = dict([_record(item, where) for item in items])
    if len(records) != len(items):
        raise malformed(where, f"{len(items)} records, but only {len(records)} different names")
    return records


def _record(item: Any, where: str) -> tuple[str, ArrayRecord]:
    outer = expect(item, dict, "an element of array_metadatas", where)
    fields = expect(outer.get("array_metadata"), dict, "array_metadata", where)
    name = expect(fields.get("param_name"), str, "param_name", where)
    write_shape = shape_of(fields.get("write_shape"), "write_shape", where)
    chunk_shape = shape_of(fields.get("chunk_shape"), "chunk_shape", where)
    if (extra := fields.get("ext_metadata")) is not None:
        expect(extra, dict, "ext_metadata", where)
    return name, ArrayRecord(write_shape, chunk_shape, extra)


def encode_strings(strings: Mapping[str, str]) -> bytes:
    """The bytes of `_strings.json`, from names and values.

    Orbax addresses a value by the JSON pointer `/<name>` (RFC 6901), so a name with '/' is an object within an object.

    Raises:
      errors.TreeError: two names of which one would have to be both a value and an object, or text that UTF-8 cannot encode.
    """
    document: dict[str, Any] = {}
    for name, value in strings.items():
        *parents, last = _pointer(name)
        node: Any = document
        for step in parents:
            node = node.setdefault(step, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise errors.TreeError(
                f"The str leaf {name!r} cannot be stored beside another str leaf: as JSON pointers, one of their names leads "
                "through the other, or both are the same. Rename one of them."
            )
        node[last] = value
    return dump(document)


def decode_strings(data: bytes, names: Iterable[str], where: str) -> dict[str, str]:
    """The values of the str leaves of these names.

    Raises:
      errors.FormatError: not a JSON object, or no string under one of the names.
    """
    document = expect(load(data, where), dict, "the document", where)
    return {name: _found(document, name, where) for name in names}


def _found(document: dict[str, Any], name: str, where: str) -> str:
    node: Any = document
    for step in _pointer(name):
        node = node.get(step) if isinstance(node, dict) else None
    if not isinstance(node, str):
        raise unexpected(where, f"the str leaf {name!r}", node, "a string")
    return node


def _pointer(name: str) -> list[str]:
    """The reference tokens of the JSON pointer `/<name>`; a name that is no pointer, such as 'a~', is its own only token."""
    if re.search("~(?![01])", name):
        return [name]
    return [token.replace("~1", "/").replace("~0", "~") for token in name.split("/")]
