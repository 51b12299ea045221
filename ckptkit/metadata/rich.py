"""`value_metadata_tree` of `_METADATA`: which containers of a tree were tuples and named tuples, so that they come back as such.

A JSON document within the document: dicts and lists stand for themselves, everything else is an object with a `category`.
"""

from __future__ import annotations

import collections
import functools
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orjson

from ckptkit.metadata.json import dump, expect, load, malformed, unexpected
from ckptkit.metadata.tree import Entry, is_empty_node, key_of, nest

__all__ = ["decode_rich", "encode_rich"]

Path = tuple[str, ...]


def encode_rich(entries: Sequence[Entry], unflatten: Callable[[Sequence[Any]], Any]) -> str:
    """The document for a tree.

    Args:
      entries: its leaves and empty nodes, in order.
      unflatten: puts one value for each entry into the places of the tree, whose classes are what is recorded.
    """
    leaves = [orjson.Fragment(_leaf(entry.value_type, entry.skip, entry.write_shape)) for entry in entries]
    return dump(_encoded(unflatten(leaves))).decode()


@functools.lru_cache(maxsize=1024)
def _leaf(value_type: str, skip: bool, write_shape: tuple[int, ...] | None) -> bytes:  # noqa: FBT001 - as in `Entry`
    data = {"value_type": value_type, "skip_deserialize": skip}
    return dump(_custom("ValueMetadataEntry", data=data if write_shape is None else {**data, "write_shape": write_shape}))


def _custom(name: str, **fields: Any) -> dict[str, Any]:
    return {"category": "custom", "clazz": name, **fields}


def _encoded(node: Any) -> Any:
    if isinstance(node, orjson.Fragment):
        return node
    below, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    children = {key_of(key).name: _encoded(child) for (key,), child in below}
    kind = type(node)
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        entries = [{"key": name, "value": child} for name, child in children.items()]
        return {"category": "namedtuple", "module": kind.__module__, "clazz": kind.__qualname__, "entries": entries}
    if kind is tuple:
        return _custom("tuple", entries=list(children.values()))
    return list(children.values()) if kind is list else children


def decode_rich(text: str, entries: Sequence[Entry], values: Sequence[Any], where: str) -> Any:
    """The tree that the document describes, with the value of each entry as its leaf.

    A named tuple is one of a class made here, with the recorded name and fields: nothing is imported. An empty one of an
    unrecorded class is an `EmptyNamedTuple`.

    Raises:
      errors.FormatError: malformed, or its leaves are not those of the entries.
    """
    leaves: dict[Path, Any] = {}
    for entry, value in zip(entries, values, strict=True):
        path = tuple([key.name for key in entry.keys])
        leaves[path] = nest([entry._replace(keys=())], [value], where) if is_empty_node(entry) else value
        if entry.value_type == "NamedTuple":
            leaves[path] = EmptyNamedTuple()
    try:
        tree = _decoded(load(text.encode(errors="replace"), where), (), leaves, where)
    except RecursionError as error:
        raise malformed(where, "value_metadata_tree is nested too deeply") from error
    if leaves:
        raise malformed(where, f"value_metadata_tree lacks the leaf {reprlib.repr(next(iter(leaves)))}")
    return tree


EmptyNamedTuple = collections.namedtuple("EmptyNamedTuple", [])  # noqa: PYI024 - it has no fields to give types to


def _decoded(node: Any, path: Path, leaves: dict[Path, Any], where: str) -> Any:
    """The tree of a node; the leaves that it takes are removed from `leaves`."""
    if isinstance(node, list):
        return [_decoded(child, (*path, str(i)), leaves, where) for i, child in enumerate(node)]
    kind = expect(node, dict, "a node of value_metadata_tree", where).get("category")
    if not isinstance(kind, str):
        return {key: _decoded(child, (*path, key), leaves, where) for key, child in node.items()}
    name = expect(node.get("clazz"), str, "clazz", where)
    if (kind, name) == ("custom", "ValueMetadataEntry"):
        if path not in leaves:
            raise malformed(where, f"value_metadata_tree has a leaf at {reprlib.repr(path)} that tree_metadata lacks")
        return leaves.pop(path)
    children = expect(node.get("entries"), list, "entries", where)
    if (kind, name) == ("custom", "tuple"):
        return tuple([_decoded(child, (*path, str(i)), leaves, where) for i, child in enumerate(children)])
    if kind != "namedtuple":
        raise unexpected(where, "a node of value_metadata_tree", (kind, name), "a tuple, a namedtuple or a ValueMetadataEntry")
    module = expect(node.get("module"), str, "module", where)
    fields = {_field(child, where): child.get("value") for child in children}
    try:
        made = _named_tuple(f"{module}_{name}_{len(fields)}".replace(".", "_"), tuple(fields))
    except (ValueError, SyntaxError) as error:  # the second where two fields are one identifier, as 'fi' and its ligature
        raise malformed(where, f"the namedtuple {reprlib.repr(name)} of fields {reprlib.repr([*fields])} ({error})") from error
    return made(*[_decoded(child, (*path, key), leaves, where) for key, child in fields.items()])


def _field(child: Any, where: str) -> str:
    return expect(expect(child, dict, "an entry of a namedtuple", where).get("key"), str, "key", where)


@functools.lru_cache(maxsize=1024)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    """The class for a recorded named tuple: the same one each time, so that two restored trees have one structure.

    Raises:
      ValueError, SyntaxError: a name that is no identifier, or fields that are the same one.
    """
    return collections.namedtuple(name, fields)  # noqa: PYI024 - known at run time only
