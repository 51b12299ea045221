"""Saves that go on while the program does: the checkpointer whose saves commit in a thread."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ckptkit import errors
from ckptkit._checks import given_options
from ckptkit.checkpointer import Checkpointer, Path
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.metadata.step import StepMetadata
from ckptkit.options import AsyncOptions, FileOptions, MultiprocessingOptions
from ckptkit.registry import Registry
from ckptkit.saving import Saving

__all__ = ["AsyncCheckpointer", "SaveHandle"]


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
        self._options = given_options(self, "async_options", async_options, AsyncOptions)
        self._deferring = self._options.create_directories_asynchronously
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
            thread.join(None if timeout_secs is None else min(timeout_secs, threading.TIMEOUT_MAX))
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
