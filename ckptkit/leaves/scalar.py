"""Python's int, float, bool and complex, and numpy's scalars: 0-d arrays on storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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
    """Single numbers. Without a target they come back as Python's."""

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
        return RestoreArgs(restore_type=kind, target=target, defaults=defaults)

    def needs(self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job) -> Sequence[Sequence[Index] | Problem]:
        return [self._need(spec, request) for spec, request in zip(specs, requests, strict=True)]

    def _need(self, spec: LeafSpec, request: RestoreArgs) -> Sequence[Index] | Problem:
        wanted = resolve(spec, request, () if request.target is not None or request.restore_type else None, strict=True)
        if isinstance(wanted, Problem):
            return wanted
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


def _scalar(stored: Array, request: RestoreArgs) -> Any:
    """The stored number as the type that the request names, through its dtype if it names one."""
    value = stored[()] if request.dtype is None else stored.astype(request.dtype)[()]
    kind: Any = request.restore_type
    if not isinstance(kind, type) or kind not in (*_PYTHON_TYPES, *np.sctypeDict.values()):
        return value.item()
    if issubclass(kind, np.generic):
        return np.asarray(value).astype(kind)[()]
    if kind is not complex and np.iscomplexobj(value):
        value = value.real
    plain: Any = kind
    return plain(value.item())


def _shortened(value: int) -> str:
    """A huge int without its middle; digits are not counted, since Python refuses to print very long ones."""
    return str(value) if abs(value) < 10**30 else f"of {value.bit_length()} bits"
