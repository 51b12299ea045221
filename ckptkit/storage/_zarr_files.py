"""Zarr arrays as directories of files: an array named `a/b` has its document at `a/b/.zarray` and its chunks beside it.

The writer writes anywhere that takes whole files by name, what reads here is for directories of this machine. A directory may
come from a stranger: nothing is read through a link that leads out of it, or from what is no regular file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

from ckptkit import errors
from ckptkit._threads import Workers
from ckptkit.location import mapped_os_errors
from ckptkit.options import StorageOptions
from ckptkit.processes import Job
from ckptkit.storage._futures import Pending
from ckptkit.storage._values import Bytes, Extent, Filled, Value, Values, key_prefix, places_of, read_files
from ckptkit.storage._zarr_cells import encoded_cell
from ckptkit.storage.base import ArraySpec, Chunk, Writer
from ckptkit.storage.zarr_documents import DOCUMENT_NAMES, Document, documented

__all__ = ["FileValues", "FileWriter", "create_file", "holds_document"]

# What all keys may stand for, beyond what the files hold that their links lead to, and how many times that.
_MAX_LINKED_NBYTES: Final = 256 << 20
_MAX_RATIO: Final = 64

# One task for a thread.
_BATCH_NBYTES: Final = 8 << 20
_BATCH_FILES: Final = 256


class FileValues(Values):
    """The files below a directory; their keys are their paths."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def entries(self) -> Mapping[bytes, Value]:
        found: dict[bytes, Value] = {}
        held: dict[tuple[int, int], int] = {}
        claimed = 0
        with mapped_os_errors(self._directory, "list"):
            for path, entry in _files(self._directory):
                status = self._status(entry)
                found[os.fsencode(path)] = Extent(path, 0, status.st_size)
                held[status.st_dev, status.st_ino] = status.st_size
                claimed += status.st_size
        stored = sum(held.values())
        if claimed > _MAX_LINKED_NBYTES + _MAX_RATIO * stored:
            what = f"links make {claimed} bytes of the {stored} in the files, which is not to be trusted"
            raise errors.FormatError(f"{self._directory}: {what}; copy the files in their place.")
        return dict(sorted(found.items()))

    def read_into(self, wanted: Sequence[tuple[Value, Bytes]], filled: Filled = lambda _: None) -> None:
        read_files(self._directory, places_of(wanted), filled)

    def _status(self, entry: os.DirEntry[str]) -> os.stat_result:
        """The status of a regular file, which lies below the directory itself where the entry is a link."""
        if entry.is_symlink() and not os.path.realpath(entry.path).startswith(os.path.realpath(self._directory) + os.sep):
            raise errors.FormatError(f"{entry.path}: the link leads out of {self._directory}; copy the file in its place.")
        status = entry.stat()
        if not stat.S_ISREG(status.st_mode):
            raise errors.FormatError(f"{entry.path}: expected a regular file, or a directory that is no link.")
        return status


def holds_document(directory: str) -> bool:
    """Whether there is an array's document anywhere below a directory; False where there is no directory."""
    try:
        return any(entry.name in DOCUMENT_NAMES.values() for _, entry in _files(directory))
    except OSError:
        return False


def _files(directory: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Whatever lies below a directory and is no directory, with its path there; links are not followed."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(directory, prefix)) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{prefix}{entry.name}/")
                else:
                    yield prefix + entry.name, entry


class FileWriter(Writer):
    """Writes files in threads of its own. Syncing them is left to the commit, which syncs every file of a checkpoint.

    Args:
      create: makes a file of a name and its content, or raises `errors.StorageError`.
      threads: how many files are written at a time.
      arrays: everything that will be written.
      options: how.

    A write that fails raises `errors.StorageError` from its future, from the next call, and at the latest from `commit`.
    """

    def __init__(
        self, create: Callable[[str, Any], None], threads: int, arrays: Sequence[ArraySpec], options: StorageOptions, job: Job
    ) -> None:
        self._create = create
        self._pool = Workers(threads, "ckptkit-write-files")
        self._documents: dict[str, Document] = {}
        files: list[tuple[str, Any]] = []
        for array, document, data in documented(arrays, options):
            self._documents[array.name] = document
            if job.is_primary:
                files.append((key_prefix(array.name) + DOCUMENT_NAMES[document.version], data))
        batches = [files[i : i + _BATCH_FILES] for i in range(0, len(files), _BATCH_FILES)]
        self._pending = Pending()
        self._pending.add([self._pool.submit(self._write_documents, batch) for batch in batches])

    def write(self, chunks: Sequence[Chunk]) -> Future[None]:
        self._pending.raise_failed()
        return self._pending.add([self._pool.submit(self._write_chunks, batch) for batch in _batches(chunks)])

    def commit(self) -> None:
        self._pending.wait()
        self._pool.close()

    def abort(self) -> None:
        self._pool.close(cancel=True)

    def _write_documents(self, files: Sequence[tuple[str, bytes]]) -> None:
        for key, data in files:
            self._create(key, data)

    def _write_chunks(self, chunks: list[Chunk]) -> None:
        while chunks:  # emptied, so that nothing refers to the data any more when the future is done
            chunk = chunks.pop()
            document = self._documents[chunk.array.name]
            self._create(key_prefix(chunk.array.name) + document.chunk_key(chunk.index), encoded_cell(chunk.data, document))


def create_file(path: str, data: Any, *, sync: bool = False) -> None:
    """Makes a file, and the directories above it.

    Raises:
      errors.StorageError: it is there already, or cannot be written.
    """
    with mapped_os_errors(path, "write"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(path, "xb", buffering=0) as file:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]
                if sync:
                    os.fsync(file.fileno())
        except FileExistsError as error:
            what = (
                "two arrays would have this file, since the file system does not tell their names apart: rename one of them; "
                "or two processes wrote the same chunk: `owned` of the leaf's type handler must give it to one of them"
            )
            raise errors.StorageError(errno.EEXIST, what, path) from error


def _batches(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    nbytes = 0
    for chunk in chunks:
        batch.append(chunk)
        nbytes += chunk.data.nbytes
        if nbytes >= _BATCH_NBYTES or len(batch) == _BATCH_FILES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
