"""What ckptkit loads: the backend, registered under its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ckptkit
from ckptkit_safetensors.backend import SafetensorsBackend

if TYPE_CHECKING:
    from ckptkit import Registry

__all__ = ["ckptkit_register"]


@ckptkit.hookimpl
def ckptkit_register(registry: Registry) -> None:
    """Names the backend."""
    registry.add_storage(SafetensorsBackend())
