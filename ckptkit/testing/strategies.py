"""Hypothesis strategies for trees to save, their leaves, and where their arrays live.

Shardings are over the eight devices that `ckptkit.testing.fixtures` starts.
"""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

__all__ = [
    "JAX_DTYPES",
    "NUMPY_DTYPES",
    "Pair",
    "empty_nodes",
    "jax_arrays",
    "keys",
    "leaves",
    "mesh",
    "names",
    "numpy_arrays",
    "scalars",
    "shapes",
    "shardings",
    "trees",
    "values",
]

Pair = collections.namedtuple("Pair", ["first", "second"])  # noqa: PYI024 - untyped ones are what optax states look like to jax

NUMPY_DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"),
    *("complex64", "complex128", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4),
]
"""What numpy arrays are drawn of, ml_dtypes' included."""

JAX_DTYPES = [dtype for dtype in NUMPY_DTYPES if dtype not in ("int64", "uint64", "float64", "complex128")]
"""The same for jax, as it is unless told to use 64 bits."""


def values(shape: tuple[int, ...], dtype: Any, seed: int) -> npt.NDArray[Any]:
    """Reproducible values that every dtype can hold."""
    return np.random.default_rng(seed).integers(0, 2 if np.dtype(dtype) == bool else 7, shape).astype(dtype)


def mesh() -> jax.sharding.Mesh:
    """The eight devices as 4 x 2, axes 'data' and 'model'."""
    return jax.make_mesh((4, 2), ("data", "model"))


def shapes(max_dims: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Small shapes, many of which a mesh divides; none is empty."""
    return st.lists(st.sampled_from([1, 2, 3, 8, 16]), max_size=max_dims).map(tuple)


@st.composite
def shardings(draw: st.DrawFn, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """A sharding over this process's eight devices that divides the shape."""
    if draw(st.booleans()):
        return jax.sharding.SingleDeviceSharding(draw(st.sampled_from(jax.devices())))
    axes: list[str | None] = [None] * len(shape)
    for name, size in (("data", 4), ("model", 2)):
        fits = [i for i, n in enumerate(shape) if axes[i] is None and n % size == 0]
        axis = draw(st.sampled_from([None, *fits]))
        if axis is not None:
            axes[axis] = name
    spec: Any = jax.sharding.PartitionSpec
    return jax.sharding.NamedSharding(mesh(), spec(*axes))


@st.composite
def jax_arrays(draw: st.DrawFn, dtypes: Any = tuple(JAX_DTYPES)) -> jax.Array:
    """Arrays on one device or on several."""
    shape = draw(shapes())
    array = jnp.asarray(values(shape, draw(st.sampled_from(dtypes)), draw(st.integers(0, 99))))
    placed: jax.Array = jax.device_put(array, draw(shardings(shape)))
    return placed


@st.composite
def keys(draw: st.DrawFn) -> jax.Array:
    """Typed PRNG keys, single and several, of each implementation."""
    key = jax.random.key(draw(st.integers(0, 99)), impl=draw(st.sampled_from(["threefry2x32", "rbg", "unsafe_rbg"])))
    return key if draw(st.booleans()) else jax.random.split(key, 3)


def numpy_arrays(dtypes: Any = tuple(NUMPY_DTYPES)) -> st.SearchStrategy[npt.NDArray[Any]]:
    """Arrays in host memory."""
    return st.builds(values, shapes(), st.sampled_from(dtypes), st.integers(0, 99))


def scalars() -> st.SearchStrategy[Any]:
    """Python's bool, int of 64 bits, and float."""
    return st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))


def empty_nodes() -> st.SearchStrategy[Any]:
    """None and empty containers, which a checkpoint records like leaves."""
    return st.sampled_from([None, {}, [], ()])


def leaves() -> st.SearchStrategy[Any]:
    """Everything that `StandardSave` takes as a leaf, and empty nodes."""
    return st.one_of(jax_arrays(), numpy_arrays(), scalars(), keys(), empty_nodes())


def names() -> st.SearchStrategy[str]:
    """Keys of dicts, those among them that look like paths or escapes."""
    return st.one_of(
        st.sampled_from(["w", "b", "layer 0", "a/b", "50%", "größe", "日本"]), st.text("xyz", min_size=1, max_size=2)
    )


def trees(of: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[dict[str, Any]]:
    """Dicts of leaves, and of further dicts, lists, tuples and named tuples.

    Args:
      of: the leaves; those of `leaves` where it is None.
    """

    def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(
            st.dictionaries(names(), children, max_size=3),
            st.lists(children, max_size=3),
            st.lists(children, max_size=3).map(tuple),
            st.builds(Pair, children, children),
        )

    drawn = leaves() if of is None else of
    return st.dictionaries(names(), st.recursive(drawn, containers, max_leaves=6), min_size=1, max_size=4)
