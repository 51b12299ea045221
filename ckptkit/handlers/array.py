"""The handler of a single array or number: translates args for the PyTree handler, nothing else."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ckptkit import args as args_lib
from ckptkit import errors
from ckptkit._checks import optional, text
from ckptkit.handlers.base import DelegatingHandler, folded_args
from ckptkit.handlers.pytree import PyTreeCheckpointHandler
from ckptkit.metadata.values import TreeMetadata
from ckptkit.options import RestoreDefaults

if TYPE_CHECKING:
    from etils import epath

__all__ = ["ArrayCheckpointHandler"]

_AGGREGATE_NAME = "ELEMENT"
"""The name that releases up to 0.5 gave a small array in the file of an aggregate checkpoint."""

_TYPES = (jax.Array, np.ndarray, int, float, complex, np.number, np.bool_)


class ArrayCheckpointHandler(DelegatingHandler):
    """Saves one jax.Array (typed PRNG keys too), np.ndarray or number, as a directory of zarr files.

    Args:
      checkpoint_name: of that directory; 'checkpoint' by default.
    """

    def __init__(self, checkpoint_name: str | None = None) -> None:
        optional(text)(self, "checkpoint_name", checkpoint_name)
        self._name = checkpoint_name or "checkpoint"
        self._pytree = PyTreeCheckpointHandler(use_ocdbt=False, aggregate_filename=self._name)
        super().__init__(self._pytree)

    @classmethod
    def typestr(cls) -> str:
        return "orbax.checkpoint._src.handlers.array_checkpoint_handler.ArrayCheckpointHandler"

    async def async_save(
        self, directory: epath.Path, item: Any = None, save_args: Any = None, args: args_lib.ArraySave | None = None
    ) -> list[Future[Any]]:
        """Stages the array and starts to write it. `item` and `save_args` are deprecated: `args` says the same.

        Raises:
          errors.ArgsTypeError: the item is neither an array nor a number.
          errors.TreeError: an array that cannot be saved, for its dtype or because it was deleted.
        """
        args = folded_args(args_lib.ArraySave, args, item=item, save_args=save_args)
        if not isinstance(args.item, _TYPES):
            raise errors.ArgsTypeError(
                f"Unsupported type: {type(args.item)}. ArraySave takes a jax.Array, an np.ndarray or a number; a tree of "
                "them goes into StandardSave."
            )
        how = None if args.save_args is None else {self._name: args.save_args}
        return self._pytree.start_save(directory, args_lib.PyTreeSave({self._name: args.item}, how))

    def restore(
        self, directory: epath.Path, item: Any = None, restore_args: Any = None, args: args_lib.ArrayRestore | None = None
    ) -> Any:
        """The array as saved, or as `args.restore_args` says; numpy's scalars come back as Python's.

        `item` and `restore_args` are deprecated: `args` says the same.

        Raises:
          errors.TargetError: no array of this handler's `checkpoint_name`, or one that cannot be restored as asked.
          errors.TopologyError: the saved devices are not here, and nothing says where to put the array.
          errors.CorruptCheckpointError: bytes differ from what was written.
        """
        args = folded_args(args_lib.ArrayRestore, args, item=item, restore_args=restore_args)
        stored = self.metadata(directory).tree
        name = _AGGREGATE_NAME if isinstance(stored, dict) and [*stored] == [_AGGREGATE_NAME] else self._name
        if not isinstance(stored, dict) or name not in stored:
            there = errors.listing(map(repr, stored), 20) if isinstance(stored, dict) else " a tree without names"
            raise errors.TargetError(
                f"{directory} holds no array of the name {self._name!r}; pass the name it was saved under, "
                f"ArrayCheckpointHandler(checkpoint_name). There is:{there}"
            )
        how = {name: args.restore_args}
        return self._pytree.restore_tree(directory, None, restore_args=how, defaults=RestoreDefaults())[name]

    def metadata(self, directory: epath.Path) -> TreeMetadata:
        return self._pytree.metadata(directory)
