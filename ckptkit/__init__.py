"""ckptkit saves and restores JAX pytrees, in Orbax's format; handlers, leaf types and storage backends are plugins.

Every name is imported when first used, so that `import ckptkit` itself costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit._lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ckptkit import args as args
    from ckptkit import checkpoint_utils as checkpoint_utils
    from ckptkit import errors as errors
    from ckptkit import handlers as handlers
    from ckptkit import hookspecs as hookspecs
    from ckptkit import leaves as leaves
    from ckptkit import metadata as metadata
    from ckptkit import options as options
    from ckptkit import progress as progress
    from ckptkit import reports as reports
    from ckptkit import storage as storage
    from ckptkit import type_handlers as type_handlers
    from ckptkit import utils as utils
    from ckptkit.async_checkpointer import AsyncCheckpointer as AsyncCheckpointer
    from ckptkit.checkpoint_utils import PLACEHOLDER as PLACEHOLDER
    from ckptkit.checkpoint_utils import construct_restore_args as construct_restore_args
    from ckptkit.checkpointer import Checkpointer as Checkpointer
    from ckptkit.commit import clean as clean
    from ckptkit.everyday import PyTreeCheckpointer as PyTreeCheckpointer
    from ckptkit.everyday import StandardCheckpointer as StandardCheckpointer
    from ckptkit.everyday import restore as restore
    from ckptkit.everyday import save as save
    from ckptkit.everyday import save_async as save_async
    from ckptkit.handlers.array import ArrayCheckpointHandler as ArrayCheckpointHandler
    from ckptkit.handlers.base import AsyncCheckpointHandler as AsyncCheckpointHandler
    from ckptkit.handlers.base import CheckpointHandler as CheckpointHandler
    from ckptkit.handlers.composite import CompositeCheckpointHandler as CompositeCheckpointHandler
    from ckptkit.handlers.json import JsonCheckpointHandler as JsonCheckpointHandler
    from ckptkit.handlers.pytree import PyTreeCheckpointHandler as PyTreeCheckpointHandler
    from ckptkit.handlers.random_key import JaxRandomKeyCheckpointHandler as JaxRandomKeyCheckpointHandler
    from ckptkit.handlers.random_key import NumpyRandomKeyCheckpointHandler as NumpyRandomKeyCheckpointHandler
    from ckptkit.handlers.standard import StandardCheckpointHandler as StandardCheckpointHandler
    from ckptkit.hookspecs import hookimpl as hookimpl
    from ckptkit.hookspecs import hookspec as hookspec
    from ckptkit.leaves.base import ArrayRestoreArgs as ArrayRestoreArgs
    from ckptkit.leaves.base import RestoreArgs as RestoreArgs
    from ckptkit.leaves.base import SaveArgs as SaveArgs
    from ckptkit.leaves.base import TypeHandler as TypeHandler
    from ckptkit.options import AsyncOptions as AsyncOptions
    from ckptkit.registry import Registry as Registry
    from ckptkit.registry import default_registry as default_registry
    from ckptkit.storage.base import StorageBackend as StorageBackend
    from ckptkit.verification import verify as verify
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "ArrayCheckpointHandler": "ckptkit.handlers.array",
            "ArrayRestoreArgs": "ckptkit.leaves.base",
            "AsyncCheckpointHandler": "ckptkit.handlers.base",
            "AsyncCheckpointer": "ckptkit.async_checkpointer",
            "AsyncOptions": "ckptkit.options",
            "CheckpointHandler": "ckptkit.handlers.base",
            "Checkpointer": "ckptkit.checkpointer",
            "CompositeCheckpointHandler": "ckptkit.handlers.composite",
            "JaxRandomKeyCheckpointHandler": "ckptkit.handlers.random_key",
            "JsonCheckpointHandler": "ckptkit.handlers.json",
            "NumpyRandomKeyCheckpointHandler": "ckptkit.handlers.random_key",
            "PLACEHOLDER": "ckptkit.checkpoint_utils",
            "PyTreeCheckpointHandler": "ckptkit.handlers.pytree",
            "PyTreeCheckpointer": "ckptkit.everyday",
            "Registry": "ckptkit.registry",
            "RestoreArgs": "ckptkit.leaves.base",
            "SaveArgs": "ckptkit.leaves.base",
            "StandardCheckpointHandler": "ckptkit.handlers.standard",
            "StandardCheckpointer": "ckptkit.everyday",
            "StorageBackend": "ckptkit.storage.base",
            "TypeHandler": "ckptkit.leaves.base",
            "args": "ckptkit.args",
            "checkpoint_utils": "ckptkit.checkpoint_utils",
            "clean": "ckptkit.commit",
            "construct_restore_args": "ckptkit.checkpoint_utils",
            "default_registry": "ckptkit.registry",
            "errors": "ckptkit.errors",
            "handlers": "ckptkit.handlers",
            "hookimpl": "ckptkit.hookspecs",
            "hookspec": "ckptkit.hookspecs",
            "hookspecs": "ckptkit.hookspecs",
            "leaves": "ckptkit.leaves",
            "metadata": "ckptkit.metadata",
            "options": "ckptkit.options",
            "progress": "ckptkit.progress",
            "reports": "ckptkit.reports",
            "restore": "ckptkit.everyday",
            "save": "ckptkit.everyday",
            "save_async": "ckptkit.everyday",
            "storage": "ckptkit.storage",
            "type_handlers": "ckptkit.type_handlers",
            "utils": "ckptkit.utils",
            "verify": "ckptkit.verification",
        },
    )
