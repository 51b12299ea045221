"""What `metadata()` returns: a tree with a description in the place of each leaf, which is also a target to restore into."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from typing import TYPE_CHECKING, Any

import attrs
import jax
import numpy as np

from ckptkit.metadata.sharding import ShardingMetadata

if TYPE_CHECKING:
    from etils import epath

__all__ = ["ArrayMetadata", "Metadata", "ScalarMetadata", "StorageMetadata", "StringMetadata", "TreeMetadata"]


@attrs.frozen(kw_only=True)
class StorageMetadata:
    """How an array is stored.

    Attributes:
      chunk_shape: shape of a stored chunk.
      write_shape: of a jax.Array, the shape of the part that one device held; else None.
    """

    chunk_shape: tuple[int, ...] | None
    write_shape: tuple[int, ...] | None = None


@attrs.frozen(kw_only=True)
class Metadata:
    """What is known of a leaf. Two are equal where they describe alike leaves, whatever their names and places.

    Attributes:
      name: what the leaf is called in the checkpoint.
      directory: the checkpoint, or the item of it, that holds the leaf.
    """

    name: str = attrs.field(eq=False)
    directory: epath.Path | None = attrs.field(default=None, eq=False)


@attrs.frozen(kw_only=True)
class ArrayMetadata(Metadata):
    """A stored array.

    Attributes:
      shape: of the whole array.
      dtype: as stored.
      sharding: where a jax.Array lived when it was saved; None where that was not recorded.
      storage: how it is stored.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: ShardingMetadata | None = None
    storage: StorageMetadata | None = None


@attrs.frozen(kw_only=True)
class ScalarMetadata(ArrayMetadata):
    """A stored Python number."""

    shape: tuple[int, ...] = ()


@attrs.frozen(kw_only=True)
class StringMetadata(Metadata):
    """A stored str."""


@attrs.frozen
class _Rest:
    """What of a `TreeMetadata` is not a child. Trees of the same structure match, whatever else is known of them."""

    structure: Any
    custom_metadata: Any = attrs.field(eq=False)
    use_zarr3: bool = attrs.field(eq=False)


@jax.tree_util.register_pytree_with_keys_class
@attrs.frozen(kw_only=True)
class TreeMetadata:
    """The tree of a checkpoint with a description in the place of each leaf; a pytree, and indexed as its root is.

    Attributes:
      tree: the tree itself, of dicts and lists, to map over together with a tree of your own.
      custom_metadata: what the user saved with it.
      use_zarr3: whether its arrays are stored as zarr version 3.
    """

    tree: Any
    custom_metadata: Any = None
    use_zarr3: bool = False

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], _Rest]:
        """The children of the root, each with its key, and the rest; for jax."""
        children, structure = jax.tree_util.tree_flatten_with_path(self.tree, is_leaf=lambda node: node is not self.tree)
        keyed = [(path[0] if path else jax.tree_util.GetAttrKey("tree"), child) for path, child in children]
        return keyed, _Rest(structure, self.custom_metadata, self.use_zarr3)

    @classmethod
    def tree_unflatten(cls, rest: _Rest, children: Iterable[Any]) -> TreeMetadata:
        """The inverse of `tree_flatten_with_keys`, for jax."""
        tree = jax.tree_util.tree_unflatten(rest.structure, children)
        return cls(tree=tree, custom_metadata=rest.custom_metadata, use_zarr3=rest.use_zarr3)

    def __getitem__(self, key: str | int) -> Any:
        return self.tree[key]

    def __contains__(self, key: object) -> bool:
        return key in self.tree

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tree)

    def __len__(self) -> int:
        return len(self.tree)

    def get(self, key: str | int, default: Any = None) -> Any:
        """What is under a key, or at a position, of the root; `default` where there is nothing."""
        try:
            return self.tree[key]
        except (KeyError, IndexError):
            return default

    def keys(self) -> KeysView[str]:
        """The keys of a root that is a dict."""
        return self.tree.keys()  # type: ignore[no-any-return]  # the root is whatever was saved

    def values(self) -> ValuesView[Any]:
        """The values of a root that is a dict."""
        return self.tree.values()  # type: ignore[no-any-return]  # as above

    def items(self) -> ItemsView[str, Any]:
        """Keys and values of a root that is a dict."""
        return self.tree.items()  # type: ignore[no-any-return]  # as above
