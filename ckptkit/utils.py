"""Names of Orbax's `utils` that its tutorials use, so that moving to ckptkit changes an import and no call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ckptkit import errors

__all__ = ["to_shape_dtype_struct"]


def to_shape_dtype_struct(leaf: Any, dtype: Any = None, scalar_dtype: Callable[[Any], Any] | None = None) -> Any:
    """The description of an array: what stands for it in a target; for `jax.tree.map` over a tree.

    Args:
      leaf: an array, a `jax.ShapeDtypeStruct` or a number.
      dtype: to be restored as, instead of the array's own.
      scalar_dtype: makes of a number what stands for it; None leaves it as it is.

    Raises:
      errors.ArgsTypeError: neither an array nor a number.
    """
    if isinstance(leaf, (bool, int, float, complex, np.generic)):
        return leaf if scalar_dtype is None else scalar_dtype(leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise errors.ArgsTypeError(f"{type(leaf)} has no shape and dtype; expected an array or a number.")
    make: Any = jax.ShapeDtypeStruct  # jax leaves its constructor untyped
    return make(leaf.shape, leaf.dtype if dtype is None else dtype, sharding=getattr(leaf, "sharding", None))
