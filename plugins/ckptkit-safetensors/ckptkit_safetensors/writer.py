"""Chunks of arrays into safetensors files, each to the place that it has once the sizes of all arrays are known."""

from __future__ import annotations

import math
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from ckptkit.storage import ArraySpec, Chunk, Index, Pending, Workers, Writer, mapped_os_errors, whole
from ckptkit_safetensors.extents import Call, Extent, calls, cut, extents, inside, is_small, move, row_axis, tasks, widened
from ckptkit_safetensors.files import INDEX_FILE, encode_index, file_names, split
from ckptkit_safetensors.header import encode, order

__all__ = ["SafetensorsWriter"]

_Place = tuple[str, int]
"""The file of an array, and the byte at which it begins there."""


class SafetensorsWriter(Writer):
    """Makes the files with their headers at once, and writes chunks into them in threads of its own.

    Nothing is copied and nothing held back, so memory does not grow with the checkpoint. Syncing is left to the commit. A write
    that fails raises `errors.StorageError` from its future, from the next call, and at the latest from `commit`.
    """

    def __init__(self, directory: str, arrays: Sequence[ArraySpec], file_nbytes: int) -> None:
        parts = [order(part) for part in split(arrays, file_nbytes)]
        self._directory = directory
        self._files = dict(zip(file_names(len(parts)), parts, strict=True))
        self._places: dict[str, _Place] = {}
        self._heads = {name: self._create(os.path.join(directory, name), part) for name, part in self._files.items()}
        self._pool = Workers(min(4, os.cpu_count() or 1), "ckptkit-write-safetensors")
        self._rows = threading.Lock()
        self._pending = Pending()

    def write(self, chunks: Sequence[Chunk]) -> Future[None]:
        self._pending.raise_failed()
        direct: dict[str, list[Extent]] = defaultdict(list)
        by_rows: list[tuple[_Place, Chunk, Index]] = []
        for chunk in chunks:
            array, data = chunk.array, chunk.data
            path, offset = place = self._places[array.name]
            if is_small(data, array.shape):
                direct[path].append((offset, data))
                continue
            # As for every chunk of this array: no two ways of writing may meet in a row.
            axis = row_axis(array.shape, array.dtype.itemsize, tuple(map(min, array.chunk_shape, array.shape)))
            if axis == len(array.shape):
                direct[path] += extents(offset, array.shape, chunk.index, data)
            elif data.size:
                by_rows.append((place, chunk, widened(chunk.index, array.shape, axis)))
        parts = [self._pool.submit(_write, path, task) for path, found in direct.items() for task in tasks(found)]
        if by_rows:
            parts.append(self._pool.submit(self._write_rows, by_rows))
        return self._pending.add(parts)

    def commit(self) -> None:
        self._pending.wait()
        self._pool.close()
        if len(self._files) > 1:
            path = os.path.join(self._directory, INDEX_FILE)
            with mapped_os_errors(path, "write"), open(path, "xb") as file:
                file.write(encode_index(self._files))

    def data_files(self) -> Mapping[str, int]:
        return self._heads

    def abort(self) -> None:
        self._pool.close(cancel=True)

    def _create(self, path: str, arrays: Sequence[ArraySpec]) -> int:
        """A file with its header, as long as it will be; returns the length of the header in bytes."""
        header, starts, nbytes = encode(arrays)
        _make(path, header, len(header) + nbytes)
        before = len(header)
        self._places |= {name: (path, before + start) for name, start in starts.items()}
        return len(header)

    def _write_rows(self, scattered: list[tuple[_Place, Chunk, Index]]) -> None:
        """Writes chunks whose runs are too short to write alone: into their rows, as far as these are written."""
        while scattered:  # emptied, so that nothing refers to the data any more when the future is done
            (path, offset), chunk, rows = scattered.pop()
            array = chunk.array
            for part in cut(rows, array.dtype.itemsize * math.prod(stop - start for start, stop in rows)):
                memory = np.empty([stop - start for start, stop in part], array.dtype)
                found = list(calls(extents(offset, array.shape, part, memory)))
                with self._rows, mapped_os_errors(path, "write"):
                    descriptor = os.open(path, os.O_RDWR)
                    try:
                        move(os.preadv, descriptor, found)
                        memory[inside(part, chunk.index)] = chunk.data[inside(chunk.index, part)]
                        move(os.pwritev, descriptor, found)
                    finally:
                        os.close(descriptor)


def _make(path: str, header: bytes, size: int) -> None:
    """A new file of `size` bytes that begins with a header."""
    with mapped_os_errors(path, "write"), open(path, "xb", buffering=0) as file:
        os.truncate(file.fileno(), size)
        index = whole((len(header),))
        move(os.pwritev, file.fileno(), calls(extents(0, (len(header),), index, np.frombuffer(header, np.uint8))))


def _write(path: str, task: list[Call]) -> None:
    """Makes calls that write one file, and forgets them, so that nothing refers to the data when the future is done."""
    try:
        with mapped_os_errors(path, "write"):
            descriptor = os.open(path, os.O_WRONLY)
            try:
                move(os.pwritev, descriptor, task)
            finally:
                os.close(descriptor)
    finally:
        task.clear()
