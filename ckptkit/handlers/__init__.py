"""Checkpoint handlers: the interface, and those that come with ckptkit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit._lazy import lazy_names

if TYPE_CHECKING:
    from ckptkit.handlers.array import ArrayCheckpointHandler as ArrayCheckpointHandler
    from ckptkit.handlers.base import AsyncCheckpointHandler as AsyncCheckpointHandler
    from ckptkit.handlers.base import CheckpointHandler as CheckpointHandler
    from ckptkit.handlers.base import DeferredPathAsyncCheckpointHandler as DeferredPathAsyncCheckpointHandler
    from ckptkit.handlers.base import PathAwaitingCreation as PathAwaitingCreation
    from ckptkit.handlers.composite import CompositeCheckpointHandler as CompositeCheckpointHandler
    from ckptkit.handlers.json import JsonCheckpointHandler as JsonCheckpointHandler
    from ckptkit.handlers.pytree import PyTreeCheckpointHandler as PyTreeCheckpointHandler
    from ckptkit.handlers.random_key import JaxRandomKeyCheckpointHandler as JaxRandomKeyCheckpointHandler
    from ckptkit.handlers.random_key import NumpyRandomKeyCheckpointHandler as NumpyRandomKeyCheckpointHandler
    from ckptkit.handlers.standard import StandardCheckpointHandler as StandardCheckpointHandler
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "ArrayCheckpointHandler": "ckptkit.handlers.array",
            "AsyncCheckpointHandler": "ckptkit.handlers.base",
            "CheckpointHandler": "ckptkit.handlers.base",
            "CompositeCheckpointHandler": "ckptkit.handlers.composite",
            "DeferredPathAsyncCheckpointHandler": "ckptkit.handlers.base",
            "JaxRandomKeyCheckpointHandler": "ckptkit.handlers.random_key",
            "JsonCheckpointHandler": "ckptkit.handlers.json",
            "NumpyRandomKeyCheckpointHandler": "ckptkit.handlers.random_key",
            "PathAwaitingCreation": "ckptkit.handlers.base",
            "PyTreeCheckpointHandler": "ckptkit.handlers.pytree",
            "StandardCheckpointHandler": "ckptkit.handlers.standard",
        },
    )
