"""The everyday case: checkpointers of one tree, and `save`, `restore` and `save_async` in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ckptkit import args as args_lib
from ckptkit import errors
from ckptkit.async_checkpointer import AsyncCheckpointer, SaveHandle
from ckptkit.checkpointer import Checkpointer, Path
from ckptkit.handlers import PyTreeCheckpointHandler, StandardCheckpointHandler
from ckptkit.options import AsyncOptions, Devices, FileOptions, MultiprocessingOptions, OnCorrupt
from ckptkit.registry import Registry

__all__ = ["PyTreeCheckpointer", "StandardCheckpointer", "restore", "save", "save_async"]


class StandardCheckpointer(AsyncCheckpointer):
    """The everyday checkpointer: trees of arrays and numbers, saved in the background."""

    def __init__(
        self,
        *,
        storage: str | None = None,
        async_options: AsyncOptions | None = None,
        registry: Registry | None = None,
        multiprocessing_options: MultiprocessingOptions | None = None,
        file_options: FileOptions | None = None,
        observers: Sequence[Any] = (),
        **handler_options: Any,
    ) -> None:
        """As `AsyncCheckpointer`; `storage` and `handler_options` go to `StandardCheckpointHandler`."""
        super().__init__(
            StandardCheckpointHandler(storage=storage, multiprocessing_options=multiprocessing_options, **handler_options),
            async_options=async_options,
            registry=registry,
            multiprocessing_options=multiprocessing_options,
            file_options=file_options,
            observers=observers,
        )

    def restore(
        self, directory: Path, target: Any = None, *, strict: bool = True, fallback_sharding: Any = None, **kwargs: Any
    ) -> Any:
        """The tree at `directory`, like `target` where there is one.

        Args:
          directory: a path or URL.
          target: a tree of arrays, `jax.ShapeDtypeStruct` or numbers; or a `StandardRestore`.
          strict: a stored shape that differs from the target's is an error; False pads with zeros and truncates.
          fallback_sharding: where arrays go whose saved devices are not here.
          **kwargs: further fields of `StandardRestore`; or `args=`.
        """
        if isinstance(target, args_lib.CheckpointArgs) or "args" in kwargs:
            return super().restore(directory, *(() if target is None else (target,)), **kwargs)
        return super().restore(
            directory, args=args_lib.StandardRestore(target, strict=strict, fallback_sharding=fallback_sharding, **kwargs)
        )


class PyTreeCheckpointer(Checkpointer):
    """A synchronous checkpointer of any tree: `save(path, tree)`, `restore(path)`."""

    def __init__(self, *, storage: str | None = None, **options: Any) -> None:
        """As `Checkpointer`; `storage` goes to `PyTreeCheckpointHandler`."""
        super().__init__(PyTreeCheckpointHandler(storage=storage), **options)


def save(path: Path, tree_or_args: Any, *, storage: str | None = None, force: bool = False) -> None:
    """Saves a tree, or what a `CheckpointArgs` says, to `path`, however long that takes; as `Checkpointer.save`."""
    with _checkpointer_for(tree_or_args, storage) as checkpointer:
        checkpointer.save(path, tree_or_args, force=force)


def save_async(path: Path, tree_or_args: Any, *, storage: str | None = None, force: bool = False) -> SaveHandle:
    """Starts to save to `path`; returns when the caller may change or donate its arrays."""
    checkpointer = _checkpointer_for(tree_or_args, storage)
    checkpointer.save(path, tree_or_args, force=force)
    return SaveHandle(checkpointer)


def restore(path: Path, target_or_args: Any = None, *, devices: Devices | None = None, on_corrupt: OnCorrupt = "raise") -> Any:
    """What the checkpoint at `path` holds, like a target tree or as a `CheckpointArgs` says where there is one.

    Args:
      path: a path or URL.
      target_or_args: a target tree, args, or None to restore as saved.
      devices: opens a tree whose devices are not here: 'local' puts arrays on this process's first device, 'numpy' into host
        memory; a target's own shardings come first.
      on_corrupt: 'skip' restores a tree whose bytes are damaged in part: leaves that are not whole are `...`, with a warning.
    """
    args = () if target_or_args is None else (target_or_args,)
    asked = {name: value for name, value in (("devices", devices), ("on_corrupt", on_corrupt)) if value not in (None, "raise")}
    if asked and isinstance(target_or_args, args_lib.CheckpointArgs):
        name, value = next(iter(asked.items()))
        raise errors.ArgsError(f"{name}={value!r} goes with a tree; StandardRestore({name}=...) says the same.")
    if asked or (args and not isinstance(target_or_args, args_lib.CheckpointArgs)):
        args = (args_lib.StandardRestore(target_or_args, devices=devices, on_corrupt=on_corrupt),)
    with Checkpointer() as checkpointer:
        return checkpointer.restore(path, *args)


def _checkpointer_for(tree_or_args: Any, storage: str | None) -> AsyncCheckpointer:
    patient = AsyncOptions(timeout_secs=math.inf)  # nobody can give `save` a limit, and `SaveHandle.result` has its own
    if not isinstance(tree_or_args, args_lib.CheckpointArgs):
        return StandardCheckpointer(storage=storage, async_options=patient)
    if storage is not None:
        raise errors.ArgsError(f"storage={storage!r} goes with a tree; with args, give it to the constructor of their handler.")
    return AsyncCheckpointer(async_options=patient)
