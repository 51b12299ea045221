"""Where values go that are written one after the other: files of a local directory, or objects of a store."""

from __future__ import annotations

import abc
import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Final, cast

import numpy as np
import tensorstore as ts

from ckptkit._threads import Workers
from ckptkit.location import Location, mapped_os_errors
from ckptkit.storage._ocdbt_nodes import Place
from ckptkit.storage._tensorstore import context_for, writing_error
from ckptkit.storage._values import Bytes

__all__ = ["DataFiles", "data_files"]

# Linux caches a file in pieces as large as the calls that write it. Large ones are made of memory that a virtual machine may have
# given back to its host, where touching it takes several times as long as writing does (docs/performance.md).
_CALL_NBYTES: Final = 1 << 20
_SYNC_NBYTES: Final = 32 << 20
_MAX_BUFFERS_PER_CALL: Final = 1024  # IOV_MAX on Linux and macOS

_FILE_NBYTES: Final = 2 << 30
_OBJECT_NBYTES: Final = 64 << 20


def data_files(location: Location, base: str, target_nbytes: int | None) -> DataFiles:
    """Files named at random in `base` + 'd/' of an existing directory.

    Args:
      location: of the database.
      base: '' or the directory, below the location, of this writer's part of the database, with '/' at its end.
      target_nbytes: a new file is begun once one is this long; 0 never, None for a default.
    """
    if location.local_path is None:
        return _Objects(location, base, _OBJECT_NBYTES if target_nbytes is None else target_nbytes)
    return _LocalFiles(location.local_path, base, _FILE_NBYTES if target_nbytes is None else target_nbytes)


class DataFiles(abc.ABC):
    """Appends values. Used from one thread at a time."""

    def __init__(self, base: str, target_nbytes: int) -> None:
        self._base = base
        self._target_nbytes = target_nbytes
        self._path = ""
        self._offset = 0

    def append(self, values: Sequence[Bytes]) -> list[Place]:
        """Where the values are; their memory is not referenced any more.

        Raises:
          errors.StorageError: the system refused.
        """
        places, start = [], 0
        for end, value in enumerate(values, 1):
            if not self._path:
                self._path = f"d/{secrets.token_hex(16)}"
            places.append(Place(self._base, self._path, self._offset, value.size))
            self._offset += value.size
            if self._offset >= self._target_nbytes > 0:
                self._put(values[start:end])
                self._end()
                self._path, self._offset, start = "", 0, end
        self._put(values[start:])
        return places

    def finish(self) -> None:
        """Ends the last file."""
        if self._path:
            self._end()
            self._path, self._offset = "", 0

    @abc.abstractmethod
    def close(self) -> None:
        """Releases what is held, whether finished or not."""

    @abc.abstractmethod
    def _put(self, values: Sequence[Bytes]) -> None:
        """Appends to the file at `_path`."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Nothing is appended to the file at `_path` any more."""


class _LocalFiles(DataFiles):
    """A file is synced while it is written, where the system can, so that the disk has most of it when the save commits."""

    def __init__(self, directory: str, base: str, target_nbytes: int) -> None:
        super().__init__(base, target_nbytes)
        self._directory = os.path.join(directory, base)
        self._descriptor = -1
        self._unsynced = 0
        self._syncer = Workers(1, "ckptkit-sync-data")
        self._syncing: Future[None] | None = None

    def close(self) -> None:
        self._syncer.close()  # before the descriptor is closed, and may become another file's
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # what was finished is closed already
                os.close(descriptor)

    def _put(self, values: Sequence[Bytes]) -> None:
        if not values:
            return
        path = os.path.join(self._directory, self._path)
        with mapped_os_errors(path, "write"):
            if self._descriptor < 0:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            for buffers in _calls(values):
                _write(self._descriptor, buffers)
                self._unsynced += sum([buffer.size for buffer in buffers])
                self._sync()

    def _sync(self) -> None:
        """Begins to sync what was written, where that is much and nothing is being synced."""
        under_way = self._syncing is not None and not self._syncing.done()
        if hasattr(os, "fdatasync") and self._unsynced >= _SYNC_NBYTES and not under_way:
            self._synced()
            self._syncing = self._syncer.submit(os.fdatasync, self._descriptor)
            self._unsynced = 0

    def _synced(self) -> None:
        """Waits for the sync under way, and raises what it raised: the kernel tells that once, and not the commit's sync."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def _end(self) -> None:
        with mapped_os_errors(os.path.join(self._directory, self._path), "sync"):
            self._synced()
            descriptor, self._descriptor, self._unsynced = self._descriptor, -1, 0  # one that fails to close is closed
            os.close(descriptor)


def _calls(values: Sequence[Bytes]) -> Iterator[list[Bytes]]:
    """What one call each writes."""
    buffers: list[Bytes] = []
    size = 0
    for value in values:
        start = 0
        while start < value.size:
            if size == _CALL_NBYTES or len(buffers) == _MAX_BUFFERS_PER_CALL:
                yield buffers
                buffers, size = [], 0
            piece = value[start : start + _CALL_NBYTES - size]
            buffers.append(piece)
            start += piece.size
            size += piece.size
    if buffers:
        yield buffers


def _write(descriptor: int, buffers: list[Bytes]) -> None:
    """Writes all buffers; the kernel may stop early."""
    first = 0
    while first < len(buffers):
        rest = cast("list[Any]", buffers[first:])
        count = os.writev(descriptor, rest) if hasattr(os, "writev") else os.write(descriptor, rest[0])
        while first < len(buffers) and count >= buffers[first].size:
            count -= buffers[first].size
            first += 1
        if count:
            buffers[first] = buffers[first][count:]


class _Objects(DataFiles):
    """Keeps an object's values until it is long enough; one is on its way while the next fills."""

    def __init__(self, location: Location, base: str, target_nbytes: int) -> None:
        super().__init__(base, target_nbytes)
        self._url = location.url
        try:
            self._store = ts.KvStore.open(location.kvstore(), context=context_for(location)).result()
        except Exception as error:
            raise writing_error(error, self._url) from error
        self._values: list[Bytes] = []
        self._sending: Any = None

    def finish(self) -> None:
        super().finish()
        self._wait()

    def close(self) -> None:
        self._values.clear()
        if self._sending is not None:
            self._sending.exception()  # whoever removes what was written must not be overtaken

    def _put(self, values: Sequence[Bytes]) -> None:
        self._values += [value.copy() for value in values]

    def _end(self) -> None:
        self._wait()
        self._sending = self._store.write(self._base + self._path, np.concatenate(self._values).tobytes())
        self._values = []

    def _wait(self) -> None:
        sending, self._sending = self._sending, None
        try:
            if sending is not None:
                sending.result()
        except Exception as error:
            raise writing_error(error, self._url) from error
