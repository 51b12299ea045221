"""The checkpointer: finds the handler, gives it a temporary directory, and commits what it wrote."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import attrs

from ckptkit import _lifetime, choosing, discovery, errors, meeting, reports, restoration
from ckptkit._checks import a, given_options, optional
from ckptkit._gc import end_left_over, resumed_gc
from ckptkit.file_list import read_file_list, relying_on
from ckptkit.handlers.base import AsyncCheckpointHandler, CheckpointHandler, DeferredPathAsyncCheckpointHandler, run_coroutine
from ckptkit.location import Location
from ckptkit.metadata.json import checked_custom
from ckptkit.metadata.step import StepMetadata
from ckptkit.options import FileOptions, MultiprocessingOptions
from ckptkit.pipeline import answers
from ckptkit.processes import Job, job_of
from ckptkit.registry import Registry
from ckptkit.saving import Beginning, Saving

__all__ = ["Checkpointer", "Path"]

Path = str | os.PathLike[str]


class Checkpointer:
    """Saves and restores checkpoints; each call is complete when it returns. A context manager."""

    _deferring = False  # whether the directory may be made after the handler was called

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
          errors.ArgsTypeError: an argument of another type, such as a handler's class in the place of an instance.
          errors.ArgsError: an observer implements no hook.
        """
        optional(a(CheckpointHandler, "an instance of a CheckpointHandler, or None"))(self, "handler", handler)
        optional(a(Registry, "a ckptkit.Registry, or None"))(self, "registry", registry)
        a(Iterable, "objects with ckptkit.hookimpl methods")(self, "observers", observers)
        self._handler = handler
        self._registry = registry
        self._processes = given_options(self, "multiprocessing_options", multiprocessing_options, MultiprocessingOptions)
        self._file_options = given_options(self, "file_options", file_options, FileOptions)
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
          force: replace a checkpoint that is already there, which stays whole until the new one is; or a single file.
          custom_metadata: JSON that `metadata` returns.
          **kwargs: `args=` for the one `CheckpointArgs`, or fields by name.

        Raises:
          errors.ExistsError: the destination exists, and `force` is False, or it is a directory that is no checkpoint.
          errors.ArgsError: the args do not belong to the handler, or `multiprocessing_options` not to this job.
          errors.TreeError: lists every leaf that cannot be saved.
          errors.BusyError: another writer is saving to `directory`.
          errors.StorageError: the disk failed; what was there before is still there.
        """
        saving = self._start(directory, args, kwargs, force=force, custom_metadata=custom_metadata)
        saving.let_go()
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
          errors.ProcessError, errors.TimeoutError: with `MultiprocessingOptions(single_reader=True)`, other processes restore
            something else, fail, or do not come.
        """
        end_left_over()
        start = time.monotonic()
        with self._reading_together() as meet:
            self._check_open()
            registry = discovery.ready(self._registry)
            facts = {"path": registry.location(directory).url, "items": choosing.items_asked_for(args, kwargs)}
            meet.agree("restore", facts)
            for attempt in choosing.attempts(registry, directory):
                with attempt as location:
                    tracker = reports.Tracker("restore", location.url, self._notifier.progress)
                    handler = self._handler
                    try:
                        listed = read_file_list(location)
                        tracker.verified = listed is not None
                        if listed is not None:
                            listed.check(location, choosing.files_asked_for(args, kwargs))
                        handler, restore_args = self._restore_handler(registry, location, args, kwargs)
                        with reports.tracking(tracker), relying_on(location, listed):
                            restored = handler.restore(location.path, args=restore_args)
                    finally:
                        tracker.finish()
                        if handler is not None and handler is not self._handler:
                            handler.close()
        self._notifier.restored(
            reports.RestoreReport(
                path=location.url,
                byte_count=tracker.byte_count,
                leaf_count=tracker.leaf_count,
                verified=tracker.verified,
                total_secs=time.monotonic() - start,
                corrupt=tuple(tracker.corrupt),
            )
        )
        return restored

    def metadata(self, directory: Path) -> StepMetadata:
        """What is known of the checkpoint at `directory` without reading its arrays.

        Raises:
          errors.NotFoundError, errors.IncompleteError, errors.FormatError, errors.CorruptCheckpointError: as `restore`.
        """
        self._check_open()
        registry = discovery.ready(self._registry)
        for attempt in choosing.attempts(registry, directory):
            with attempt as location:
                listed = read_file_list(location)
                if listed is not None:
                    listed.check(location, choosing.is_description)
                providers = {} if listed is None else listed.providers
                step = attrs.evolve(choosing.step_metadata(location), has_checksums=listed is not None, providers=providers)
                handler = self._handler or choosing.stored_handler(registry, location, self._registry)
                try:
                    with relying_on(location, listed):
                        step = attrs.evolve(step, item_metadata=handler.metadata(location.path))
                finally:
                    if handler is not self._handler:
                        handler.close()
        return step

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
        _lifetime.enter()
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
        _lifetime.refuse_fork()  # where the connection to the other processes is of no use
        options = self._processes
        with meeting.convened(meeting.Meeting, job_of(options), options.barrier_sync_key_prefix, options.timeout_secs) as meet:
            self._get_ready()
            self._check_open()
            start = time.monotonic()
            custom = checked_custom({} if custom_metadata is None else custom_metadata, "custom_metadata")
            registry = discovery.ready(self._registry)
            handler, save_args = self._save_handler(registry, args, kwargs)
            answers.typestr(registry, handler)
            recorded = handler.item_typestrs(save_args)
            step = StepMetadata(
                item_handlers=recorded,
                providers=choosing.providers(registry, recorded),
                init_timestamp_nsecs=time.time_ns(),
                custom_metadata=custom,
            )
            location = registry.location(directory)
            facts = {"handlers": step.item_handlers}
            begin = Beginning(meet, registry, location, force=force, mode=self._file_options.path_permission_mode, facts=facts)
            ending: Beginning | Saving = begin  # whoever ends the save if this call does not
            deferred = (
                self._deferring and location.local_path is not None and isinstance(handler, DeferredPathAsyncCheckpointHandler)
            )
            try:
                tracker = reports.Tracker("save", location.url, self._notifier.progress)
                saving = Saving(begin, meet, handler, step, tracker, self._notifier, start, owned=handler is not self._handler)
                ending = saving
                saving.begin()
                begin.check()
                with reports.tracking(tracker), meeting.attending(meet):
                    temporary: Any = begin.later() if deferred else begin().temporary.path
                    if isinstance(handler, AsyncCheckpointHandler):
                        with answers.unhurried(registry, handler):
                            made = handler.async_save(temporary, args=save_args)
                            saving.writing = answers.futures(
                                registry, handler, run_coroutine(answers.coroutine(registry, handler, made))
                            )
                    else:
                        with resumed_gc():
                            meeting.on_primary(
                                lambda: answers.synchronous(registry, handler, handler.save(temporary, args=save_args))
                            )
            except BaseException as error:
                ending.abandon(error)
                raise
            saving.blocking_secs = time.monotonic() - start
            return saving

    def _reading_together(self) -> contextlib.AbstractContextManager[restoration.Restoration]:
        """A meeting with those who read for each other, if any do."""
        _lifetime.refuse_fork()  # as for a save
        options = self._processes
        job = job_of(options) if options.single_reader else Job()
        return restoration.restoring(job, options.barrier_sync_key_prefix, options.timeout_secs)

    def _get_ready(self) -> None:
        """What must have ended before the next save begins."""

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
