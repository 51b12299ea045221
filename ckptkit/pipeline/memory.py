"""Memory that chunks are read into."""

from __future__ import annotations

import errno
from typing import Any

import numpy as np

from ckptkit import errors
from ckptkit.grid import Array

__all__ = ["aligned_empty"]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised C-contiguous array whose memory starts at a multiple of 64 bytes.

    jax's CPU backend adopts such memory without a copy (512 MB: 2 ms instead of 640 ms).

    Raises:
      errors.StorageError: there is no memory for it.
    """
    size = dtype.itemsize
    for n in shape:
        size *= n
    try:
        memory = np.empty(size + 63, np.uint8)
    except MemoryError as error:
        raise errors.StorageError(errno.ENOMEM, f"there is no memory for an array of shape {shape} and dtype {dtype}") from error
    address: int = memory.__array_interface__["data"][0]
    return np.ndarray(shape, dtype, memory, -address % 64)  # 10,000 views of slices would take twice as long
