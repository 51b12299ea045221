"""What ckptkit loads: the type handler, registered for torch.Tensor and its subclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ckptkit
from ckptkit_torch.handler import TorchHandler

if TYPE_CHECKING:
    from ckptkit import Registry

__all__ = ["ckptkit_register"]


@ckptkit.hookimpl
def ckptkit_register(registry: Registry) -> None:
    """Names the leaf type; torch.nn.Parameter is a subclass of it."""
    registry.add_type_handler(TorchHandler(), "torch.Tensor")
