"""Host memory onto a device."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Final

import jax
import numpy as np

from ckptkit.grid import Array

__all__ = ["placed"]


def _batched_device_put() -> Any:
    """What jax itself places arrays with, and has no public name for; None where this version has it no more, or otherwise."""
    try:
        from jax._src.interpreters.pxla import batched_device_put  # noqa: PLC0415 - another module in another version

        known = list(inspect.signature(batched_device_put).parameters)[:4] == ["aval", "sharding", "xs", "devices"]
    except (ImportError, TypeError, ValueError):  # the last two where it has no signature
        return None
    return batched_device_put if known else None


_PUT: Final = _batched_device_put()
_aval = functools.lru_cache(maxsize=256)(jax.core.ShapedArray)


def placed(data: Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of these values, all of them on each device of the sharding. The CPU backend adopts aligned memory uncopied.

    Without a mesh it is made by what the public functions end in, which takes 5 us instead of 15 to 30.
    """
    if _PUT is not None and isinstance(sharding, jax.sharding.SingleDeviceSharding) and sharding.is_fully_addressable:
        array: jax.Array = _PUT(_aval(data.shape, np.dtype(data.dtype)), sharding, [data], list(sharding.device_set))
        return array
    return jax.make_array_from_callback(data.shape, sharding, lambda _: data)
