"""The built-in plugin: the one module that names the concrete classes of ckptkit and binds them."""

from __future__ import annotations

import urllib.parse
from typing import TYPE_CHECKING

import jax
import numpy as np

from ckptkit import args, errors
from ckptkit.handlers.array import ArrayCheckpointHandler
from ckptkit.handlers.composite import CompositeCheckpointHandler
from ckptkit.handlers.json import JsonCheckpointHandler
from ckptkit.handlers.pytree import PyTreeCheckpointHandler
from ckptkit.handlers.random_key import JaxRandomKeyCheckpointHandler, NumpyRandomKeyCheckpointHandler
from ckptkit.handlers.standard import StandardCheckpointHandler
from ckptkit.hookspecs import hookimpl
from ckptkit.leaves.jax_array import JaxArrayHandler
from ckptkit.leaves.numpy import NumpyHandler
from ckptkit.leaves.scalar import ScalarHandler
from ckptkit.leaves.string import StringHandler
from ckptkit.location import FileLocation
from ckptkit.metadata.values import ArrayMetadata, ScalarMetadata, StringMetadata
from ckptkit.storage.kvstore import memory_location
from ckptkit.storage.ocdbt import OcdbtBackend
from ckptkit.storage.zarr import ZarrBackend

if TYPE_CHECKING:
    from ckptkit.registry import Registry

__all__ = ["ckptkit_register"]


@hookimpl
def ckptkit_register(registry: Registry) -> None:
    """Binds args to handlers, leaf types to type handlers, and names the backends and the schemes."""
    registry.add_args(args.StandardSave, StandardCheckpointHandler, for_save=True)
    registry.add_args(args.StandardRestore, StandardCheckpointHandler, for_restore=True)
    registry.add_args(args.PyTreeSave, PyTreeCheckpointHandler, for_save=True)
    registry.add_args(args.PyTreeRestore, PyTreeCheckpointHandler, for_restore=True)
    registry.add_args(args.JsonSave, JsonCheckpointHandler, for_save=True)
    registry.add_args(args.JsonRestore, JsonCheckpointHandler, for_restore=True)
    registry.add_args(args.ArraySave, ArrayCheckpointHandler, for_save=True)
    registry.add_args(args.ArrayRestore, ArrayCheckpointHandler, for_restore=True)
    registry.add_args(args.JaxRandomKeySave, JaxRandomKeyCheckpointHandler, for_save=True)
    registry.add_args(args.JaxRandomKeyRestore, JaxRandomKeyCheckpointHandler, for_restore=True)
    registry.add_args(args.NumpyRandomKeySave, NumpyRandomKeyCheckpointHandler, for_save=True)
    registry.add_args(args.NumpyRandomKeyRestore, NumpyRandomKeyCheckpointHandler, for_restore=True)
    registry.add_args(args.Composite, CompositeCheckpointHandler, for_save=True, for_restore=True)
    # Abstract arrays and metadata are targets, and tracers get an error of their own; none of them can be saved.
    registry.add_type_handler(JaxArrayHandler(), (jax.Array, jax.ShapeDtypeStruct, ArrayMetadata, jax.core.Tracer))
    registry.add_type_handler(NumpyHandler(), np.ndarray)
    registry.add_type_handler(ScalarHandler(), (int, float, bool, complex, np.generic, ScalarMetadata))
    registry.add_type_handler(StringHandler(), (str, StringMetadata))
    registry.add_storage(OcdbtBackend())
    registry.add_storage(ZarrBackend())
    registry.add_scheme("file", _file_location)
    registry.add_scheme("memory", memory_location)


def _file_location(path_or_url: str) -> FileLocation:
    """A directory on this machine, from a path or from 'file:///path'."""
    if not path_or_url.lower().startswith("file://"):
        return FileLocation(path_or_url)
    url = urllib.parse.urlsplit(path_or_url)
    if url.netloc not in ("", "localhost") or url.query or url.fragment:
        raise errors.ArgsError(f"{path_or_url!r}: expected file:///absolute/path, with nothing else in the URL.")
    return FileLocation(urllib.parse.unquote(url.path))
