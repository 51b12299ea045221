"""What the array-like type handlers share on restore: the shape and dtype wanted, whether they can be had, and the cast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ckptkit._casts import can_cast, cast, kind_of
from ckptkit.grid import Array, Index, index_shape, whole
from ckptkit.leaves.base import LeafSpec, Problem, RestoreArgs
from ckptkit.processes import Job

__all__ = ["Wanted", "clip", "fit", "resolve", "shared_by_all", "whole_part"]


class Wanted(NamedTuple):
    """The array that a request asks for.

    Attributes:
      shape: of the whole array.
      dtype: of the result.
      resized: the shape differs from the stored one, and that is allowed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    resized: bool


def resolve(spec: LeafSpec, request: RestoreArgs, shape: tuple[int, ...] | None, *, strict: bool) -> Wanted | Problem:
    """The array wanted, or why it cannot be made from the stored one; `shape` None means as stored."""
    if spec.array is None:
        return Problem(f"a {type(spec.inline).__name__} is stored here, not an array; ask for a value of that type.")
    stored = spec.array
    wanted = stored.shape if shape is None else tuple(shape)
    if wanted != stored.shape:
        if strict:
            return Problem(
                f"stored shape {stored.shape}, requested shape {wanted}; ask for the stored shape, or pass strict=False to pad "
                "with zeros and truncate."
            )
        if len(wanted) != len(stored.shape):
            return Problem(
                f"stored with {len(stored.shape)} axes, requested with {len(wanted)}; strict=False changes lengths only."
            )
    dtype = _dtype(stored.dtype, request)
    return dtype if isinstance(dtype, Problem) else Wanted(wanted, dtype, wanted != stored.shape)


def _dtype(stored: np.dtype[Any], request: RestoreArgs) -> np.dtype[Any] | Problem:
    """The dtype of the result, or why the stored one cannot become it."""
    if request.dtype is None:
        return stored
    try:
        dtype: np.dtype[Any] = np.dtype(request.dtype)
    except TypeError as error:
        return Problem(f"dtype {request.dtype!r} was requested: {error}; ask for a dtype of numpy, such as jnp.bfloat16.")
    if dtype == stored:  # as for most leaves, of which there may be many
        return stored
    if kind_of(dtype) not in "buifc":
        return Problem(f"stored dtype {stored}, requested dtype {dtype}, which holds no numbers; ask for a dtype of numbers.")
    if not can_cast(stored, dtype, request.defaults.casting):
        return Problem(f"stored dtype {stored}, requested dtype {dtype}; casting={request.defaults.casting!r} forbids it.")
    return dtype


def shared_by_all(needs: Sequence[Sequence[Index] | Problem], job: Job) -> list[Mapping[Index, tuple[int, ...]]]:
    """`TypeHandler.sharers` of a handler by which every process gets the whole value."""
    return [{} if isinstance(need, Problem) else dict.fromkeys(need, job.processes) for need in needs]


def clip(index: Index, shape: tuple[int, ...]) -> Index:
    """The part of an index that lies within a shape."""
    return tuple([(min(start, n), min(stop, n)) for (start, stop), n in zip(index, shape, strict=True)])


def fit(spec: LeafSpec, wanted: Wanted, index: Index, parts: Mapping[Index, Array]) -> Array:
    """The values of `index` of the wanted array: the part read for it, padded and cast."""
    assert spec.array is not None
    if not wanted.resized:
        part = parts[index]
    else:
        stored = clip(index, spec.array.shape)
        part = np.zeros(index_shape(index), spec.array.dtype)
        part[tuple(slice(0, n) for n in index_shape(stored))] = parts[stored]
    return cast(part, wanted.dtype)


def whole_part(spec: LeafSpec, wanted: Wanted, parts: Mapping[Index, Array]) -> Array:
    """The whole wanted array."""
    return fit(spec, wanted, whole(wanted.shape), parts)
