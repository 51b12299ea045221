"""Where ckptkit does something else than Orbax on purpose: the one list, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from differential.cases import REPLICATED, Opaque, Point, Spec
from differential.comparisons import Comparison, OneArray, Restore, RestoreLeaves, Save
from differential.outcomes import Gap


class Difference(NamedTuple):
    """One difference.

    Attributes:
      kind: as in `Gap`.
      found: what the line of ckptkit's message ('refused'), or of Orbax's ('accepted', 'error'), holds.
      reason: why ckptkit does it its own way.
      example: where it occurs.
      when: further what must hold of the gap and of the leaf that was asked for, or saved.
    """

    kind: str
    found: str
    reason: str
    example: Comparison
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


_X = {"a": np.arange(3, dtype=np.float32)}
_KEYS = {"a": jax.random.split(jax.random.key(0), 3)}
_ONE_AXIS = jax.sharding.NamedSharding(REPLICATED.mesh, jax.sharding.PartitionSpec("data"))
_NOT_STRICT = {"strict": False}


def _restore_args(**fields: Any) -> Spec:
    return Spec("RestoreArgs", fields)


def _array_args(**fields: Any) -> Spec:
    return Spec("ArrayRestoreArgs", {"sharding": REPLICATED, **fields})


DIFFERENCES = [
    # Restore: ckptkit refuses.
    Difference(
        "refused",
        r"stored shape .* requested shape|stored with \d+ axes, requested with",
        "Orbax returns an array of another shape than the np.ndarray, or the abstract array, that was asked for",
        Restore(_X, {"a": np.zeros(5, np.float32)}),
        _host_array,
    ),
    Difference(
        "refused",
        "would become .* jax_enable_x64",
        "Orbax narrows 64-bit values without a word; 2**40 + 1 becomes 1",
        RestoreLeaves({"a": np.array([2**40 + 1])}, None, {"a": _array_args()}),
    ),
    Difference(
        "refused",
        "an empty node .* is stored",
        "Orbax returns the empty node in the place of the number or array asked for",
        Restore({"a": {}, "b": 1}, {"a": 3, "b": 1}),
    ),
    Difference(
        "refused",
        "an empty .* was asked for, but a leaf is stored",
        "Orbax leaves out, without a word, a leaf whose place is taken by an empty container",
        Restore({"a": 1, "b": 1}, {"a": {}, "b": 1}),
    ),
    Difference(
        "refused",
        "what is stored here is not the data of one",
        "Orbax returns plain numbers where PRNG keys were asked for",
        Restore({"a": jnp.ones(2)}, {"a": jax.random.key(0)}, _NOT_STRICT),
    ),
    Difference(
        "refused",
        "restore_args holds a",
        "Orbax takes anything for RestoreArgs(), a typing error of the caller's among it",
        RestoreLeaves(_X, None, {"a": 5}),
    ),
    Difference(
        "refused",
        r"stored shape .* requested shape|stored with \d+ axes, requested with",
        "the shape asked of typed PRNG keys is the keys', not that of their data",
        RestoreLeaves(_KEYS, None, {"a": _array_args(global_shape=(3, 2))}),
        lambda gap, leaf: _has_keys(gap.theirs),
    ),
    # Restore: Orbax refuses.
    Difference(
        "accepted",
        "is not compatible with the stored shape|Ranks do not match",
        "the same, seen from the other side",
        RestoreLeaves(_KEYS, None, {"a": _array_args(global_shape=(3,))}),
        lambda gap, leaf: _has_keys(gap.ours),
    ),
    Difference(
        "accepted",
        "Unsupported type: <class 'ellipsis'>",
        "`...` leaves a leaf alone under Standard too, not only under PyTree",
        Restore(_X, {"a": ...}),
    ),
    Difference(
        "accepted",
        "Unsupported type: <class 'numpy",
        "a numpy scalar is a target like any other value",
        Restore({"a": 7}, {"a": np.float32(0)}),
    ),
    Difference(
        "accepted",
        "Unsupported type: <class 'complex'>",
        "Python's complex is a leaf like int and float",
        Save("Standard", {"a": 1j}),
    ),
    Difference(
        "accepted",
        "(Source|Destination) does not support|Encountered error while reading array index",
        "every cast that numpy has works, not only TensorStore's",
        Restore({"a": jnp.zeros(2, jnp.complex64)}, {"a": np.zeros(2, bool)}),
    ),
    Difference(
        "accepted",
        "Sharding of jax.Array cannot be None|refers to non-existent object member",
        "an array without a sharding goes to the default device",
        RestoreLeaves(_X, None, {"a": Spec("ArrayRestoreArgs", {})}),
    ),
    Difference(
        "accepted",
        "lookup failed for: type=<class 'complex'>",
        "Python's complex is a leaf like int and float",
        Save("PyTree", {"a": 1j}),
    ),
    Difference(
        "accepted",
        r"^TypeError: (int|float)\(\) argument must be",
        "a complex dtype on the way to a real number is a cast",
        RestoreLeaves({"a": 2}, None, {"a": _restore_args(restore_type=int, dtype=np.complex64)}),
    ),
    Difference(
        "accepted",
        "pytree structure error",
        "restore_args may be a tree of the classes that were saved, also without an item",
        RestoreLeaves({"a": Point(1, 2)}, None, {"a": Point(_restore_args(), _restore_args())}),
    ),
    Difference(
        "accepted",
        "TypeHandler lookup failed",
        "the RestoreArgs of a leaf that is left alone do not matter",
        RestoreLeaves({"a": 1}, {"a": ...}, {"a": _restore_args(restore_type=Opaque)}, partial=True),
    ),
    Difference(
        "accepted",
        "is not compatible with the stored shape|Ranks do not match|Restored result is not a scalar",
        "the same, where they ask for a shape or a number; Orbax reads these leaves all the same",
        RestoreLeaves(_KEYS, {"a": ...}, {"a": _array_args(global_shape=(3,))}, partial=True),
        lambda gap, leaf: any(leaf is ... for leaf in jax.tree.leaves(gap.ours)),
    ),
    Difference(
        "accepted",
        "template has type <class 'ellipsis'>",
        "`...` may stand for a whole part of the tree",
        RestoreLeaves({"a": {"b": 1}}, {"a": ...}, None, partial=True),
    ),
    Difference(
        "accepted",
        "Tree is not complete",
        "None among restore_args stands for RestoreArgs() also without an item",
        RestoreLeaves({"a": 1.5}, {"a": 1.5}, {"a": None}, partial=True),
    ),
    Difference(
        "accepted",
        "invalid PRNG key data",
        "a dtype asks for the raw data of PRNG keys; and SaveArgs(dtype=...) does not spoil them",
        Save("PyTree", _KEYS, {"a": Spec("SaveArgs", {"dtype": np.dtype("float32")})}),
    ),
    Difference(
        "accepted",
        "what is stored here is not the data",
        "the same, where ckptkit reads the keys that Orbax cast",
        Save("PyTree", _KEYS, {"a": Spec("SaveArgs", {"dtype": np.dtype("float64")})}),
    ),
    # Restore: other values.
    Difference(
        "value",
        "",
        "`...` leaves a leaf alone with partial_restore=True too",
        RestoreLeaves({"a": 1, "b": 2}, {"a": 1, "b": ...}, None, partial=True),
        lambda gap, leaf: gap.ours is ...,
    ),
    Difference(
        "value",
        "",
        "`strict=False` pads and truncates np.ndarray targets too; Orbax ignores their shape",
        Restore(_X, {"a": np.zeros(5, np.float32)}, _NOT_STRICT),
        _resized,
    ),
    # Save: ckptkit refuses.
    Difference(
        "refused",
        "save_args holds a",
        "Orbax ignores save_args that do not fit the tree",
        Save("PyTree", _X, {"a": {"b": Spec("SaveArgs", {})}}),
    ),
    Difference(
        "refused",
        "does not support single arrays",
        "a bare np.ndarray has no name, as a bare jax.Array has none",
        Save("Standard", np.arange(3)),
    ),
    Difference(
        "refused",
        "Unsupported option `aggregate`",
        "PyTree too writes every leaf by itself; aggregate files are only read",
        Save("PyTree", _X, {"a": Spec("SaveArgs", {"aggregate": True})}),
    ),
    Difference(
        "refused",
        "without OCDBT it becomes a directory",
        "names that leave, or are, the checkpoint's directory make no files",
        Save("PyTree", 3, options={"use_ocdbt": False}),
    ),
    # Save: Orbax refuses.
    Difference("accepted", "Found empty item", "an empty tree comes back as it was", Save("PyTree", {})),
    Difference(
        "accepted",
        "target_byte_size=.* must be",
        "a chunk holds one element at least",
        Save("PyTree", _X, {"a": Spec("SaveArgs", {"chunk_byte_size": 1})}),
    ),
    Difference(
        "accepted",
        "Cannot save arrays with zero size",
        "an array without elements comes back as it was",
        Save("Standard", {"a": np.zeros((0, 2))}),
    ),
    # Errors of another class.
    Difference(
        "error",
        "has no attribute 'aggregate'",
        "Orbax takes save_args of any shape and trips over them later",
        Save("Standard", _X, {"a": {"b": Spec("SaveArgs", {})}}),
    ),
    Difference(
        "error",
        "^TypeError: Type mismatch at key path",
        "trees that differ are a ValueError, with partial_restore=True too",
        RestoreLeaves({"a": {"b": 1}}, {"a": [1]}, None, partial=True),
    ),
    Difference(
        "error",
        "^TypeError: JAX encountered invalid PRNG key data",
        "PRNG keys of another shape are a ValueError that names the leaf",
        RestoreLeaves({"a": jax.random.key(0)}, None, {"a": _array_args(global_shape=(3,), strict=False)}),
    ),
    Difference(
        "error",
        "^TypeError: Unsupported type: <class 'complex'>",
        "Python's complex is a leaf, so it is refused for its save_args alone",
        OneArray(1j, Spec("SaveArgs", {"aggregate": True})),
    ),
    Difference(
        "error",
        "^IndexError: list index out of range",
        "an error of Orbax's own making, for a sharding of more axes than the array",
        RestoreLeaves({"a": 3}, None, {"a": _array_args(sharding=_ONE_AXIS)}),
    ),
    Difference(
        "error",
        r"^TypeError: int\(\) argument must be",
        "another leaf of the tree is refused before any is read, which is when the cast would fail",
        RestoreLeaves(
            {"a": False, "b": 0},
            None,
            {
                "a": Spec("RestoreArgs", {"restore_type": int, "dtype": np.complex64}),
                "b": _array_args(sharding=REPLICATED, strict=False),
            },
        ),
    ),
]
