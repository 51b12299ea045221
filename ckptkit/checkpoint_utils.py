"""Names of Orbax's `checkpoint_utils` that its tutorials use, so that moving to ckptkit changes an import and no call."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, Final

import jax
import numpy as np

from ckptkit import errors, tree
from ckptkit.leaves.base import ArrayRestoreArgs, RestoreArgs
from ckptkit.metadata.values import ArrayMetadata, ScalarMetadata, StringMetadata

__all__ = ["PLACEHOLDER", "construct_restore_args"]

PLACEHOLDER: Final[EllipsisType] = ...
"""In a tree to restore into: leave this leaf alone, read nothing of it."""


def construct_restore_args(
    target: Any,
    sharding_tree: Any = None,
    set_global_shape: bool = True,  # noqa: FBT001, FBT002 - Orbax's signature
    support_layout: bool = False,  # noqa: FBT001, FBT002 - the same
    strict: bool = True,  # noqa: FBT001, FBT002 - the same
) -> Any:
    """The `restore_args` of a `PyTreeRestore` that restore each leaf as the type that the target has in its place.

    Args:
      target: a tree of arrays, `jax.ShapeDtypeStruct`, numbers, str or what `metadata()` returned.
      sharding_tree: where jax.Arrays go, a tree like the target; None for the target's own shardings. An abstract array
        without either is restored as np.ndarray.
      set_global_shape: ask for the target's shapes; False for those that were saved.
      support_layout: honour the memory layout of a target that carries one.
      strict: a stored shape that differs is an error; False pads with zeros or truncates.

    Raises:
      errors.ArgsError: the trees differ.
      errors.ArgsTypeError: a leaf of the target that says nothing about how to restore it.
    """
    leaves, structure = tree.flatten(target)
    shardings = [None] * len(leaves) if sharding_tree is None else tree.flatten_alike(structure, sharding_tree, "sharding_tree")

    def args_for(leaf: Any, sharding: Any, path: tuple[str, ...]) -> Any:
        if tree.is_empty_node(leaf):
            return leaf
        if leaf is PLACEHOLDER:
            return RestoreArgs()
        if isinstance(leaf, ScalarMetadata):
            return RestoreArgs(restore_type=type(np.zeros((), leaf.dtype).item()), dtype=leaf.dtype)
        if isinstance(leaf, (int, float, complex, np.generic, str, StringMetadata)):
            return RestoreArgs(restore_type=str if isinstance(leaf, StringMetadata) else type(leaf))
        if not isinstance(leaf, (np.ndarray, jax.Array, jax.ShapeDtypeStruct, ArrayMetadata)):
            raise errors.ArgsTypeError(f"Unsupported type: {type(leaf)} for key: {path}; expected an array, a number or a str.")
        own = getattr(leaf, "sharding", None)
        if own is not None and support_layout:
            own = getattr(leaf, "format", None) or own
        sharding = sharding or own
        if sharding is None or isinstance(leaf, np.ndarray):
            return RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        shape = tuple(leaf.shape) if set_global_shape else None
        return ArrayRestoreArgs(
            restore_type=jax.Array, dtype=leaf.dtype, sharding=sharding, global_shape=shape, shape=shape, strict=strict
        )

    return structure.unflatten([args_for(*each) for each in zip(leaves, shardings, structure.paths, strict=True)])
