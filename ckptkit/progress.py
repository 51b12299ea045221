"""Observers that show how a save or a restore goes on: `Checkpointer(observers=[progress.TqdmProgress()])`."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

from ckptkit import errors
from ckptkit.hookspecs import hookimpl
from ckptkit.reports import ProgressEvent

__all__ = ["LogProgress", "TqdmProgress"]


class LogProgress:
    """Writes a line to a log for each event.

    Args:
      logger: where to; by default the logger 'ckptkit.progress'.
      level: of the lines, as `logging` has it.
    """

    def __init__(self, logger: logging.Logger | None = None, level: int = logging.INFO) -> None:
        self._logger = logger or logging.getLogger(__name__)
        self._level = level

    @hookimpl
    def ckptkit_progress(self, event: ProgressEvent) -> None:
        """Logs how many bytes are done, and of how many."""
        self._logger.log(
            self._level,
            "%s %s: %.1f of %.1f MB%s",
            event.operation,
            event.path,
            event.done_byte_count / 1e6,
            event.total_byte_count / 1e6,
            ", finished" if event.finished else "",
        )


class TqdmProgress:
    """Shows a bar per operation on stderr; needs the extra `progress`. Silent where stderr is no terminal.

    Args:
      force: show the bar even there, as in a notebook.

    Raises:
      errors.ArgsError: tqdm is not installed.
    """

    def __init__(self, *, force: bool = False) -> None:
        try:
            from tqdm.auto import tqdm  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise errors.ArgsError("TqdmProgress needs tqdm: pip install tqdm, or use LogProgress.") from error
        self._tqdm = tqdm
        self._force = force
        self._bars: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    @hookimpl
    def ckptkit_progress(self, event: ProgressEvent) -> None:
        """Moves the bar of the operation; the last event closes it."""
        if not (self._force or sys.stderr.isatty()):
            return
        key = (event.operation, event.path)
        with self._lock:
            if key not in self._bars:
                self._bars[key] = self._tqdm(desc=" ".join(key), unit="B", unit_scale=True)
            bar = self._bars[key]
            bar.total = event.total_byte_count
            bar.update(event.done_byte_count - bar.n)
            if event.finished:
                self._bars.pop(key).close()
