"""`_METADATA`: which leaves a tree has, under which keys, and of which kind.

Reading a file and building the nested tree from it are two steps, since a restore into a target needs only the first.
"""

from __future__ import annotations

import functools
import operator
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import attrs
import orjson
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from ckptkit import errors
from ckptkit.metadata.json import (
    checked_custom,
    dump,
    dump_exact,
    encodable,
    expect,
    load,
    load_exact,
    malformed,
    may_be_rounded,
    shape_of,
    unexpected,
)

__all__ = [
    "DICT",
    "MAX_DEPTH",
    "SEQUENCE",
    "TREE_FILE",
    "Entry",
    "Key",
    "TreeDocument",
    "decode_tree",
    "encode_tree",
    "is_empty_node",
    "key_of",
    "nest",
]

TREE_FILE = "_METADATA"

SEQUENCE = 1
DICT = 2

MAX_DEPTH = 900
"""Keys on the way to a leaf: jax flattens with the interpreter's recursion limit, 1000 unless the program raised it."""

_EMPTY_NODES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "Dict": dict,
    "List": list,
    "Tuple": tuple,
    "NamedTuple": lambda: None,  # without a target nothing says which; Orbax gives None too
}


class Key(NamedTuple):
    """One step on the way to a leaf.

    Attributes:
      name: the key, the attribute's name, or the position in decimal.
      kind: `SEQUENCE` or `DICT`; attributes count as keys of a dict.
    """

    name: str
    kind: int


class Entry(NamedTuple):
    """One leaf, or one empty node, which has no leaves to stand for it.

    Attributes:
      keys: the way to it, outermost first; none where the whole tree is one leaf.
      value_type: 'jax.Array', 'np.ndarray', 'scalar' or 'string'; of an empty node 'None', 'Dict', 'List', 'Tuple', 'NamedTuple'.
      skip: whether no array is stored for it.
      write_shape: of a jax.Array, the shape of the part that one device held.
    """

    keys: tuple[Key, ...]
    value_type: str
    skip: bool = False
    write_shape: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """What the leaf is called in the checkpoint's files: its keys, joined with '.' and not escaped."""
        return ".".join([key.name for key in self.keys])


@attrs.frozen(kw_only=True)
class TreeDocument:
    """The content of `_METADATA`.

    Attributes:
      entries: leaves and empty nodes, in the order in which jax flattens the tree; readers may not rely on it.
      use_ocdbt: whether arrays are in an OCDBT database; None where the file does not say.
      use_zarr3: whether array documents are zarr version 3.
      store_array_data_equal_to_fill_value: False where a chunk may be missing because it holds nothing but the fill value.
      custom_metadata: the user's own, any JSON.
      value_metadata_tree: Orbax's record of tuples and named tuples, a JSON document of its own, unread.
    """

    entries: Sequence[Entry]
    use_ocdbt: bool | None = True
    use_zarr3: bool = False
    store_array_data_equal_to_fill_value: bool = True
    custom_metadata: Any = None
    value_metadata_tree: str | None = None


def key_of(key: Any) -> Key:
    """The key for an element of a jax key path. The name is a string whatever the key was, so 1 and '1' are one.

    Raises:
      errors.TreeError: a key of a kind that jax does not define.
    """
    if isinstance(key, DictKey):
        return Key(str(key.key), DICT)
    if isinstance(key, GetAttrKey):
        return Key(key.name, DICT)
    if isinstance(key, SequenceKey):
        return Key(str(key.idx), SEQUENCE)
    if isinstance(key, FlattenedIndexKey):
        return Key(str(key.key), SEQUENCE)
    raise errors.TreeError(
        f"A node of the tree has the key {key!r}, a {type(key).__qualname__}; expected one of jax.tree_util's DictKey, "
        "SequenceKey, GetAttrKey and FlattenedIndexKey. Register the node's class with those."
    )


def is_empty_node(entry: Entry) -> bool:
    """Whether the entry stands for None or an empty container; nothing else is stored for it."""
    return entry.value_type in _EMPTY_NODES


def encode_tree(document: TreeDocument) -> bytes:
    """The file's bytes.

    Raises:
      errors.ArgsTypeError: custom metadata that JSON cannot hold.
      errors.TreeError: two leaves of the same keys, or a key that UTF-8 cannot encode.
    """
    key_json, value_json = functools.cache(_key_json), functools.cache(_value_json)  # leaves share most of theirs
    quoted = functools.cache(_quoted)
    tree = {
        f"({', '.join(map(quoted, keys))})" if len(keys) > 1 else str(tuple(map(_NAME, keys))): {
            "key_metadata": list(map(key_json, keys)),
            "value_metadata": value_json(value_type, skip, write_shape),
        }
        for keys, value_type, skip, write_shape in document.entries
    }
    if len(tree) != len(document.entries):
        raise errors.TreeError(f"{len(document.entries) - len(tree)} leaves have the same keys as another one. Rename them.")
    rich = {} if document.value_metadata_tree is None else {"value_metadata_tree": document.value_metadata_tree}
    return dump(
        {
            "tree_metadata": tree,
            "use_ocdbt": document.use_ocdbt,
            "use_zarr3": document.use_zarr3,
            "store_array_data_equal_to_fill_value": document.store_array_data_equal_to_fill_value,
            "custom_metadata": orjson.Fragment(dump_exact(checked_custom(document.custom_metadata, "custom_metadata"))),
            **rich,
        }
    )


_NAME = operator.attrgetter("name")


def _quoted(key: Key) -> str:
    return repr(key.name)


def _key_json(key: Key) -> orjson.Fragment:
    return orjson.Fragment(dump({"key": key.name, "key_type": key.kind}))


def _value_json(value_type: str, skip: bool, write_shape: tuple[int, ...] | None) -> orjson.Fragment:  # noqa: FBT001 - as in `Entry`
    document = {"value_type": value_type, "skip_deserialize": skip}
    return orjson.Fragment(dump(document if write_shape is None else {**document, "write_shape": write_shape}))


def decode_tree(data: bytes, where: str) -> TreeDocument:
    """What a `_METADATA` file says; fields that older writers left out have the values that those writers meant.

    Raises:
      errors.FormatError: not a JSON object, or a field of the wrong type.
    """
    document = expect(load(data, where), dict, "the document", where)
    tree = expect(document.get("tree_metadata"), dict, "tree_metadata", where)
    keys = _Keys(where)
    custom, use_ocdbt, rich = [document.get(name) for name in ("custom_metadata", "use_ocdbt", "value_metadata_tree")]
    return TreeDocument(
        entries=[_entry(name, item, keys, where) for name, item in tree.items()],
        use_ocdbt=None if use_ocdbt is None else expect(use_ocdbt, bool, "use_ocdbt", where),
        use_zarr3=_flag(document, "use_zarr3", where),
        store_array_data_equal_to_fill_value=_flag(document, "store_array_data_equal_to_fill_value", where),
        custom_metadata=load_exact(data, where)["custom_metadata"] if may_be_rounded(custom) else custom,
        value_metadata_tree=None if rich is None else expect(rich, str, "value_metadata_tree", where),
    )


def _flag(document: dict[str, Any], name: str, where: str) -> bool:
    return expect(document.get(name, False), bool, name, where)


class _Keys(dict[tuple[str, int], Key]):
    """Each distinct key of a file, checked once."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __missing__(self, pair: tuple[Any, Any]) -> Key:
        name, kind = pair
        if type(name) is not str or not encodable(name) or type(kind) is not int or kind not in (SEQUENCE, DICT):
            raise unexpected(self._where, "a key with its type", pair, "a string and 1 or 2")
        key = self[pair] = Key(name, kind)
        return key


_KEY_FIELDS = operator.itemgetter("key", "key_type")


def _entry(name: str, item: Any, keys: _Keys, where: str) -> Entry:
    try:
        value = item["value_metadata"]
        path = tuple(map(keys.__getitem__, map(_KEY_FIELDS, item["key_metadata"])))
        value_type, skip, write_shape = value["value_type"], value.get("skip_deserialize", False), value.get("write_shape")
    except (KeyError, TypeError, AttributeError) as error:
        raise unexpected(where, f"the entry {reprlib.repr(name)}", item, "key_metadata and value_metadata") from error
    if type(value_type) is not str or type(skip) is not bool:
        raise unexpected(where, f"value_metadata of {reprlib.repr(name)}", value, "a value_type and skip_deserialize")
    return Entry(path, value_type, skip, None if write_shape is None else shape_of(write_shape, "write_shape", where))


class _Node(dict[Key, "_Node | int"]):
    """A container under construction: further nodes, and leaves as their positions in the list of entries."""

    __slots__ = ()


def nest(entries: Sequence[Entry], values: Sequence[Any], where: str = TREE_FILE) -> Any:
    """The tree of dicts and lists that the entries describe, with the value of each entry as its leaf.

    Empty nodes are None, {}, [] or () by their type, whatever their value is, and give way to leaves below them, which
    Orbax leaves behind when it adds to a checkpoint.

    Raises:
      errors.FormatError: no entries, two for one place, a leaf that has leaves below it, keys and positions in one container,
        positions that are not 0 to n-1, or more than `MAX_DEPTH` keys on the way to a leaf.
    """
    if not entries:
        raise malformed(where, "no leaves at all")
    leaves = [_EMPTY_NODES[e.value_type]() if is_empty_node(e) else value for e, value in zip(entries, values, strict=True)]
    if len(entries) == 1 and not entries[0].keys:
        return leaves[0]
    root = _Node()
    nodes = [(root, 0, 0)]  # a parent before its children; each with an entry below it, and the depth at which
    for number in range(len(entries)):
        _place(number, entries, root, nodes, where)
    built: dict[int, Any] = {}
    for node, number, depth in reversed(nodes):
        built[id(node)] = _container(node, entries[number].keys[:depth], leaves, built, where)
    return built[id(root)]


def _place(number: int, entries: Sequence[Entry], root: _Node, nodes: list[tuple[_Node, int, int]], where: str) -> None:
    """Puts an entry into its node, and makes the nodes that lead to it."""
    keys = entries[number].keys
    if not 0 < len(keys) <= MAX_DEPTH:
        raise malformed(where, f"an entry of {len(keys)} keys among {len(entries)} entries, expected 1 to {MAX_DEPTH}")
    node = root
    for depth, key in enumerate(keys[:-1], 1):
        child = node.get(key)
        if not isinstance(child, _Node):
            if child is not None and not is_empty_node(entries[child]):
                raise malformed(where, f"{_shown(keys[:depth])} is a leaf and has leaves below it")
            node[key] = child = _Node()
            nodes.append((child, number, depth))
        node = child
    held = node.setdefault(keys[-1], number)
    if held != number and not (isinstance(held, _Node) and is_empty_node(entries[number])):
        raise malformed(where, f"two entries for {_shown(keys)}, or a leaf that has leaves below it")


def _container(node: _Node, path: tuple[Key, ...], leaves: Sequence[Any], built: dict[int, Any], where: str) -> Any:
    """The dict or list of a node whose children are built."""
    found = {key: built[id(child)] if isinstance(child, _Node) else leaves[child] for key, child in node.items()}
    kinds = {key.kind for key in found}
    if kinds == {DICT}:
        return {key.name: value for key, value in found.items()}
    positions = [Key(str(i), SEQUENCE) for i in range(len(found))]
    if kinds == {SEQUENCE} and all(key in found for key in positions):
        return [found[key] for key in positions]
    names = [key.name for key in found]
    raise unexpected(where, f"the set of keys in {_shown(path)}", names, "those of a dict, or all positions of a list")


def _shown(path: Sequence[Key]) -> str:
    return reprlib.repr(".".join([key.name for key in path])) if path else "the tree"
