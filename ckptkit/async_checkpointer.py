"""Saves that go on while the program does: the checkpointer whose saves commit in a thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from ckptkit import _lifetime, errors
from ckptkit._checks import given_options
from ckptkit._gc import end_left_over, paused_gc, resumed_gc
from ckptkit._threads import Waitable
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
        self._thread: Waitable | None = None
        self._saving = threading.Lock()  # one save at a time, whoever calls
        self._handing_over = threading.Lock()  # for an instant, by whoever changes `_thread`

    def save(
        self,
        directory: Path,
        *args: Any,
        force: bool = False,
        custom_metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Starts a save; returns when the caller may change or donate its arrays. As `Checkpointer.save` otherwise.

        Where no thread starts, as once the program has ended, it returns when everything is written.

        Raises:
          errors.TimeoutError: the save before it did not finish in time; this one is not started then.
          errors.AsyncSaveError, errors.CheckpointError: also what went wrong in the previous save, if that was not seen yet;
            this one is not started then.
        """
        self._refuse_own_thread()
        end_left_over()
        if not self._saving.acquire(timeout=_seconds(self._options.timeout_secs)):
            raise self._late(self._options.timeout_secs)
        try:
            with paused_gc():
                saving = self._start(directory, args, kwargs, force=force, custom_metadata=custom_metadata)
                try:
                    self._finish_in_thread(saving)
                except BaseException as error:
                    with self._handing_over:
                        taken = saving.take()
                    if taken:
                        saving.abandon(error)
                    raise
                saving.let_go()
        finally:
            self._saving.release()

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
            _lifetime.refuse_fork()
            self._refuse_own_thread()
            if not thread.wait(_seconds(timeout_secs)):
                raise self._late(timeout_secs)
            with self._handing_over:
                if self._thread is thread:
                    self._thread = None
        self.check_for_errors()

    def check_for_errors(self) -> None:
        """Raises what went wrong in the background, once; does not wait."""
        error = _lifetime.unseen.pop(self, None)
        if isinstance(error, errors.CheckpointError):
            raise error
        if error is not None:
            raise errors.AsyncSaveError(f"the save in the background failed: {type(error).__name__}: {error}") from error

    def is_saving_in_progress(self) -> bool:
        """Whether a save is in flight."""
        thread = self._thread
        if thread is None:
            return False
        _lifetime.refuse_fork()
        return not thread.wait(0)

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

    def _get_ready(self) -> None:
        with resumed_gc():
            self.wait_until_finished()

    def _finish_in_thread(self, saving: Saving) -> None:
        """Starts the thread that commits; the caller commits where none starts, or none would be waited for."""
        # Not a daemon, so that the interpreter waits for it at exit.
        thread = Waitable(self._finish, (saving,), "ckptkit-commit")
        if not _lifetime.exiting():
            with contextlib.suppress(RuntimeError):  # no more threads, or the interpreter is about to exit
                thread.start()
                with self._handing_over:
                    self._thread = thread  # only now, since nobody can wait for a thread that has not started
                return
        saving.let_go()
        with self._handing_over:
            self._thread = thread
        try:
            with resumed_gc():
                thread.run()
        finally:
            with self._handing_over:
                self._thread = None
        self.check_for_errors()

    def _finish(self, saving: Saving) -> None:
        thread = threading.current_thread()
        saving.hand_over(thread)
        with self._handing_over:
            if not saving.take():
                return
            if isinstance(thread, Waitable):
                self._thread = thread  # also where Ctrl-C kept the caller from it
        try:
            saving.finish()
            if self._options.post_finalization_callback is not None:
                self._options.post_finalization_callback()
        except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that asks
            _lifetime.unseen[self] = error

    def _refuse_own_thread(self) -> None:
        """Raises `errors.BusyError` in a callback of the save in flight, which is not over before the callback returns."""
        if self._thread is not None and self._thread.runs_here():
            raise errors.BusyError(
                "a callback of a save cannot wait for that save, nor use its checkpointer, which would; use another checkpointer."
            )

    def _late(self, timeout_secs: float | None) -> errors.TimeoutError:
        return errors.TimeoutError(
            f"the save in the background did not finish within {timeout_secs} s; it goes on. Wait again, or allow more "
            "time: `timeout_secs` of AsyncOptions or of `join`, `timeout` of `SaveHandle.result`."
        )


def _seconds(timeout_secs: float | None) -> float:
    """A timeout as locks and threads take it, which refuse one that is too long for the system's clock."""
    return threading.TIMEOUT_MAX if timeout_secs is None else min(timeout_secs, threading.TIMEOUT_MAX)


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
