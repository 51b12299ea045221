"""np.ndarray leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptkit.grid import Array, ArraySpec, Index, chunk_indices, fit_chunk_shape, whole
from ckptkit.leaves._requests import Wanted, clip, resolve, shared_by_all, whole_part
from ckptkit.leaves.base import Kinds, Leaf, LeafSpec, Problem, RestoreArgs, TypeHandler
from ckptkit.options import MAX_CHUNK_BYTE_SIZE, RestoreDefaults

if TYPE_CHECKING:
    from ckptkit.processes import Job

__all__ = ["NumpyHandler"]


class NumpyHandler(TypeHandler[Array]):
    """Arrays in host memory. They are copied when staged, since the caller may write into them at once."""

    typestr = "np.ndarray"
    orbax_typestr = "np.ndarray"

    def describe(self, leaves: Sequence[Leaf]) -> Sequence[LeafSpec | Problem]:
        return [self._describe(leaf) for leaf in leaves]

    def kinds(self, leaves: Sequence[Array]) -> Kinds | None:
        return Kinds.of([(type(leaf), leaf.shape, leaf.dtype) for leaf in leaves])

    def _describe(self, leaf: Leaf) -> LeafSpec | Problem:
        if isinstance(leaf.value, np.ma.MaskedArray):
            return Problem("the mask of a masked array would be lost; save its .data and its .mask.")
        args = leaf.save_args
        dtype = np.dtype(leaf.value.dtype if args is None or args.dtype is None else args.dtype).newbyteorder("=")
        shape = tuple(leaf.value.shape)
        limit = (args.chunk_byte_size if args else None) or MAX_CHUNK_BYTE_SIZE
        cell = fit_chunk_shape(shape, dtype.itemsize, limit, args.shard_axes if args else ())
        return LeafSpec(self.typestr, ArraySpec(leaf.name, shape, dtype, cell))

    def owned(self, leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job) -> Sequence[Sequence[Index]]:
        if not job.is_primary:
            return [()] * len(specs)
        return [list(chunk_indices(spec.array)) if spec.array else () for spec in specs]

    def stage(self, pieces: Sequence[tuple[Array, LeafSpec, Index]]) -> Sequence[Array]:
        return [_copy(leaf[tuple([slice(*bounds) for bounds in index])], spec) for leaf, spec, index in pieces]

    def request(self, target: Any, spec: LeafSpec, defaults: RestoreDefaults) -> RestoreArgs:
        dtype = None if target is None else target.dtype
        return RestoreArgs(restore_type=np.ndarray, dtype=dtype, target=target, defaults=defaults)

    def needs(self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job) -> Sequence[Sequence[Index] | Problem]:
        found = [self._resolve(spec, request) for spec, request in zip(specs, requests, strict=True)]
        return [
            wanted if isinstance(wanted, Problem) else (clip(whole(wanted.shape), spec.array.shape if spec.array else ()),)
            for spec, wanted in zip(specs, found, strict=True)
        ]

    def sharers(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job
    ) -> Sequence[Mapping[Index, tuple[int, ...]]]:
        return shared_by_all(self.needs(specs, requests, job), job)

    def assemble(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], parts: Sequence[Mapping[Index, Array]]
    ) -> Sequence[Array]:
        made = []
        for spec, request, part in zip(specs, requests, parts, strict=True):
            wanted = self._resolve(spec, request)
            assert isinstance(wanted, Wanted)
            made.append(whole_part(spec, wanted, part))
        return made

    def _resolve(self, spec: LeafSpec, request: RestoreArgs) -> Wanted | Problem:
        shape = getattr(request.target, "shape", None)
        return resolve(spec, request, shape, strict=request.defaults.strict)


_SPARE_BITS = frozenset(("bool", "int2", "int4", "uint2", "uint4"))


def _copy(part: Array, spec: LeafSpec) -> Array:
    """A C-contiguous copy, of the dtype to store."""
    assert spec.array is not None
    copy = np.array(part, dtype=spec.array.dtype, order="C")
    if copy.dtype.name in _SPARE_BITS:
        # Memory viewed as one of these may hold bits that the value does not use; storage and checksum see none of them.
        copy = copy.astype(np.int8).astype(copy.dtype)
    return copy
