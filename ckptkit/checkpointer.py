"""What users call: checkpointers, and `save`, `restore` and `save_async` for the everyday case.

A checkpointer finds the handler, gives it a temporary directory, and commits what it wrote. A synchronous save waits for
that; an asynchronous one leaves it to a thread. Both run the same code.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import attrs
from etils import epath

from ckptkit import args as args_lib
from ckptkit import choosing, commit, discovery, errors, reports
from ckptkit.handlers import PyTreeCheckpointHandler, StandardCheckpointHandler
from ckptkit.handlers.base import AsyncCheckpointHandler, CheckpointHandler, run_coroutine
from ckptkit.location import FileLocation, Location
from ckptkit.metadata.json import checked_custom
from ckptkit.metadata.step import StepMetadata
from ckptkit.options import AsyncOptions, Devices, FileOptions, MultiprocessingOptions
from ckptkit.registry import Registry
from ckptkit.saving import Saving, checked_futures

__all__ = [
    "AsyncCheckpointer",
    "Checkpointer",
    "PyTreeCheckpointer",
    "SaveHandle",
    "StandardCheckpointer",
    "restore",
    "save",
    "save_async",
]

Path = str | os.PathLike[str]


class Checkpointer:
    """Saves and restores checkpoints; each call is complete when it returns. A context manager."""

    def __init__(
        self,
        handler: CheckpointHandler | None = None,
        *,
        registry: Registry | None = None,
        multiprocessing_options: MultiprocessingOptions | None = None,
        file_options: FileOptions | None = None,
        observers: Sequence[Any] = (),
    ) -> None:
        """Sets what holds for every call.

        Args:
          handler: owns the directories; None to find it by the class of the args, or by what the checkpoint records.
          registry: where handlers, type handlers and backends are looked up; None for the default one.
          multiprocessing_options: which processes take part.
          file_options: how files are made.
          observers: objects with `ckptkit.hookimpl` methods, told of saves, restores and progress.

        Raises:
          errors.ArgsTypeError: `handler` is not a `CheckpointHandler`.
          errors.ArgsError: an observer implements no hook.
        """
        if handler is not None and not isinstance(handler, CheckpointHandler):
            raise errors.ArgsTypeError(
                f"handler must be a CheckpointHandler, not {handler!r}; pass an instance of a handler class."
            )
        self._handler = handler
        self._registry = registry
        self._multiprocessing_options = multiprocessing_options or MultiprocessingOptions()
        self._file_options = file_options or FileOptions()
        self._notifier = discovery.notifier(registry, observers)
        self._closed = False
        discovery.ready(registry)  # now, since importing backends and plugins would otherwise hold up the first save
        if handler is not None and handler.registry is None:
            handler.registry = registry

    @property
    def handler(self) -> CheckpointHandler | None:
        """The handler given, if any."""
        return self._handler

    def save(
        self,
        directory: Path,
        *args: Any,
        force: bool = False,
        custom_metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Saves one checkpoint to `directory`.

        Args:
          directory: a path or URL; made, with its parents.
          *args: one `CheckpointArgs`, or, with a handler, the fields of its save args (`save(path, tree)`).
          force: replace a checkpoint that is already there; it stays whole until the new one is.
          custom_metadata: JSON that `metadata` returns.
          **kwargs: `args=` for the one `CheckpointArgs`, or fields by name.

        Raises:
          errors.ExistsError: the destination exists, and `force` is False.
          errors.ArgsError: the args do not belong to the handler.
          errors.TreeError: lists every leaf that cannot be saved.
          errors.BusyError: another writer is saving to `directory`.
          errors.StorageError: the disk failed; what was there before is still there.
        """
        saving = self._start(directory, args, kwargs, force=force, custom_metadata=custom_metadata)
        saving.finish()

    def restore(self, directory: Path, *args: Any, **kwargs: Any) -> Any:
        """What the checkpoint at `directory` holds.

        Args:
          directory: a path or URL.
          *args: one `CheckpointArgs`, or, with a handler, the fields of its restore args; nothing to restore as saved.
          **kwargs: `args=` for the one `CheckpointArgs`, or fields by name.

        Raises:
          errors.NotFoundError: no checkpoint there, or a file that it needs is missing.
          errors.IncompleteError: a save that never finished.
          errors.TargetError: lists every disagreement between checkpoint and target.
          errors.CorruptCheckpointError: bytes differ from what was written.
        """
        self._check_open()
        start = time.monotonic()
        registry = discovery.ready(self._registry)
        while True:
            location = choosing.resolved(registry.location(directory))
            identity = commit.identity(location)
            tracker = reports.Tracker("restore", location.url, self._notifier.progress)
            handler = self._handler
            try:
                handler, restore_args = self._restore_handler(registry, location, args, kwargs)
                with reports.tracking(tracker):
                    restored = handler.restore(epath.Path(location.url), args=restore_args)
            except errors.CheckpointError:
                if commit.identity(location) == identity:
                    raise
            else:
                if commit.identity(location) == identity:
                    break
            finally:
                tracker.finish()
                if handler is not None and handler is not self._handler:
                    handler.close()
            # Another checkpoint took this one's place meanwhile, and files were opened by path: start over with the new one.
        self._notifier.restored(
            reports.RestoreReport(
                path=location.url,
                byte_count=tracker.byte_count,
                leaf_count=tracker.leaf_count,
                verified=tracker.verified,
                total_secs=time.monotonic() - start,
            )
        )
        return restored

    def metadata(self, directory: Path) -> StepMetadata:
        """What is known of the checkpoint at `directory` without reading its arrays.

        Raises:
          errors.NotFoundError, errors.IncompleteError, errors.FormatError: as `restore`.
        """
        self._check_open()
        registry = discovery.ready(self._registry)
        location = choosing.resolved(registry.location(directory))
        step = choosing.step_metadata(location)
        handler = self._handler or choosing.stored_handler(registry, location, self._registry)
        try:
            return attrs.evolve(step, item_metadata=handler.metadata(epath.Path(location.url)))
        finally:
            if handler is not self._handler:
                handler.close()

    def close(self) -> None:
        """Releases the handler; further calls raise `errors.ClosedError`."""
        if not self._closed:
            self._closed = True
            if self._handler is not None:
                self._handler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise errors.ClosedError(f"this {type(self).__name__} is closed; make another one.")

    def _start(
        self,
        directory: Path,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        force: bool,
        custom_metadata: Mapping[str, Any] | None,
    ) -> Saving:
        """Runs the part of a save that the caller waits for in any case."""
        self._check_open()
        start = time.monotonic()
        custom = checked_custom({} if custom_metadata is None else custom_metadata, "custom_metadata")
        registry = discovery.ready(self._registry)
        handler, save_args = self._save_handler(registry, args, kwargs)
        step = StepMetadata(
            item_handlers=handler.item_typestrs(save_args), init_timestamp_nsecs=time.time_ns(), custom_metadata=custom
        )
        location = registry.location(directory)
        if not isinstance(location, FileLocation):
            raise errors.ArgsError(
                f"{location.url}: this version commits checkpoints in local directories; save to one of those."
            )
        pending = commit.begin(location, force=force, mode=self._file_options.path_permission_mode)
        tracker = reports.Tracker("save", location.url, self._notifier.progress)
        saving = Saving(pending, handler, step, tracker, self._notifier, start, owned=handler is not self._handler)
        try:
            with reports.tracking(tracker):
                temporary = epath.Path(pending.temporary.url)
                if isinstance(handler, AsyncCheckpointHandler):
                    saving.writing = checked_futures(handler, run_coroutine(handler.async_save(temporary, args=save_args)))
                else:
                    handler.save(temporary, args=save_args)
        except BaseException:
            saving.abandon()
            raise
        saving.blocking_secs = time.monotonic() - start
        return saving

    def _save_handler(self, registry: Registry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CheckpointHandler, Any]:
        handler = self._handler
        save_args = choosing.one_args(args, kwargs)
        if handler is not None:
            return handler, choosing.belonging_args(registry, handler, save_args, args, kwargs, "save")
        if save_args is None:
            raise errors.ArgsError(
                "A Checkpointer without a handler takes one CheckpointArgs, such as ckptkit.args.StandardSave(tree); or use "
                "StandardCheckpointer().save(path, tree)."
            )
        return choosing.make_handler(registry.handler_for_args(save_args, use="save"), self._registry), save_args

    def _restore_handler(
        self, registry: Registry, location: Location, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[CheckpointHandler, Any]:
        restore_args = choosing.one_args(args, kwargs)
        handler = self._handler
        if handler is None and restore_args is not None:
            handler = choosing.make_handler(registry.handler_for_args(restore_args, use="restore"), self._registry)
            choosing.check_not_composite(location, restore_args)
            return handler, restore_args
        if handler is None:
            handler = choosing.stored_handler(registry, location, self._registry)
        return handler, choosing.belonging_args(registry, handler, restore_args, args, kwargs, "restore")


class AsyncCheckpointer(Checkpointer):
    """A checkpointer whose saves return once the arrays are staged, and commit in the background.

    One save is in flight at a time; the next waits for it. An error stays until it is raised by `wait_until_finished`,
    `check_for_errors`, `close` or the next `save`. The interpreter finishes a save in flight before it exits.
    """

    def __init__(
        self,
        handler: CheckpointHandler | None = None,
        timeout_secs: float | None = None,
        *,
        async_options: AsyncOptions | None = None,
        registry: Registry | None = None,
        multiprocessing_options: MultiprocessingOptions | None = None,
        file_options: FileOptions | None = None,
        observers: Sequence[Any] = (),
    ) -> None:
        """As `Checkpointer`; `timeout_secs` is short for `AsyncOptions(timeout_secs=...)`."""
        super().__init__(
            handler,
            registry=registry,
            multiprocessing_options=multiprocessing_options,
            file_options=file_options,
            observers=observers,
        )
        self._options = async_options or AsyncOptions()
        if timeout_secs is not None:
            self._options = attrs.evolve(self._options, timeout_secs=timeout_secs)
        self._thread: threading.Thread | None = None
        self._saving = threading.Lock()  # one save at a time, whoever calls
        self.unseen_error: BaseException | None = None

    def save(
        self,
        directory: Path,
        *args: Any,
        force: bool = False,
        custom_metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Starts a save; returns when the caller may change or donate its arrays. As `Checkpointer.save` otherwise.

        Raises:
          errors.AsyncSaveError, errors.CheckpointError: also what went wrong in the previous save, if that was not seen yet;
            this one is not started then.
        """
        with self._saving:
            self.wait_until_finished()
            saving = self._start(directory, args, kwargs, force=force, custom_metadata=custom_metadata)
            try:
                # Not a daemon, so that the interpreter waits for it at exit.
                thread = threading.Thread(target=self._finish, args=(saving,), name="ckptkit-commit", daemon=False)
                thread.start()
            except BaseException:
                saving.abandon()
                raise
            self._thread = thread

    def restore(self, directory: Path, *args: Any, **kwargs: Any) -> Any:
        """As `Checkpointer.restore`; a save in flight is finished first, so that what was saved can be restored."""
        self.wait_until_finished()
        return super().restore(directory, *args, **kwargs)

    def metadata(self, directory: Path) -> StepMetadata:
        """As `Checkpointer.metadata`; a save in flight is finished first."""
        self.wait_until_finished()
        return super().metadata(directory)

    def wait_until_finished(self) -> None:
        """Returns when no save is in flight.

        Raises:
          errors.CheckpointError: what went wrong in the background; once.
          errors.TimeoutError: `timeout_secs` passed; the save goes on.
        """
        self.join(self._options.timeout_secs)

    def join(self, timeout_secs: float | None) -> None:
        """As `wait_until_finished`, with a limit of its own; None waits as long as it takes."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_secs)
            if thread.is_alive():
                raise errors.TimeoutError(
                    f"the save in the background did not finish within {timeout_secs} s; it goes on. Wait again, or allow more "
                    "time with AsyncOptions(timeout_secs=...)."
                )
            if self._thread is thread:
                self._thread = None
        self.check_for_errors()

    def check_for_errors(self) -> None:
        """Raises what went wrong in the background, once; does not wait."""
        error, self.unseen_error = self.unseen_error, None
        _unseen.discard(self)
        if isinstance(error, errors.CheckpointError):
            raise error
        if error is not None:
            raise errors.AsyncSaveError(f"the save in the background failed: {type(error).__name__}: {error}") from error

    def is_saving_in_progress(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Waits for a save in flight, and releases the handler.

        Raises:
          errors.CheckpointError: what went wrong in the background, if that was not seen yet.
        """
        try:
            self.wait_until_finished()
        except errors.TimeoutError:  # the save in flight still needs the handler
            raise
        except errors.CheckpointError:
            super().close()
            raise
        super().close()

    def _finish(self, saving: Saving) -> None:
        try:
            saving.finish()
            if self._options.post_finalization_callback is not None:
                self._options.post_finalization_callback()
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that asks
            self.unseen_error = error
            _unseen.add(self)


_unseen: set[AsyncCheckpointer] = set()
"""Checkpointers with an error that nobody was told of; kept alive here where nobody else keeps them."""


@atexit.register
def _report_unseen_errors() -> None:
    """Makes the interpreter exit with status 1 where a save failed in the background and nobody was told.

    Threads have been joined by now, so every save has ended.
    """
    if not _unseen:
        return
    for checkpointer in _unseen:
        sys.stderr.write("ckptkit: a save in the background failed, and the program ended without asking for it:\n")
        traceback.print_exception(checkpointer.unseen_error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # an exit handler has no other way to set the status


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


class SaveHandle:
    """A save in the background."""

    def __init__(self, checkpointer: AsyncCheckpointer) -> None:
        self._checkpointer = checkpointer
        self._error: errors.CheckpointError | None = None

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return not self._checkpointer.is_saving_in_progress()

    def result(self, timeout: float | None = None) -> None:
        """Waits for the commit, at most `timeout` seconds.

        Raises:
          errors.CheckpointError: what went wrong; at every call.
          errors.TimeoutError: the time is over; the save goes on.
        """
        try:
            self._checkpointer.join(timeout)
        except errors.TimeoutError:
            raise
        except errors.CheckpointError as error:
            self._error = error
        if self._error is not None:
            raise self._error


def save(path: Path, tree_or_args: Any, *, storage: str | None = None, force: bool = False) -> None:
    """Saves a tree, or what a `CheckpointArgs` says, to `path`; as `Checkpointer.save`."""
    with _checkpointer_for(tree_or_args, storage) as checkpointer:
        checkpointer.save(path, tree_or_args, force=force)


def save_async(path: Path, tree_or_args: Any, *, storage: str | None = None, force: bool = False) -> SaveHandle:
    """Starts to save to `path`; returns when the caller may change or donate its arrays."""
    checkpointer = _checkpointer_for(tree_or_args, storage)
    checkpointer.save(path, tree_or_args, force=force)
    return SaveHandle(checkpointer)


def restore(path: Path, target_or_args: Any = None, *, devices: Devices | None = None) -> Any:
    """What the checkpoint at `path` holds, like a target tree or as a `CheckpointArgs` says where there is one.

    Args:
      path: a path or URL.
      target_or_args: a target tree, args, or None to restore as saved.
      devices: opens a tree whose devices are not here: 'local' puts arrays on this process's first device, 'numpy' into host
        memory; a target's own shardings come first.
    """
    args = () if target_or_args is None else (target_or_args,)
    if devices is not None and isinstance(target_or_args, args_lib.CheckpointArgs):
        raise errors.ArgsError(f"devices={devices!r} goes with a tree; StandardRestore(devices=...) says the same.")
    if devices is not None or (args and not isinstance(target_or_args, args_lib.CheckpointArgs)):
        args = (args_lib.StandardRestore(target_or_args, devices=devices),)
    with Checkpointer() as checkpointer:
        return checkpointer.restore(path, *args)


def _checkpointer_for(tree_or_args: Any, storage: str | None) -> AsyncCheckpointer:
    if not isinstance(tree_or_args, args_lib.CheckpointArgs):
        return StandardCheckpointer(storage=storage)
    if storage is not None:
        raise errors.ArgsError(f"storage={storage!r} goes with a tree; with args, give it to the constructor of their handler.")
    return AsyncCheckpointer()
