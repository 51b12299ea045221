"""Arrays out of safetensors files, straight into the memory that they are wanted in."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from ckptkit import errors
from ckptkit.storage import ArraySpec, Index, PartialReader, Workers, joined, mapped_os_errors
from ckptkit_safetensors.extents import Extent, cut, extents, inside, move, row_axis, tasks, widened
from ckptkit_safetensors.files import Place, places

__all__ = ["SafetensorsReader"]

Array = npt.NDArray[Any]
Request = tuple[str, Index, Array]


class SafetensorsReader(PartialReader):
    """Reads the headers at the first call, and arrays in threads of its own."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._pool = Workers(min(4, os.cpu_count() or 1), "ckptkit-read-safetensors")
        self._lock = threading.Lock()
        self._places: Mapping[str, Place] | None = None
        self._closed = False

    def arrays(self) -> Mapping[str, ArraySpec]:
        return {name: place.array for name, place in self._listed().items()}

    def read(self, requests: Sequence[Request]) -> Future[None]:
        try:
            direct, by_rows = self._planned(requests)
        except errors.CheckpointError as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed
        parts = [self._pool.submit(_read, path, task) for path, found in direct.items() for task in tasks(found)]
        parts += [self._pool.submit(_read_rows, *request) for request in by_rows]
        return joined(parts)

    def close(self) -> None:
        self._closed = True
        self._pool.close()
        self._places = None

    def _listed(self) -> Mapping[str, Place]:
        with self._lock:
            if self._closed:
                raise errors.ClosedError(f"{self._path}: the reader was closed before this call.")
            if self._places is None:
                self._places = places(self._path)
            return self._places

    def _planned(self, requests: Sequence[Request]) -> tuple[dict[str, list[Extent]], list[tuple[Place, Index, Index, Array]]]:
        """What is read straight into its place, by file, and what is read with the rest of its rows."""
        direct: dict[str, list[Extent]] = {}
        by_rows = []
        listed = self._listed()
        for name, index, out in requests:
            if (place := listed.get(name)) is None:
                raise errors.NotFoundError(errno.ENOENT, f"there is no array {name!r} here", self._path)
            if place.exact and out.dtype == bool:
                out = out.view(np.uint8)  # noqa: PLW2901 - the bytes as they are, for whoever checks them
            shape = place.array.shape
            axis = row_axis(shape, out.dtype.itemsize, out.shape)
            if axis == len(shape):
                direct.setdefault(place.path, []).extend(extents(place.offset, shape, index, out))
            elif out.size:
                by_rows.append((place, index, widened(index, shape, axis), out))
        return direct, by_rows


def _read(path: str, task: Sequence[Extent]) -> None:
    """Fills the memory of the extents of one file.

    Raises:
      errors.NotFoundError, errors.StorageError: the file is gone, or cannot be read.
      errors.CorruptCheckpointError: it has become shorter.
    """
    with mapped_os_errors(path, "read"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            end = move(os.preadv, descriptor, task)
        finally:
            os.close(descriptor)
    if end is not None:
        raise errors.CorruptCheckpointError(f"{path}: the file ends at byte {end}: it was cut off; restore another copy.")
    for _, memory in task:
        if memory.dtype == bool:  # other programs may write true as any byte but 0, numpy knows 1 only
            memory[...] = memory.view(np.uint8) != 0


def _read_rows(place: Place, index: Index, rows: Index, out: Array) -> None:
    """Fills `out` with the part at `index`, which is too scattered to read without the `rows` that it lies in."""
    for part in cut(rows, out.dtype.itemsize * math.prod(stop - start for start, stop in rows)):
        memory = np.empty([stop - start for start, stop in part], out.dtype)
        _read(place.path, list(extents(place.offset, place.array.shape, part, memory)))
        out[inside(index, part)] = memory[inside(part, index)]
