"""The everyday handler of trees of arrays and numbers: translates args for the PyTree handler, nothing else."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from ckptkit import args as args_lib
from ckptkit import errors
from ckptkit.handlers.base import DeferredPathAsyncCheckpointHandler, DelegatingHandler, PathAwaitingCreation, folded_args
from ckptkit.handlers.pytree import PyTreeCheckpointHandler
from ckptkit.metadata.values import TreeMetadata
from ckptkit.options import MultiprocessingOptions, PyTreeMetadataOptions, RestoreDefaults
from ckptkit.pipeline.plan import LeafRules

if TYPE_CHECKING:
    from etils import epath

__all__ = ["StandardCheckpointHandler"]


class StandardCheckpointHandler(DelegatingHandler, DeferredPathAsyncCheckpointHandler):
    """Saves trees of jax.Array, np.ndarray, int, float and bool, and of leaf types that plugins add."""

    def __init__(  # noqa: PLR0913 - those of `PyTreeCheckpointHandler`
        self,
        *,
        save_concurrent_gb: float = 96,
        restore_concurrent_gb: float = 96,
        multiprocessing_options: MultiprocessingOptions | None = None,
        pytree_metadata_options: PyTreeMetadataOptions | None = None,
        use_ocdbt: bool = True,
        use_zarr3: bool = False,
        zarr3_crc32c: bool = False,
        compression: Literal["auto", "zstd"] | None = "auto",
        storage: str | None = None,
        target_data_file_size: int | None = None,
    ) -> None:
        """The arguments are those of `PyTreeCheckpointHandler`."""
        self._pytree = PyTreeCheckpointHandler(
            save_concurrent_gb=save_concurrent_gb,
            restore_concurrent_gb=restore_concurrent_gb,
            multiprocessing_options=multiprocessing_options,
            pytree_metadata_options=pytree_metadata_options,
            use_ocdbt=use_ocdbt,
            use_zarr3=use_zarr3,
            zarr3_crc32c=zarr3_crc32c,
            compression=compression,
            storage=storage,
            target_data_file_size=target_data_file_size,
        )
        super().__init__(self._pytree)

    @classmethod
    def typestr(cls) -> str:
        return "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"

    async def async_save(
        self,
        directory: epath.Path | PathAwaitingCreation,
        item: Any = None,
        save_args: Any = None,
        args: args_lib.StandardSave | None = None,
    ) -> list[Future[Any]]:
        """Stages the tree and starts to write it. `item` and `save_args` are deprecated: `args` says the same.

        Raises:
          errors.TreeError: no tree, a tree without leaves, or leaves that cannot be saved, all of them listed.
        """
        args = folded_args(args_lib.StandardSave, args, item=item, save_args=save_args)
        _check_tree(args.item)
        translated = args_lib.PyTreeSave(args.item, args.save_args, custom_metadata=args.custom_metadata)
        return self._pytree.start_save(directory, translated, _RULES)

    def restore(self, directory: epath.Path, item: Any = None, args: args_lib.StandardRestore | None = None) -> Any:
        """The tree, with the classes, types, dtypes and shardings of `args.item`, or as saved where there is none.

        `item` is deprecated: `args` says the same.

        Raises:
          errors.TargetError: lists every disagreement between checkpoint and target.
          errors.TopologyError: the saved devices are not here, and nothing says where to put the arrays.
          errors.CorruptCheckpointError: bytes differ from what was written.
        """
        args = folded_args(args_lib.StandardRestore, args, item=item)
        defaults = RestoreDefaults(
            strict=args.strict,
            fallback_sharding=args.fallback_sharding,
            casting=args.casting,
            support_layout=args.support_layout,
            devices=args.devices,
            on_corrupt=args.on_corrupt,
        )
        return self._pytree.restore_tree(directory, args.item, typed_by_target=True, defaults=defaults)

    def metadata(self, directory: epath.Path) -> TreeMetadata:
        return self._pytree.metadata(directory)


def _check_tree(item: Any) -> None:
    if item is None:
        raise errors.TreeError("Must provide item to save.")
    if isinstance(item, (jax.Array, np.ndarray, numbers.Number)):
        raise errors.TreeError(
            "StandardCheckpointHandler / StandardSave does not support single arrays or scalars. Use ArrayCheckpointHandler / "
            "ArraySave, or put it into a dict."
        )
    if isinstance(item, (Mapping, list, tuple)) and not item:
        raise errors.TreeError("Found empty item. A tree needs at least one entry; even {'a': None} is one.")


def _refusal(kind: type) -> str | None:
    if issubclass(kind, (str, bytes)):
        return "Standard saves arrays and numbers; use PyTreeSave for str, np.frombuffer for bytes."
    return None


_RULES = LeafRules(refusal=_refusal, as_array=lambda kind: issubclass(kind, np.generic), arrays_from_protocol=True)
