"""Trees as the rest of ckptkit sees them: leaves in order, each with its keys and its name.

Empty containers and None count as leaves here, since a checkpoint records them; jax itself would drop them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import jax
from jax.tree_util import DictKey

from ckptkit import errors
from ckptkit._recent import Recent
from ckptkit.metadata.tree import Key, key_of

__all__ = ["Structure", "flatten", "flatten_alike", "is_empty_node", "key_path"]


def is_empty_node(value: Any) -> bool:
    """Whether a node holds nothing: None, or a dict, list or tuple (named ones too) without entries."""
    kind: Any = type(value)
    return value is None or (_is_container(kind) and not value)


@functools.lru_cache(maxsize=1024)
def _is_container(kind: Any) -> bool:
    """By type, and remembered: asking 10,000 arrays whether they are a Mapping takes longer than flattening the tree."""
    return issubclass(kind, (Mapping, list, tuple))


def key_path(keys: Sequence[Key]) -> tuple[str, ...]:
    """The names of the keys, outermost first."""
    return tuple([key.name for key in keys])


@attrs.frozen(eq=False, slots=False)  # slots would leave no room for the cached property
class Structure:
    """The shape of a tree without its leaves.

    Attributes:
      treedef: jax's own description; puts leaves back together.
      jax_paths: per leaf, its keys as jax gives them, outermost first.
      paths: per leaf, the names of its keys: how messages show where a leaf is.
      names: per leaf, the same joined with '.', as Orbax names what it stores.
    """

    treedef: Any
    jax_paths: Sequence[tuple[Any, ...]]
    paths: Sequence[tuple[str, ...]]
    names: Sequence[str]

    @functools.cached_property
    def keys(self) -> tuple[tuple[Key, ...], ...]:
        """Per leaf, its keys, outermost first; made when the metadata is, since a caller who waits needs names alone."""
        return tuple([tuple(map(key_of, path)) for path in self.jax_paths])

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.treedef, leaves)


_structures: Recent[Any, Structure] = Recent(8)


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a tree and its structure.

    Structures are kept for a while, since training saves the same tree again and again and the names of 10,000 leaves
    take longer to make than their values take to stage.

    Raises:
      errors.TreeError: jax cannot flatten the tree (dict keys that do not compare, for example).
    """
    try:
        leaves, treedef = jax.tree.flatten(tree, is_leaf=is_empty_node)
    except Exception as error:
        raise _not_flattened(error) from error
    try:
        # With its text, since {1: x} and {True: x} have equal treedefs, but other names.
        return leaves, _structures.get((treedef, str(treedef)), lambda: _structure(tree, treedef))
    except errors.TreeError:
        raise
    except Exception:  # noqa: BLE001 - the auxiliary data of a foreign node may refuse to be hashed or compared, in any way
        return leaves, _structure(tree, treedef)


def _structure(tree: Any, treedef: Any) -> Structure:
    try:
        with_paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty_node)
    except Exception as error:
        raise _not_flattened(error) from error
    jax_paths = [path for path, _ in with_paths]
    paths = [tuple([str(key.key) if type(key) is DictKey else key_of(key).name for key in path]) for path in jax_paths]
    return Structure(treedef, jax_paths, paths, list(map(".".join, paths)))


def _not_flattened(error: Exception) -> errors.TreeError:
    """For whatever the nodes of a tree raise, which may be anybody's classes."""
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
    if len({names[i] for i in stored}) == len(stored):
        return []
    counts = Counter(names[i] for i in stored)
    paths: dict[str, list[tuple[str, ...]]] = {}
    for i in stored:
        if counts[names[i]] > 1:
            paths.setdefault(names[i], []).append(structure.paths[i])
    return [
        f"{' and '.join(map(str, where))}: both would be stored as {name!r}; rename one of them." for name, where in paths.items()
    ]
