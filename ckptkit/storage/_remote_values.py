"""Values in places that are no directory of this machine: read by key and byte range, many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import tensorstore as ts

from ckptkit import errors
from ckptkit.storage._tensorstore import mapped_tensorstore_errors
from ckptkit.storage._values import Bytes, Filled, Place, Unread, Value, Values, cut_off
from ckptkit.storage.zarr_documents import DOCUMENT_NAMES

__all__ = ["RemoteValues", "check_ends", "holds_document", "read_ranges"]

# Values that follow on each other are read together: a request costs a server as much as some hundred KB.
_READ_NBYTES: Final = 16 << 20


class RemoteValues(Values):
    """The files below a place, whose keys are their paths. How large they are only reading tells."""

    def __init__(self, store: ts.KvStore, url: str) -> None:
        self._store = store
        self._url = url

    def entries(self) -> Mapping[bytes, Value]:
        with mapped_tensorstore_errors(self._url):
            return {key: Unread(key) for key in sorted(self._store.list().result())}

    def sized(self, values: Sequence[Value | None]) -> Sequence[Value | None]:
        with mapped_tensorstore_errors(self._url):
            reads = [self._store.read(value.key) if isinstance(value, Unread) else None for value in values]
            return [value if read is None else _value(read) for value, read in zip(values, reads, strict=True)]

    def unread_of(self, values: Iterable[Value], nbytes: int) -> int:
        with mapped_tensorstore_errors(self._url):
            reads = [_last_byte(self._store, value.key, nbytes) for value in values if isinstance(value, Unread)]
            return sum([found is not None and found.state == "value" for found in map(_unless_cut_off, reads)])

    def read_into(self, wanted: Sequence[tuple[Value, Bytes]], filled: Filled = lambda _: None) -> None:
        for i, (value, buffer) in enumerate(wanted):
            assert isinstance(value, bytes)  # `sized` was asked first
            buffer[:] = np.frombuffer(value, np.uint8, buffer.size)
            filled(i)


def _value(read: Any) -> bytes | None:
    """What was read; None where the file is gone since it was listed."""
    found = read.result()
    return bytes(found.value) if found.state == "value" else None


def holds_document(store: ts.KvStore) -> bool:
    """Whether there is an array's document anywhere."""
    names = {name.encode() for name in DOCUMENT_NAMES.values()}
    return any(key.rpartition(b"/")[2] in names for key in store.list().result())


def read_ranges(store: ts.KvStore, url: str, wanted: Iterable[Place], filled: Filled) -> None:
    """Fills each buffer with the first bytes of its extent; raises what `Values.read_into` raises."""
    places = sorted(wanted, key=lambda place: place.extent[:2])
    with mapped_tensorstore_errors(url):
        runs = [(run, _read_run(store, run)) for run in _runs(places)]
        for run, read in runs:
            data = read.result()
            if data.state != "value":
                raise errors.NotFoundError(f"{url}/{run[0].extent.path}: a required file is missing; restore another checkpoint.")
            start = 0
            for position, _, buffer in run:
                buffer[:] = np.frombuffer(data.value, np.uint8, buffer.size, start)
                start += buffer.size
                filled(position)


def check_ends(store: ts.KvStore, url: str, ends: Mapping[str, int]) -> None:
    """Checks that each file, by its path, has at least so many bytes.

    Raises:
      errors.NotFoundError: it is missing.
      errors.CorruptCheckpointError: it is shorter.
    """
    reads = [(path, end, _last_byte(store, path, end)) for path, end in ends.items() if end]
    for path, end, read in reads:
        with mapped_tensorstore_errors(url):
            found = _unless_cut_off(read)
        if found is None:
            raise cut_off(f"{url}/{path}", None, end)
        if found.state != "value":
            raise errors.NotFoundError(f"{url}/{path}: a required file is missing; restore another checkpoint.")


def _last_byte(store: ts.KvStore, key: str | bytes, nbytes: int) -> Any:
    """Begins to read the last of so many bytes."""
    return store.read(key, byte_range=slice(nbytes - 1, nbytes))


def _unless_cut_off(read: Any) -> Any:
    """What was read; None where the file ends before the range."""
    try:
        return read.result()
    except ValueError as error:
        if str(error).startswith("OUT_OF_RANGE"):
            return None
        raise


def _read_run(store: ts.KvStore, run: Sequence[Place]) -> Any:
    first, (_, last, buffer) = run[0].extent, run[-1]
    return store.read(first.path, byte_range=slice(first.offset, last.offset + buffer.size))


def _runs(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Places that follow on each other in one file, up to the size of one read."""
    run: list[Place] = []
    end: tuple[str, int] | None = None
    nbytes = 0
    for place in places:
        _, extent, buffer = place
        if run and ((extent.path, extent.offset) != end or nbytes + buffer.size > _READ_NBYTES):
            yield run
            run, nbytes = [], 0
        run.append(place)
        nbytes += buffer.size
        end = extent.path, extent.offset + buffer.size
    if run:
        yield run
