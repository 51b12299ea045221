"""Where ckptkit does something else than Orbax on purpose: the one list, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from differential.outcomes import Gap


class Difference(NamedTuple):
    """One difference.

    Attributes:
      kind: as in `Gap`.
      found: what the line of ckptkit's message ('refused'), or of Orbax's ('accepted', 'error'), holds.
      reason: why ckptkit does it its own way.
      when: further what must hold of the gap and of the leaf that was asked for, or saved.
    """

    kind: str
    found: str
    reason: str
    when: Callable[[Gap, Any], bool] = lambda gap, leaf: True

    def covers(self, gap: Gap, leaf: Any) -> bool:
        """Whether the gap is this difference; `leaf` is what was asked for at its place."""
        if gap.kind != self.kind:
            return False
        text = gap.ours if self.kind == "refused" else str(gap.theirs)
        return re.search(self.found, text, re.DOTALL) is not None and self.when(gap, leaf)


def _host_array(_gap: Gap, leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | jax.ShapeDtypeStruct)


def _resized(gap: Gap, leaf: Any) -> bool:
    return isinstance(gap.ours, np.ndarray) and gap.ours.shape == leaf.shape != gap.theirs.shape


def _has_keys(value: Any) -> bool:
    return any(isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(value))


DIFFERENCES = [
    # Restore: ckptkit refuses.
    Difference(
        "refused",
        r"stored shape .* requested shape|stored with \d+ axes, requested with",
        "Orbax returns an array of another shape than the np.ndarray, or the abstract array, that was asked for",
        _host_array,
    ),
    Difference("refused", "would become .* jax_enable_x64", "Orbax narrows 64-bit values without a word; 2**40 + 1 becomes 1"),
    Difference(
        "refused", "an empty node .* is stored", "Orbax returns the empty node in the place of the number or array asked for"
    ),
    Difference(
        "refused", "what is stored here is not the data of one", "Orbax returns plain numbers where PRNG keys were asked for"
    ),
    Difference(
        "refused", "restore_args holds a", "Orbax takes anything for RestoreArgs(), a typing error of the caller's among it"
    ),
    Difference(
        "refused",
        r"stored shape .* requested shape|stored with \d+ axes, requested with",
        "the shape asked of typed PRNG keys is the keys', not that of their data",
        lambda gap, leaf: _has_keys(gap.theirs),
    ),
    # Restore: Orbax refuses.
    Difference(
        "accepted",
        "is not compatible with the stored shape|Ranks do not match",
        "the same, seen from the other side",
        lambda gap, leaf: _has_keys(gap.ours),
    ),
    Difference(
        "accepted",
        "Unsupported type: <class 'ellipsis'>",
        "`...` leaves a leaf alone under Standard too, not only under PyTree",
    ),
    Difference("accepted", "Unsupported type: <class 'numpy", "a numpy scalar is a target like any other value"),
    Difference("accepted", "Unsupported type: <class 'complex'>", "Python's complex is a leaf like int and float"),
    Difference("accepted", "(Source|Destination) does not support", "every cast that numpy has works, not only TensorStore's"),
    Difference(
        "accepted",
        "Sharding of jax.Array cannot be None|refers to non-existent object member",
        "an array without a sharding goes to the default device",
    ),
    Difference("accepted", "lookup failed for: type=<class 'complex'>", "Python's complex is a leaf like int and float"),
    Difference(
        "accepted", r"^TypeError: (int|float)\(\) argument must be", "a complex dtype on the way to a real number is a cast"
    ),
    Difference(
        "accepted", "pytree structure error", "restore_args may be a tree of the classes that were saved, also without an item"
    ),
    Difference("accepted", "TypeHandler lookup failed", "the RestoreArgs of a leaf that is left alone do not matter"),
    Difference("accepted", "template has type <class 'ellipsis'>", "`...` may stand for a whole part of the tree"),
    Difference("accepted", "Tree is not complete", "None among restore_args stands for RestoreArgs() also without an item"),
    Difference(
        "accepted",
        "invalid PRNG key data",
        "a dtype asks for the raw data of PRNG keys; and SaveArgs(dtype=...) does not spoil them",
    ),
    Difference("accepted", "float64 would become float32", "the same, where ckptkit reads the keys that Orbax cast to float64"),
    # Restore: other values.
    Difference("value", "", "`...` leaves a leaf alone with partial_restore=True too", lambda gap, leaf: gap.ours is ...),
    Difference("value", "", "`strict=False` pads and truncates np.ndarray targets too; Orbax ignores their shape", _resized),
    # Save: ckptkit refuses.
    Difference("refused", "save_args holds a", "Orbax ignores save_args that do not fit the tree"),
    Difference("refused", "does not support single arrays", "a bare np.ndarray has no name, as a bare jax.Array has none"),
    Difference(
        "refused", "Unsupported option `aggregate`", "PyTree too writes every leaf by itself; aggregate files are only read"
    ),
    Difference(
        "refused", "without OCDBT it becomes a directory", "names that leave, or are, the checkpoint's directory make no files"
    ),
    # Save: Orbax refuses.
    Difference("accepted", "Found empty item", "an empty tree comes back as it was"),
    Difference("accepted", "target_byte_size=.* must be", "a chunk holds one element at least"),
    Difference("accepted", "Cannot save arrays with zero size", "an array without elements comes back as it was"),
    # Errors of another class.
    Difference("error", "has no attribute 'aggregate'", "Orbax takes save_args of any shape and trips over them later"),
    Difference(
        "error", "^TypeError: Type mismatch at key path", "trees that differ are a ValueError, with partial_restore=True too"
    ),
    Difference(
        "error",
        "^TypeError: JAX encountered invalid PRNG key data",
        "PRNG keys of another shape are a ValueError that names the leaf",
    ),
    Difference(
        "error",
        "^IndexError: list index out of range",
        "an error of Orbax's own making, for a sharding of more axes than the array",
    ),
]
