"""The type handler of tensors.

Cells, copies, casts and comparisons with a target are those of np.ndarray leaves: its type handler does them, on arrays that
look at the tensors' own memory. What is left is which tensors numpy can see, and what a restored array becomes.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptkit import Registry
from ckptkit.leaves import Kinds, Leaf, LeafSpec, Problem, RestoreArgs, TypeHandler
from ckptkit.options import RestoreDefaults
from ckptkit.storage import Index, Job, whole

if TYPE_CHECKING:
    import torch

__all__ = ["TorchHandler"]

_NOTHING = bytes(16)  # as long as the longest element


class TorchHandler(TypeHandler["torch.Tensor"]):
    """Dense tensors in host memory. They are copied when staged, since training writes into them in place.

    Values are kept, and neither gradients nor which tensors share memory. A target says the class (torch.Tensor,
    torch.nn.Parameter) and `requires_grad`; without one a torch.Tensor comes back that requires none.
    """

    typestr = "torch.Tensor"
    orbax_typestr = "np.ndarray"

    def __init__(self) -> None:
        arrays = Registry.with_builtins().type_handler_for(np.ndarray)
        assert arrays is not None
        self._arrays = arrays

    def describe(self, leaves: Sequence[Leaf]) -> Sequence[LeafSpec | Problem]:
        flaw_of = _tensors().flaw
        flaws = [flaw_of(leaf.value) for leaf in leaves]
        sound = [leaf for leaf, flaw in zip(leaves, flaws, strict=True) if flaw is None]
        described = iter(self._arrays.describe([leaf._replace(value=_outline(leaf.value)) for leaf in sound]))
        return [flaw or _own(next(described)) for flaw in flaws]

    def kinds(self, leaves: Sequence[torch.Tensor]) -> Kinds | None:
        return None if any(map(_tensors().flaw, leaves)) else Kinds.of([(leaf.shape, leaf.dtype) for leaf in leaves])

    def owned(self, leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job) -> Sequence[Sequence[Index] | Problem]:
        return self._arrays.owned(leaves, specs, job)

    def stage(self, pieces: Sequence[tuple[torch.Tensor, LeafSpec, Index]]) -> Sequence[Any]:
        host_cell = _tensors().host_cell
        cells = [(host_cell(leaf, index), spec) for leaf, spec, index in pieces]
        return self._arrays.stage([(cell, spec, whole(cell.shape)) for cell, spec in cells])

    def request(self, target: Any, spec: LeafSpec, defaults: RestoreDefaults) -> RestoreArgs:
        if target is None:
            return RestoreArgs(defaults=defaults)
        dtype = _tensors().numpy_dtype(target.dtype)
        return RestoreArgs(restore_type=type(target), dtype=dtype, target=target, defaults=defaults)

    def needs(self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job) -> Sequence[Sequence[Index] | Problem]:
        try:
            target_flaw = _tensors().target_flaw
        except ImportError as error:
            missing = Problem(f"a tensor, but torch cannot be imported ({error}); install it, or give a np.ndarray as target.")
            return [missing] * len(specs)
        flaws = [target_flaw(request.target) for request in requests]
        sound = [i for i, flaw in enumerate(flaws) if flaw is None]
        needs = iter(self._arrays.needs([specs[i] for i in sound], [requests[i] for i in sound], job))
        return [flaw or _checked(next(needs), spec, request) for flaw, spec, request in zip(flaws, specs, requests, strict=True)]

    def assemble(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], parts: Sequence[Mapping[Index, Any]]
    ) -> Sequence[torch.Tensor]:
        import torch  # noqa: PLC0415 - not before there is a tensor to make

        as_tensor = _tensors().as_tensor
        arrays = self._arrays.assemble(specs, requests, parts)
        return [
            as_tensor(array, request.restore_type or torch.Tensor, request.target)
            for array, request in zip(arrays, requests, strict=True)
        ]


@functools.cache
def _tensors() -> Any:
    """The module that works with torch itself, imported when first used."""
    return importlib.import_module("ckptkit_torch.tensors")


def _outline(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """An array of the tensor's shape and dtype, and of no values."""
    return np.ndarray(tuple(tensor.shape), _tensors().numpy_dtype(tensor.dtype), _NOTHING, strides=(0,) * tensor.ndim)


def _own(described: LeafSpec | Problem) -> LeafSpec | Problem:
    return described if isinstance(described, Problem) else described._replace(typestr=TorchHandler.typestr)


def _checked(need: Sequence[Index] | Problem, spec: LeafSpec, request: RestoreArgs) -> Sequence[Index] | Problem:
    """The same, or why torch has no tensor of what was asked for."""
    if isinstance(need, Problem) or spec.array is None:
        return need
    dtype = spec.array.dtype if request.dtype is None else np.dtype(request.dtype)
    if not _tensors().has_dtype(dtype):
        return Problem(f"torch has no dtype {dtype}; ask for one that it has: by a target, or RestoreArgs(dtype=...).")
    return need
