"""What is stored under each key, as backends and their common reader see it: the bytes themselves, or a place in a file."""

from __future__ import annotations

import abc
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ckptkit import errors
from ckptkit.location import mapped_os_errors

__all__ = [
    "Bytes",
    "Extent",
    "Filled",
    "Place",
    "Unread",
    "Value",
    "Values",
    "cut_off",
    "key_prefix",
    "nbytes_of",
    "places_of",
    "read_files",
]

Bytes = npt.NDArray[np.uint8]

_MAX_BUFFERS_PER_READ = 1024  # IOV_MAX on Linux and macOS
_READ_NBYTES = 1 << 20  # larger reads gain nothing, and leave nothing in the processor's cache for who looks at it next


def key_prefix(name: str) -> str:
    """What the keys of an array's document and chunks begin with: its name as a directory, by TensorStore's rule."""
    if name in ("", "/"):
        return ""
    return name if name.endswith("/") else f"{name}/"


class Extent(NamedTuple):
    """A value that lies in a file.

    Attributes:
      path: of the file, below the directory.
      offset, nbytes: its place there.
    """

    path: str
    offset: int
    nbytes: int


class Unread(NamedTuple):
    """A value of which the listing of a place tells nothing but the key; `Values.sized` reads it."""

    key: bytes


Value = bytes | Extent | Unread
"""The value itself where whatever lists the keys holds it, else where it is."""

Filled = Callable[[int], None]


class Place(NamedTuple):
    """An extent to be read.

    Attributes:
      position: among what is wanted.
      extent: where it lies.
      buffer: of at most so many bytes, and at least one.
    """

    position: int
    extent: Extent
    buffer: Bytes


def places_of(wanted: Sequence[tuple[Value, Bytes]]) -> list[Place]:
    """What of the values lies in files."""
    found = enumerate(wanted)
    return [Place(i, value, buffer) for i, (value, buffer) in found if isinstance(value, Extent) and buffer.size]


def nbytes_of(value: Value) -> int:
    """Stored bytes of a value; 0 where only reading tells."""
    if isinstance(value, Unread):
        return 0
    return value.nbytes if isinstance(value, Extent) else len(value)


class Values(abc.ABC):
    """What a directory holds."""

    @abc.abstractmethod
    def entries(self) -> Mapping[bytes, Value]:
        """Every key with its value, in the order of keys.

        Raises:
          errors.NotFoundError: a required file is missing.
          errors.CorruptCheckpointError: a file is damaged.
          errors.FormatError: a name leads out of the directory, or to what is no file.
        """

    def sized(self, values: Sequence[Value | None]) -> Sequence[Value | None]:
        """The same values, those that were `Unread` as bytes, or None where they are gone; the size of all is known then.

        Raises:
          errors.StorageError: one cannot be read.
        """
        return values

    def unread_of(self, values: Iterable[Value], nbytes: int) -> int:
        """How many of the values are `Unread` and have at least so many bytes; raises what `sized` raises."""
        return 0

    @abc.abstractmethod
    def read_into(self, wanted: Sequence[tuple[Value, Bytes]], filled: Filled = lambda _: None) -> None:
        """Fills each buffer with the first bytes of its value.

        Args:
          wanted: the values, and the buffers.
          filled: is told of each buffer, by its position, soon after it was filled: while the processor's cache has its bytes.

        Raises:
          errors.NotFoundError, errors.StorageError, errors.CorruptCheckpointError: a file is missing, unreadable, too short.
        """

    def read(self, values: Sequence[Value], limit: int = sys.maxsize) -> list[bytes]:
        """Of each value the first `limit` bytes, those that lie at one place read once; raises what `read_into` raises."""
        buffers = {v: np.empty(min(limit, v.nbytes), np.uint8) for v in values if isinstance(v, Extent)}
        self.read_into([*buffers.items()])
        found: dict[Value, bytes] = {value: buffer.tobytes() for value, buffer in buffers.items()}
        return [value[:limit] if isinstance(value, bytes) else found[value] for value in values]


def read_files(directory: str, wanted: Iterable[Place], filled: Filled) -> None:
    """Fills each buffer with the first bytes of its extent; raises what `Values.read_into` raises."""
    by_path: dict[str, list[Place]] = {}
    for place in wanted:
        by_path.setdefault(place.extent.path, []).append(place)
    for path, places in by_path.items():
        full = os.path.join(directory, path)
        with mapped_os_errors(full, "read"), open(full, "rb", buffering=0) as file:
            for run in _runs(sorted(places, key=lambda place: place.extent.offset)):
                _preadv(file.fileno(), [place.buffer for place in run], run[0].extent.offset, full)
                for place in run:
                    filled(place.position)


def _runs(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Places that follow on each other in the file, together: 10,000 reads of 1 KB become 10."""
    run: list[Place] = []
    end = nbytes = 0
    for place in places:
        if run and (place.extent.offset != end or len(run) == _MAX_BUFFERS_PER_READ or nbytes >= _READ_NBYTES):
            yield run
            run, nbytes = [], 0
        run.append(place)
        nbytes += place.buffer.size
        end = place.extent.offset + place.buffer.size
    if run:
        yield run


def _preadv(descriptor: int, buffers: list[Bytes], offset: int, path: str) -> None:
    """Fills the buffers from `offset` on; the kernel may stop early, and does at 2 GiB."""
    first = 0
    while first < len(buffers):
        count = os.preadv(descriptor, cast("list[Any]", buffers[first:]), offset)
        if count == 0:
            raise cut_off(path, offset, offset + sum(buffer.size for buffer in buffers[first:]))
        offset += count
        while first < len(buffers) and count >= buffers[first].size:
            count -= buffers[first].size
            first += 1
        if count:
            buffers[first] = buffers[first][count:]


def cut_off(path: str, size: int | None, end: int) -> errors.CorruptCheckpointError:
    """The error for a file that ends too early, after `size` bytes where that is known."""
    ends = "too early" if size is None else f"at byte {size}"
    return errors.CorruptCheckpointError(
        f"{path}: the file ends {ends}, {end} are needed: it was cut off; restore another checkpoint."
    )
