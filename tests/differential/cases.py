"""Strategies: what to save and how to restore it, good and bad alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ckptkit import tree as ckpt_tree
from ckptkit.testing import strategies


class Point:
    """A node with attributes for keys."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x = x
        self.y = y


class Bare:
    """A node that jax numbers the children of."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x = x
        self.y = y


def _keyed(point: Point) -> Any:
    return ((jax.tree_util.GetAttrKey("x"), point.x), (jax.tree_util.GetAttrKey("y"), point.y)), None


jax.tree_util.register_pytree_with_keys(Point, _keyed, lambda _, children: Point(*children))
jax.tree_util.register_pytree_node(Bare, lambda bare: ((bare.x, bare.y), None), lambda _, children: Bare(*children))


class Spec(NamedTuple):
    """A per-leaf argument that each library makes with its own class."""

    name: str
    fields: dict[str, Any]

    def of(self, library: Any) -> Any:
        """The argument for one of the libraries."""
        return getattr(library, self.name)(**self.fields)


def made(specs: Any, library: Any) -> Any:
    """A tree of `Spec`s as a tree of the library's own."""
    return jax.tree.map(lambda spec: spec.of(library) if isinstance(spec, Spec) else spec, specs, is_leaf=_is_spec)


def _is_spec(node: Any) -> bool:
    return isinstance(node, Spec)


class Opaque:
    """Something that no library can save."""

    def __repr__(self) -> str:
        return "Opaque()"


REPLICATED = NamedSharding(strategies.mesh(), PartitionSpec())
leaves = strategies.leaves()
dtypes = st.sampled_from([np.float32, np.float64, np.int32, np.int64, np.int8, np.bool_, np.complex64, jnp.bfloat16, np.float16])
jax_dtypes = st.sampled_from([np.float32, np.int32, np.int8, np.bool_, np.complex64, jnp.bfloat16, np.float16])
odd_leaves = st.one_of(
    st.sampled_from(
        [
            "text",
            b"bytes",
            1j,
            2**63,
            -(2**70),
            np.float32(1.5),
            np.int64(7),
            np.bool_(True),
            np.complex64(1j),
            np.array(["a", "b"]),
            np.array([None, 1], object),
            np.array(["2020-01-01"], "datetime64[D]"),
            np.zeros((0, 2)),
            np.arange(3, dtype=">i4"),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.arange(8)[::2],
            np.float64("nan"),
            float("inf"),
            jnp.zeros((0,)),
            jax.ShapeDtypeStruct((2,), np.float32),
            Opaque(),
            int,
            {1, 2},
            range(3),
        ]
    ),
    st.binary(max_size=3),
)
saved_trees = st.one_of(
    strategies.trees(),
    st.dictionaries(st.sampled_from("abc"), st.one_of(strategies.leaves(), odd_leaves), min_size=1, max_size=3),
    st.dictionaries(st.sampled_from("abc"), st.builds(Point, strategies.leaves(), strategies.leaves()), min_size=1, max_size=2),
    st.dictionaries(st.sampled_from("abc"), st.builds(Bare, strategies.leaves(), strategies.leaves()), min_size=1, max_size=2),
    st.one_of(strategies.leaves(), odd_leaves),
)
good_trees = st.one_of(
    strategies.trees(),
    st.dictionaries(st.sampled_from("abc"), strategies.leaves(), min_size=1, max_size=3),
    st.dictionaries(st.sampled_from("abc"), st.builds(Point, strategies.leaves(), strategies.leaves()), min_size=1, max_size=2),
    st.dictionaries(st.sampled_from("abc"), st.builds(Bare, strategies.leaves(), strategies.leaves()), min_size=1, max_size=2),
)

save_args = st.one_of(
    st.none(),
    st.builds(
        lambda **fields: Spec("SaveArgs", fields),
        aggregate=st.sampled_from([False] * 7 + [True]),
        dtype=st.one_of(
            st.none(), st.sampled_from([np.dtype(name) for name in ("float32", "int32", jnp.bfloat16, "float64", "bool")])
        ),
        chunk_byte_size=st.sampled_from([None, 1, 16, 100, 10**6]),
    ),
)


@st.composite
def save_args_for(draw: Any, tree: Any) -> Any:
    """None, or a tree of SaveArgs like `tree`; now and then one that does not fit."""
    if draw(st.booleans()):
        return None
    if draw(st.integers(0, 9)) == 0:
        return {"another": Spec("SaveArgs", {})}
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [draw(save_args) for _ in leaves])


def _sharding(shape: tuple[int, ...]) -> Any:
    return st.one_of(strategies.shardings(shape), st.just(REPLICATED))


@st.composite
def _other_shape(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from([(), (2,), (2, 3)]))
    return tuple(max(1, n + draw(st.integers(-1, 2))) for n in shape)


odd_targets = st.sampled_from(
    [None, 3, 2.5, False, "text", b"x", {}, Opaque(), np.float32(1), {"q": 1}, [1], ..., 1j],
)


@st.composite
def target_leaves(draw: Any, leaf: Any) -> Any:
    """What to ask for in the place of a saved leaf."""
    shape = tuple(getattr(leaf, "shape", ()))
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    if is_key or ckpt_tree.is_empty_node(leaf):
        return draw(st.sampled_from([leaf] * 9 + [None, 3]))
    if draw(st.integers(0, 3)) == 0:
        shape = draw(_other_shape(shape))
    dtype = draw(jax_dtypes) if draw(st.booleans()) else np.dtype(getattr(leaf, "dtype", type(leaf)))
    narrow = jax.dtypes.canonicalize_dtype(dtype)
    kind = draw(st.sampled_from(["same"] * 4 + ["abstract"] * 4 + ["sharded"] * 4 + ["numpy"] * 3 + ["jax"] * 3 + ["odd"] * 2))
    made = {
        "same": lambda: leaf,
        "abstract": lambda: jax.ShapeDtypeStruct(shape, dtype),
        "sharded": lambda: jax.ShapeDtypeStruct(shape, narrow, sharding=draw(_sharding(shape))),
        "numpy": lambda: np.zeros(shape, draw(dtypes)),
        "jax": lambda: jax.device_put(jnp.zeros(shape, narrow), draw(_sharding(shape))),
        "odd": lambda: draw(odd_targets),
    }
    return made[kind]()


@st.composite
def targets_for(draw: Any, tree: Any) -> Any:
    """A target for a saved tree: mostly of its structure, sometimes with a key too many or too few; or None."""
    if draw(st.integers(0, 5)) == 0:
        return None
    leaves, structure = jax.tree.flatten(tree, is_leaf=ckpt_tree.is_empty_node)
    target = jax.tree.unflatten(structure, [draw(target_leaves(leaf)) for leaf in leaves])
    change = draw(st.integers(0, 9))
    if change == 0 and isinstance(target, dict):
        target = {**target, "unexpected": 1}
    if change == 1 and isinstance(target, dict):
        del target[draw(st.sampled_from(sorted(target)))]
    return target


_restore_types = st.sampled_from([None, None, int, float, bool, str, np.ndarray, jax.Array, np.float32, Opaque])


@st.composite
def restore_arg(draw: Any, leaf: Any) -> Any:
    kind = draw(st.integers(0, 9))
    if kind < 3:
        return None if kind == 0 else Spec("RestoreArgs", {})
    dtype = draw(st.one_of(st.none(), jax_dtypes))
    if kind < 6:
        return Spec("RestoreArgs", {"restore_type": draw(_restore_types), "dtype": dtype})
    shape = tuple(getattr(leaf, "shape", ()))
    if draw(st.integers(0, 2)) == 0:
        shape = draw(_other_shape(shape))
    fields = {"dtype": dtype, "strict": draw(st.booleans())}
    if draw(st.booleans()):
        fields["global_shape"] = shape
    if draw(st.integers(0, 3)):
        fields["sharding"] = draw(_sharding(shape))
    else:
        fields |= {"mesh": strategies.mesh(), "mesh_axes": PartitionSpec()}
    return Spec("ArrayRestoreArgs", fields)


@st.composite
def restore_args_for(draw: Any, tree: Any) -> Any:
    """None, or a tree of RestoreArgs for a saved tree."""
    if draw(st.booleans()):
        return None
    leaves, structure = jax.tree.flatten(tree, is_leaf=ckpt_tree.is_empty_node)
    args = [None if ckpt_tree.is_empty_node(leaf) else draw(restore_arg(leaf)) for leaf in leaves]
    return jax.tree.unflatten(structure, args)


@st.composite
def items_for(draw: Any, tree: Any) -> Any:
    """A tree of the structure of a saved one, some of it left out or left alone; or None."""
    if draw(st.booleans()):
        return None
    item = jax.tree.map(lambda leaf: draw(st.sampled_from([leaf, leaf, leaf, ..., None])), tree)
    if isinstance(item, dict) and draw(st.integers(0, 3)) == 0:
        del item[draw(st.sampled_from(sorted(item)))]
    return item
