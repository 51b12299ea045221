"""Arrays out of safetensors files, straight into the memory that they are wanted in."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from ckptkit import errors
from ckptkit.storage import ArraySpec, Index, Location, PartialReader, Workers, joined, mapped_os_errors
from ckptkit_safetensors.extents import Array, Call, Extent, calls, cut, extents, inside, is_small, move, row_axis, tasks, widened
from ckptkit_safetensors.files import Place, places

__all__ = ["SafetensorsReader"]

Request = tuple[str, Index, Array]


class SafetensorsReader(PartialReader):
    """Reads the headers at the first call, and arrays in threads of its own."""

    def __init__(self, location: Location, path: str) -> None:
        self._location = location
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
        parts = [self._pool.submit(_read_direct, *file, task) for file, found in direct.items() for task in tasks(found)]
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
                self._places = places(self._location, self._path)
            return self._places

    def _planned(
        self, requests: Sequence[Request]
    ) -> tuple[dict[tuple[str, bool], list[Extent]], list[tuple[Place, Index, Index, Array]]]:
        """What is read straight into its place, by file and whether that is exact, and what is read with the rest of its rows."""
        direct: dict[tuple[str, bool], list[Extent]] = defaultdict(list)
        by_rows = []
        listed = self._listed()
        for name, index, out in requests:
            if (place := listed.get(name)) is None:
                raise errors.NotFoundError(errno.ENOENT, f"there is no array {name!r} here", self._path)
            shape = place.array.shape
            if is_small(out, shape):
                direct[place.path, place.exact].append((place.offset, out))
                continue
            axis = row_axis(shape, out.dtype.itemsize, out.shape)
            if axis == len(shape):
                direct[place.path, place.exact] += extents(place.offset, shape, index, out)
            elif out.size:
                by_rows.append((place, index, widened(index, shape, axis), out))
        return direct, by_rows


def _read_direct(path: str, exact: bool, task: Sequence[Call]) -> None:  # noqa: FBT001 - never called with a bare True
    """Fills the memory of calls that read one file with values of numpy's; `exact` is as in `Tensor`."""
    _read(path, task)
    for call in task:
        for memory in call.buffers:
            if memory.dtype.kind == "b":
                _settle(memory, path, exact=exact)


def _settle(memory: Array, path: str, *, exact: bool) -> None:
    """Makes each true of bools of a file the byte 1, the only one that numpy knows: other programs may write any byte but 0.

    Raises:
      errors.CorruptCheckpointError: another byte, where the file is exact.
    """
    stored = memory.view(np.uint8)
    if not exact:
        np.not_equal(stored, 0, out=memory)
    elif (largest := stored.max(initial=0)) > 1:
        raise errors.CorruptCheckpointError(
            f"{path}: a bool is the byte {largest}, expected 0 or 1, which is all that ckptkit writes: the file is damaged; "
            "restore another copy."
        )


def _read(path: str, task: Iterable[Call]) -> None:
    """Makes calls that read one file.

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


def _read_rows(place: Place, index: Index, rows: Index, out: Array) -> None:
    """Fills `out` with the part at `index`, which is too scattered to read without the `rows` that it lies in."""
    for part in cut(rows, out.dtype.itemsize * math.prod(stop - start for start, stop in rows)):
        memory = np.empty([stop - start for start, stop in part], out.dtype)
        _read(place.path, calls(extents(place.offset, place.array.shape, part, memory)))
        out[inside(index, part)] = memory[inside(part, index)]
    if out.dtype.kind == "b":
        _settle(out, place.path, exact=place.exact)
