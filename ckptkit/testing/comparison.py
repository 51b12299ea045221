"""When two trees are the same: what every test of a round trip asks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["abstract", "assert_same"]


def abstract(tree: Any) -> Any:
    """The tree with every jax.Array replaced by its description: a target to restore into."""
    struct: Any = jax.ShapeDtypeStruct  # jax gives it no types

    def describe(leaf: Any) -> Any:
        return struct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(describe, tree)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal containers of equal classes; arrays equal in type, dtype, shape, sharding and every bit, others by `==`, or both nan.

    Raises:
      AssertionError: they differ; names the place, and both values there.
    """
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
    if jnp.issubdtype(expected.dtype, jax.dtypes.prng_key):
        found, expected = jax.random.key_data(found), jax.random.key_data(expected)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes(), (where, found, expected)
