"""Typed PRNG keys, which are stored as their raw key data (uint32, the implementation's key shape behind the key's own)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ckptkit.grid import ArraySpec
from ckptkit.leaves.base import LeafSpec, Problem, RestoreArgs

__all__ = ["KEY_IMPL", "is_key", "raw", "wanted_key"]

KEY_IMPL = "random_key_impl"
"""Where `LeafSpec.extra` has the name of the implementation, as Orbax stores it."""

_KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")
_NO_KEY_DATA = Problem("a PRNG key was requested, but what is stored here is not the data of one; ask for an array.")


def is_key(value: Any) -> bool:
    """Whether a jax.Array holds typed PRNG keys, the one kind whose dtype is not numpy's."""
    return not isinstance(value.dtype, np.dtype)


def raw(value: jax.Array) -> jax.Array:
    """The array that is stored: the data of typed keys, any other array itself."""
    return jax.random.key_data(value) if is_key(value) else value


def wanted_key(spec: LeafSpec, request: RestoreArgs) -> str | Problem | None:
    """The implementation of the typed key to make; None for a plain array."""
    stored, dtype = spec.extra.get(KEY_IMPL), request.dtype
    if dtype is not None and not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    if stored is not None and not (isinstance(stored, str) and _is_key_data(spec.array, stored)):
        return Problem(f"recorded as a PRNG key of implementation {stored!r:.80}, of which what is stored here is not the data.")
    if dtype is None:
        return stored
    for impl in dict.fromkeys([stored or _KEY_IMPLS[0], *_KEY_IMPLS]):
        made = _abstract_key(impl)
        if made is not None and made.dtype == dtype and stored in (None, impl):
            return impl if stored or _is_key_data(spec.array, impl) else _NO_KEY_DATA
    return Problem(f"a PRNG key of implementation {stored!r} is stored, one of dtype {dtype} was requested.")


@functools.lru_cache
def _abstract_key(impl: str) -> Any:
    """A typed key of an implementation, without its data; None for one that jax does not know."""
    try:
        return jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    except ValueError:
        return None


def _is_key_data(array: ArraySpec | None, impl: str) -> bool:
    """Whether a stored array can be wrapped as typed keys of an implementation, which jax may not know."""
    if _abstract_key(impl) is None:
        return False
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
    return array is not None and array.dtype == data.dtype and array.shape[-1:] == data.shape
