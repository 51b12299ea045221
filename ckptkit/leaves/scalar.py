"""Python's int, float, bool and complex, and numpy's scalars: 0-d arrays on storage."""

from __future__ import annotations

import cmath
import functools
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from ckptkit._casts import can_cast, cast, kind_of
from ckptkit.grid import Array, ArraySpec, Index
from ckptkit.leaves._requests import resolve, shared_by_all
from ckptkit.leaves.base import Kinds, Leaf, LeafSpec, Problem, RestoreArgs, TypeHandler
from ckptkit.metadata.values import ScalarMetadata
from ckptkit.options import RestoreDefaults

if TYPE_CHECKING:
    from ckptkit.processes import Job

__all__ = ["ScalarHandler"]

_PYTHON_TYPES = (bool, int, float, complex)
_INT64 = np.iinfo(np.int64)


class ScalarHandler(TypeHandler[Any]):
    """Single numbers. Without a target they come back as Python's; a number that its target's type cannot hold is a problem."""

    typestr = "scalar"
    orbax_typestr = "scalar"

    def describe(self, leaves: Sequence[Leaf]) -> Sequence[LeafSpec | Problem]:
        return [self._describe(leaf) for leaf in leaves]

    def kinds(self, leaves: Sequence[Any]) -> Kinds | None:
        return None if any(map(_problem, leaves)) else Kinds.of(map(_dtype, leaves))

    def _describe(self, leaf: Leaf) -> LeafSpec | Problem:
        value, args = leaf.value, leaf.save_args
        if (problem := _problem(value)) is not None:
            return problem
        dtype = np.dtype(args.dtype) if args is not None and args.dtype is not None else _dtype(value)
        return LeafSpec(self.typestr, ArraySpec(leaf.name, (), dtype, ()))

    def owned(self, leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job) -> Sequence[Sequence[Index]]:
        return [((),) if job.is_primary else () for _ in specs]

    def stage(self, pieces: Sequence[tuple[Any, LeafSpec, Index]]) -> Sequence[Array]:
        return [np.asarray(value).astype(spec.array.dtype) for value, spec, _ in pieces if spec.array is not None]

    def request(self, target: Any, spec: LeafSpec, defaults: RestoreDefaults) -> RestoreArgs:
        kind = _plain_type(target.dtype) if isinstance(target, ScalarMetadata) else None if target is None else type(target)
        return RestoreArgs(restore_type=kind, dtype=_dtype_for(kind, spec), target=target, defaults=defaults)

    def needs(self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job) -> Sequence[Sequence[Index] | Problem]:
        return [self._need(spec, request) for spec, request in zip(specs, requests, strict=True)]

    def _need(self, spec: LeafSpec, request: RestoreArgs) -> Sequence[Index] | Problem:
        shape = () if request.target is not None or request.restore_type else None
        if request.dtype is None and request.restore_type is not None:
            request = attrs.evolve(request, dtype=_dtype_for(request.restore_type, spec))
        wanted = resolve(spec, request, shape, strict=True)
        if isinstance(wanted, Problem):
            return wanted
        given, casting = _result_dtype(request.restore_type, wanted.dtype), request.defaults.casting
        if not can_cast(wanted.dtype, given, casting):  # where a dtype is asked for beside a type
            return Problem(f"dtype {wanted.dtype} was requested as {request.restore_type}; casting={casting!r} forbids it.")
        return ((),) if wanted.shape == () else Problem(f"stored shape {wanted.shape}, but a scalar has no axes.")

    def sharers(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job
    ) -> Sequence[Mapping[Index, tuple[int, ...]]]:
        return shared_by_all(self.needs(specs, requests, job), job)

    def assemble(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], parts: Sequence[Mapping[Index, Array]]
    ) -> Sequence[Any]:
        return [_scalar(part[()], request) for request, part in zip(requests, parts, strict=True)]


def _problem(value: Any) -> Problem | None:
    if isinstance(value, ScalarMetadata):
        return Problem("a ScalarMetadata describes a number but holds none; it is a target for restore.")
    if isinstance(value, int) and not _INT64.min <= value <= _INT64.max:
        return Problem(f"the int {_shortened(value)} does not fit into 64 bits; save it as a str, or as several ints.")
    return None


def _dtype(value: Any) -> np.dtype[Any]:
    if isinstance(value, np.generic):
        return np.dtype(value.dtype).newbyteorder("=")
    return np.dtype(next(kind for kind in _PYTHON_TYPES if isinstance(value, kind)))


def _plain_type(dtype: np.dtype[Any]) -> type:
    """Python's type for numbers of a dtype."""
    return type(np.zeros((), dtype).item())


@functools.lru_cache(maxsize=256)
def _number_type(kind: Any) -> Any:
    """The type of numbers that a type is or derives from: Python's or numpy's, which lists those of ml_dtypes too; else None."""
    known = {*_PYTHON_TYPES, *np.sctypeDict.values()}
    return next((base for base in getattr(kind, "__mro__", ()) if base in known), None)


@functools.lru_cache(maxsize=256)
def _result_dtype(kind: Any, held: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype that numbers of another become for a type; Python's types hold every dtype whose numbers are theirs."""
    number = _number_type(kind)
    return held if number is None or (number in _PYTHON_TYPES and _plain_type(held) is number) else np.dtype(number)


def _dtype_for(kind: Any, spec: LeafSpec) -> np.dtype[Any] | None:
    """The dtype that a type means for what is stored, so that it is asked whether that may be had."""
    return None if kind is None or spec.array is None else _result_dtype(kind, spec.array.dtype)


def _scalar(stored: Array, request: RestoreArgs) -> Any:
    """The stored number as the type that the request names, through its dtype if it names one; a `Problem` if it does not fit."""
    given = stored if request.dtype is None else cast(stored, np.dtype(request.dtype))
    number = cast(given, _result_dtype(request.restore_type, given.dtype))
    for before, after in pairwise((stored, given, number)):
        if not _is_kept(before.item(), after.item(), kind_of(after.dtype)):
            return Problem(f"the number {before.item()} is stored, which {after.dtype} cannot hold; ask for {before.dtype}.")
    kind = _number_type(request.restore_type)
    return number.item() if kind is None or kind in _PYTHON_TYPES else number.astype(kind)[()]


def _is_kept(stored: Any, number: Any, kind: str) -> bool:
    """Whether a number of a kind is what is left of another: an integer lacks its fractional part, what is finite stays so."""
    if kind in "ui":
        return math.isfinite(stored.real) and math.trunc(stored.real) == number
    return kind not in "fc" or cmath.isfinite(number) or not cmath.isfinite(stored)


def _shortened(value: int) -> str:
    """A huge int without its middle; digits are not counted, since Python refuses to print very long ones."""
    return str(value) if abs(value) < 10**30 else f"of {value.bit_length()} bits"
