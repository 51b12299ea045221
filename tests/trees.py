"""Hypothesis strategies for trees to save, and the comparison that tests use."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

Pair = collections.namedtuple("Pair", ["first", "second"])  # noqa: PYI024 - untyped ones are what optax states look like to jax

NUMPY_DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"),
    *("complex64", "complex128", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4),
]
JAX_DTYPES = [dtype for dtype in NUMPY_DTYPES if dtype not in ("int64", "uint64", "float64", "complex128")]

_sizes = st.sampled_from([1, 2, 3, 8, 16])
_shapes = st.lists(_sizes, max_size=3).map(tuple)


def values(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    """Reproducible values that every dtype can hold."""
    return np.random.default_rng(seed).integers(0, 2 if np.dtype(dtype) == bool else 7, shape).astype(dtype)


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "model"))


@st.composite
def shardings(draw: Any, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """A sharding over this process's 8 devices that divides the shape."""
    if draw(st.booleans()):
        return jax.sharding.SingleDeviceSharding(draw(st.sampled_from(jax.devices())))
    axes: list[Any] = [None] * len(shape)
    for name, size in (("data", 4), ("model", 2)):
        fits = [i for i, n in enumerate(shape) if axes[i] is None and n % size == 0]
        if fits and draw(st.booleans()):
            axes[draw(st.sampled_from(fits))] = name
    return NamedSharding(mesh(), PartitionSpec(*axes))


@st.composite
def jax_arrays(draw: Any) -> jax.Array:
    shape = draw(_shapes)
    array = jnp.asarray(values(shape, draw(st.sampled_from(JAX_DTYPES)), draw(st.integers(0, 99))))
    return jax.device_put(array, draw(shardings(shape)))


@st.composite
def keys(draw: Any) -> jax.Array:
    key = jax.random.key(draw(st.integers(0, 99)), impl=draw(st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"])))
    return key if draw(st.booleans()) else jax.random.split(key, 3)


numpy_arrays = st.builds(values, _shapes, st.sampled_from(NUMPY_DTYPES), st.integers(0, 99))
scalars = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
empties = st.sampled_from([None, {}, [], ()])
leaves = st.one_of(jax_arrays(), numpy_arrays, scalars, keys(), empties)
_names = st.one_of(st.sampled_from(["w", "b", "layer 0", "a/b", "50%", "größe", "日本"]), st.text("xyz", min_size=1, max_size=2))


def _containers(children: Any) -> Any:
    return st.one_of(
        st.dictionaries(_names, children, max_size=3),
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.builds(Pair, children, children),
    )


trees = st.dictionaries(_names, st.recursive(leaves, _containers, max_leaves=6), min_size=1, max_size=4)


def abstract(tree: Any) -> Any:
    """The tree with every jax.Array replaced by its description."""

    def describe(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(describe, tree)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal containers of equal classes; leaves equal in type, dtype, shape, sharding and every bit."""
    if isinstance(expected, dict):
        assert (type(found), getattr(found, "keys", list)()) == (dict, expected.keys()), (where, found, expected)
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert (type(found), len(found)) == (type(expected), len(expected)), (where, found, expected)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(expected, jax.Array):
        _assert_same_array(found, expected, where)
    elif isinstance(expected, np.ndarray):
        assert (type(found), found.dtype, found.shape) == (np.ndarray, expected.dtype, expected.shape), (where, found, expected)
        assert found.tobytes() == expected.tobytes(), (where, found, expected)
    else:
        both_nan = isinstance(expected, float) and expected != expected and found != found  # noqa: PLR0124 - what nan is
        assert type(found) is type(expected), (where, found, expected)
        assert both_nan or found == expected, (where, found, expected)


def _assert_same_array(found: Any, expected: jax.Array, where: str) -> None:
    assert isinstance(found, jax.Array), (where, found)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), (where, found, expected)
    assert found.sharding == expected.sharding, (where, found.sharding, expected.sharding)
    if jax.dtypes.issubdtype(expected.dtype, jax.dtypes.prng_key):
        found, expected = jax.random.key_data(found), jax.random.key_data(expected)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes(), (where, found, expected)
