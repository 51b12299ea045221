"""Trees as the rest of ckptkit sees them: leaves in order, each with its keys and its name.

Empty containers and None count as leaves here, since a checkpoint records them; jax itself would drop them.
"""

from __future__ import annotations

import functools
import itertools
import numbers
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import attrs
import jax
import numpy as np

from ckptkit import errors
from ckptkit._recent import Recent
from ckptkit.metadata.tree import DICT, SEQUENCE, Key, key_of

__all__ = ["Names", "Structure", "flatten", "flatten_alike", "hollow", "is_empty_node", "key_path"]


def is_empty_node(value: Any) -> bool:
    """Whether a node holds nothing: None, or a dict, list, tuple (named ones too) or node of another class without entries."""
    kind: Any = type(value)
    return _may_be_empty(kind) and (not value if _is_container(kind) else _is_childless(value))


@functools.lru_cache(maxsize=1024)
def _may_be_empty(kind: Any) -> bool:
    """By type, and remembered: asking 10,000 arrays what they are takes longer than flattening the tree."""
    return not issubclass(kind, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, numbers.Number, str))


@functools.lru_cache(maxsize=1024)
def _is_container(kind: Any) -> bool:
    return issubclass(kind, (Mapping, list, tuple))


def _is_childless(value: Any) -> bool:
    """Whether jax knows the class for one of nodes, and this one has no children."""
    if jax.tree_util.all_leaves([value]):
        return False
    children, _ = jax.tree_util.default_registry.flatten_one_level(value)
    return not tuple(children)


class _Fieldless(NamedTuple):
    """An empty named tuple."""


def hollow(node: Any) -> Any:
    """An empty node that is recorded as `node` is, and not the caller's own, which may be filled later, or hold what is large."""
    if isinstance(node, Mapping):
        return {}
    if isinstance(node, list):
        return []
    if isinstance(node, tuple):
        return _Fieldless() if hasattr(node, "_fields") else ()
    return None


def key_path(keys: Sequence[Key]) -> tuple[str, ...]:
    """The names of the keys, outermost first."""
    return tuple([key.name for key in keys])


class _Run(NamedTuple):
    """Leaves that follow each other in one node.

    Attributes:
      path: the keys of the node, outermost first.
      keys: of the leaves in it.
      kinds: of those keys.
    """

    path: tuple[Key, ...]
    keys: Sequence[str]
    kinds: Iterable[int]

    def all_keys(self) -> list[tuple[Key, ...]]:
        """For each leaf its keys, outermost first."""
        return [(*self.path, _key(name, kind)) for name, kind in zip(self.keys, self.kinds, strict=False)]


@attrs.frozen(eq=False, slots=False)  # slots would leave no room for the cached properties
class Names:
    """What the leaves of a tree are called, which trees of equal structure share.

    Attributes:
      runs: where they are, in order; none where the tree is one leaf.
      names: per leaf, the names of its keys joined with '.', as Orbax names what it stores.
      has_empty_nodes: whether some of the leaves are none to jax.
      is_plain: whether all nodes are lists, tuples, and dicts whose keys are texts, so that equal treedefs have the same names.
    """

    runs: Sequence[_Run]
    names: Sequence[str]
    has_empty_nodes: bool
    is_plain: bool

    @functools.cached_property
    def keys(self) -> Sequence[tuple[Key, ...]]:
        """Per leaf, its keys, outermost first; made after the caller of a save was let go."""
        return [keys for run in self.runs for keys in run.all_keys()] if self.runs else [()]

    @functools.cached_property
    def paths(self) -> Sequence[tuple[str, ...]]:
        """Per leaf, the names of its keys: how messages show where a leaf is."""
        return list(map(key_path, self.keys))

    def deepest(self) -> tuple[Key, ...]:
        """The keys of a leaf that has the most of them."""
        return max(self.runs, key=lambda run: len(run.path)).all_keys()[0] if self.runs else ()

    def paths_of(self, positions: Sequence[int]) -> list[tuple[str, ...]]:
        """What `paths` has at these positions, which ascend, without making all of them."""
        if len(positions) == len(self.names):
            return list(self.paths)
        found = []
        runs, run, start, end = iter(self.runs), None, 0, 0
        for position in positions:
            while position >= end and (run := next(runs, None)) is not None:
                start, end = end, end + len(run.keys)
            found.append(() if run is None else (*key_path(run.path), run.keys[position - start]))
        return found


@attrs.frozen(eq=False)
class Structure:
    """The shape of a tree without its leaves.

    Attributes:
      treedef: jax's own description, of this very tree, whose static fields it holds; puts leaves back together.
      shared: what the leaves are called; the same object for trees of equal structure, as long as it is remembered.
    """

    treedef: Any
    shared: Names

    @property
    def keys(self) -> Sequence[tuple[Key, ...]]:
        return self.shared.keys

    @property
    def names(self) -> Sequence[str]:
        return self.shared.names

    @property
    def paths(self) -> Sequence[tuple[str, ...]]:
        return self.shared.paths

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.treedef, leaves)


_plain_names: Recent[Any, Names] = Recent(8)
"""By treedef; of what is not plain it tells that."""

_names: Recent[Any, Names] = Recent(8)
"""By treedef and its text."""


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a tree and its structure.

    The names of the last eight structures are kept, since training saves the same tree again and again, each with jax's treedef,
    which tells them apart and keeps the static fields of one tree. So a node class must put into its auxiliary data whatever the
    names of its keys depend on. The treedef returned is the tree's own: what equal ones hold may differ where `==` does not look.

    Raises:
      errors.TreeError: jax cannot flatten the tree (dict keys that do not compare, for example).
    """
    leaves, treedef = _flatten(tree)
    named = functools.cache(lambda: _named(tree, treedef.num_leaves))
    try:
        shared = _plain_names.get(treedef, named)
        if not (shared.is_plain and _has_texts(tree)):  # then with its text: {1: x} and {True: x} have equal treedefs
            shared = _names.get((treedef, str(treedef)), named)
    except errors.TreeError:
        raise
    except Exception:  # noqa: BLE001 - the auxiliary data of a foreign node may refuse to be hashed or compared, in any way
        shared = named()
    if shared.has_empty_nodes:
        leaves, treedef = _flatten(tree, is_empty_node)
    _check_count(len(leaves), len(shared.names))
    return leaves, Structure(treedef, shared)


_TEXT: Final = frozenset({str})
_PLAIN: Final = frozenset({dict, list, tuple})


def _has_texts(node: Any) -> bool:
    """Whether all keys are plain texts, in a tree of plain nodes: a member of an enum may be equal to one, of another name."""
    kind = type(node)
    if kind is dict and not _TEXT.issuperset(map(type, node)):
        return False
    children = node.values() if kind is dict else node if kind in _PLAIN else ()
    return _PLAIN.isdisjoint(map(type, children)) or all(map(_has_texts, children))


def _flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """As jax does, which takes several times as long where it has to ask about every node."""
    try:
        return jax.tree.flatten(tree, is_leaf)
    except Exception as error:
        raise _not_flattened(error) from error


def _named(tree: Any, leaf_count: int) -> Names:
    """By walking the tree, of so many leaves to jax: its own function for paths makes several objects for every leaf."""
    walk = _Walk()
    try:
        walk.start(tree)
    except errors.TreeError:
        raise
    except Exception as error:
        raise _not_flattened(error) from error
    _check_count(leaf_count + walk.empty, len(walk.names))
    return Names(walk.runs, walk.names, walk.empty > 0, walk.is_plain)


class _Walk:
    """Where the leaves are, empty nodes among them, what they are called, and how many of those there are."""

    def __init__(self) -> None:
        self.runs: list[_Run] = []
        self.names: list[str] = []
        self.empty = 0
        self.is_plain = True
        self._leaf_kinds: set[type] = set()

    def start(self, tree: Any) -> None:
        if self._is_leaf(tree):
            self.names = [""]
        else:
            self._below(tree, (), "")

    def _below(self, node: Any, path: tuple[Key, ...], prefix: str) -> None:
        keys, kinds, children = _children(node)
        self.is_plain &= type(node) in (list, tuple) or (type(node) is dict and _TEXT.issuperset(map(type, node)))
        if keys and self._leaf_kinds.issuperset(map(type, children)):  # as for most nodes
            self.runs.append(_Run(path, keys, kinds))
            self.names.extend([prefix + key for key in keys])
            return
        for key, kind, child in zip(keys, kinds, children, strict=False):
            if self._is_leaf(child):
                self.runs.append(_Run(path, (key,), (kind,)))
                self.names.append(prefix + key)
            else:
                self._below(child, (*path, _key(key, kind)), f"{prefix}{key}.")

    def _is_leaf(self, node: Any) -> bool:
        if type(node) in self._leaf_kinds:
            return True
        if jax.tree_util.all_leaves([node]):
            self._leaf_kinds.add(type(node))
            return True
        is_empty = is_empty_node(node)
        self.empty += is_empty
        return is_empty


def _check_count(first: int, second: int) -> None:
    """For a walk of the tree and then another, each of which counted its leaves."""
    if first != second:
        raise errors.TreeError(
            f"The tree has {first} leaves at first, and then {second}: a node of it changes, or says that it is empty and is not."
        )


def _children(node: Any) -> tuple[Sequence[str], Iterable[int], Sequence[Any]]:
    """The names of a node's keys, the kinds of at least as many, and what is there, in jax's order."""
    kind = type(node)
    if kind is dict:
        keys = sorted(node)
        return list(map(str, keys)), itertools.repeat(DICT), list(map(node.__getitem__, keys))
    if kind is list or kind is tuple:
        return list(map(str, range(len(node)))), itertools.repeat(SEQUENCE), node
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda part: part is not node)
    found = [key_of(path[0]) for path, _ in children]
    return [key.name for key in found], [key.kind for key in found], [child for _, child in children]


@functools.lru_cache(maxsize=4096)
def _key(name: str, kind: int) -> Key:
    """One object for the many leaves that have the same name in different places."""
    return Key(name, kind)


def _not_flattened(error: Exception) -> errors.TreeError:
    """For whatever the nodes of a tree raise, which may be anybody's classes."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, RecursionError):
        seen = seen.__cause__ or seen.__context__
    if seen is not None:
        limit = sys.getrecursionlimit()
        return errors.TreeError(f"The tree is nested too deep for Python's recursion limit, which is {limit}: flatten it.")
    return errors.TreeError(f"The tree cannot be flattened: {type(error).__name__}: {error}")


def flatten_alike(structure: Structure, tree: Any, what: str) -> list[Any]:
    """The parts of `tree` that stand where the leaves of `structure` stand.

    Raises:
      errors.ArgsError: the trees differ in shape; `what` names the argument.
    """
    try:
        return list(structure.treedef.flatten_up_to(tree))
    except (TypeError, ValueError, KeyError) as error:
        raise errors.ArgsError(f"{what} must have the structure of the tree it belongs to: {error}") from error


def name_collisions(structure: Structure, stored: Sequence[int]) -> list[str]:
    """For leaves at the positions `stored`, a line for each name that more than one of them has."""
    names = structure.names
    if len(set(map(names.__getitem__, stored))) == len(stored):
        return []
    counts = Counter(names[i] for i in stored)
    paths: dict[str, list[tuple[str, ...]]] = {}
    for i in stored:
        if counts[names[i]] > 1:
            paths.setdefault(names[i], []).append(structure.paths[i])
    return [
        f"{' and '.join(map(str, where))}: both would be stored as {name!r}; rename one of them." for name, where in paths.items()
    ]
