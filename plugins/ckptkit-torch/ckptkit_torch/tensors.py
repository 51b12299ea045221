"""Tensors to and from numpy arrays, and which tensors that cannot be done with. The one module that imports torch."""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401 - makes numpy know bfloat16 and float8 by name
import numpy as np
import numpy.typing as npt
import torch

from ckptkit.leaves import Problem
from ckptkit.storage import Index

__all__ = ["as_tensor", "flaw", "has_dtype", "host_cell", "numpy_dtype", "target_flaw"]

_OWN = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
"""Dtypes that numpy has itself."""

_ADDED = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
"""Dtypes that ml_dtypes adds to numpy; older versions of torch lack some."""

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {
    getattr(torch, name): np.dtype(name) for name in (*_OWN, *_ADDED) if hasattr(torch, name)
}
_TORCH = {dtype: torch_dtype for torch_dtype, dtype in _NUMPY.items()}

_RAW = {np.dtype(name): np.dtype(np.uint8 if np.dtype(name).itemsize == 1 else np.int16) for name in _ADDED}
"""The integers as which the two libraries hand each other what numpy does not have itself."""


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    """The numpy dtype of the same bits; None where there is none."""
    return _NUMPY.get(dtype)


def has_dtype(dtype: np.dtype[Any]) -> bool:
    """Whether torch has tensors of a numpy dtype."""
    return dtype in _TORCH


def flaw(tensor: torch.Tensor) -> Problem | None:
    """Why a tensor cannot be saved; None where it can."""
    if (problem := _flaw(tensor)) is not None:
        return problem
    if tensor.is_meta:
        return Problem("a tensor on the meta device holds no data; it is a target for restore.")
    if tensor.untyped_storage().nbytes() == 0 and tensor.numel():
        return Problem("the storage of this tensor was freed; save it while it holds its values.")
    return None


def target_flaw(target: Any) -> Problem | None:
    """Why nothing can be restored into a target; None where something can, or where it is no tensor."""
    return _flaw(target) if isinstance(target, torch.Tensor) else None


def _flaw(tensor: torch.Tensor) -> Problem | None:
    if (problem := _flaw_of_kind(type(tensor))) is not None:
        return problem
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else f"of layout {tensor.layout}"
        return Problem(f"the tensor is {kind}, and only dense ones are stored; use its parts, or a dense copy.")
    if tensor.is_quantized:
        return Problem(f"{tensor.dtype} is torch's alone; use tensor.dequantize().")
    if tensor.dtype not in _NUMPY:
        return Problem(f"{tensor.dtype} is torch's alone; use tensor.to() with one of {', '.join(map(str, _NUMPY))}.")
    if tensor.device.type not in ("cpu", "meta"):
        return Problem(f"the tensor is on device {tensor.device}; use tensor.cpu(), and move what is restored with .to().")
    return None


def _flaw_of_kind(kind: Any) -> Problem | None:
    if issubclass(kind, torch.nn.parameter.UninitializedTensorMixin):
        return Problem(f"of class {kind.__name__}, which has no shape yet; run the module once, so that it gets one.")
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return Problem(f"of class {kind.__name__}, which wraps other tensors; use those (of a DTensor, what to_local() gives).")
    return None


def host_cell(tensor: torch.Tensor, index: Index) -> npt.NDArray[Any]:
    """A part of a tensor as numpy sees it: a view, except where conjugation or negation has yet to be done."""
    part = tensor.detach()
    cut = tuple([slice(*bounds) for bounds in index])
    if part.is_conj() or part.is_neg():
        part, cut = part[cut].resolve_conj().resolve_neg(), ()
    dtype = _NUMPY[part.dtype]
    raw = _RAW.get(dtype)
    array: npt.NDArray[Any] = part.numpy() if raw is None else part.view(_TORCH[raw]).numpy().view(dtype)
    return array[cut] if cut else array


def as_tensor(array: npt.NDArray[Any], kind: type[torch.Tensor], target: Any) -> torch.Tensor:
    """A tensor of a class in the memory of an array.

    Args:
      array: nobody else's.
      kind: torch.Tensor or a subclass.
      target: the tensor whose `requires_grad` it gets; without one a Parameter of numbers that can have a gradient requires one.
    """
    raw = _RAW.get(array.dtype)
    tensor = torch.from_numpy(array if raw is None else array.view(raw)).view(_TORCH[array.dtype])
    tensor = tensor if kind is torch.Tensor else tensor.as_subclass(kind)
    if target is None:
        has_gradients = tensor.is_floating_point() or tensor.is_complex()
        return tensor.requires_grad_(issubclass(kind, torch.nn.Parameter) and has_gradients)
    if isinstance(target, torch.nn.Parameter) and not issubclass(kind, torch.nn.Parameter):
        return torch.nn.Parameter(tensor, target.requires_grad)  # of a class of its own, and marked as a Parameter
    return tensor.requires_grad_(target.requires_grad)
