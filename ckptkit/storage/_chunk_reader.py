"""Chunks of zarr arrays out of whatever holds them by key: straight from the files where they lie as in memory.

What is read may be of ours or of another program; `Values` knows whether it is a database or a directory of files.
"""

from __future__ import annotations

import bisect
import errno
import functools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import accumulate
from typing import Final, NamedTuple, TypeVar

import attrs
import numpy as np

from ckptkit import errors
from ckptkit._threads import Workers
from ckptkit.grid import Array, ArraySpec, Index
from ckptkit.location import Location
from ckptkit.storage._futures import called, joined
from ckptkit.storage._values import Bytes, Extent, Value, Values, key_prefix, nbytes_of
from ckptkit.storage._zarr_cells import canonicalise, decode, fill_value, has_unused_bits
from ckptkit.storage.base import Checksum, ChecksumReader
from ckptkit.storage.zarr_documents import DOCUMENT_NAMES, MAX_DOCUMENT_NBYTES, Document, Version, parse

__all__ = ["ChunkReader"]

T = TypeVar("T")
Request = tuple[str, Index, Array]

# One task for a thread.
_BATCH_NBYTES: Final = 32 << 20
_BATCH_REQUESTS: Final = 4096

# So little of a file is read in less time than a thread takes to begin.
_AT_ONCE_NBYTES: Final = 64 << 10

# Chunks that are decoded together pass through a buffer of this size; larger ones go to their place one by one.
_STACK_NBYTES: Final = 4 << 20

# Decoded bytes that one stored byte may stand for: bzip2 packs 1.3 million zeros into one, zstd 33 thousand.
_MAX_RATIO: Final = 1 << 21

# What an array may claim beyond what its stored chunks can decode to, before anyone allocates it: chunks may be lost,
# and where absent ones stand for the fill value nothing on the disk bears the claim out.
_MAX_LOST_NBYTES: Final = 1 << 30
_MAX_FILLED_NBYTES: Final = 1 << 40

# Chunks that may be missing in all, since each takes a kilobyte while it is read; arrays of few chunks are not counted.
_MAX_ABSENT_CHUNKS: Final = 1 << 18
_FEW_CHUNKS: Final = 64


@attrs.frozen(eq=False)
class _Cell:
    """One request, and its chunk as stored."""

    position: int  # among the requests
    name: str
    index: Index
    out: Array
    value: Value


class _Arrays(Mapping[str, ArraySpec]):
    """Arrays by name; two names that make the same keys are the same array."""

    def __init__(self, by_prefix: Mapping[str, ArraySpec]) -> None:
        self._by_prefix = by_prefix

    def __getitem__(self, name: str) -> ArraySpec:
        try:
            array = self._by_prefix[key_prefix(name)]
        except KeyError:
            raise KeyError(name) from None
        return array if array.name == name else array._replace(name=name)

    def __iter__(self) -> Iterator[str]:
        return (array.name for array in self._by_prefix.values())

    def __len__(self) -> int:
        return len(self._by_prefix)


class _Listing(NamedTuple):
    values: Mapping[bytes, Value]
    documents: Mapping[str, Document]  # by key prefix
    arrays: _Arrays


class ChunkReader(ChecksumReader):
    """Lists what is there at the first call; reads in threads of its own."""

    def __init__(self, location: Location, values: Values) -> None:
        self._location = location
        self._values = values
        self._pool = Workers(min(4, os.cpu_count() or 1), "ckptkit-read")
        self._lock = threading.Lock()
        self._listing: _Listing | None = None
        self._closed = False

    def arrays(self) -> Mapping[str, ArraySpec]:
        return self._listed().arrays

    def read(self, requests: Sequence[Request]) -> Future[None]:
        return joined(self._start(self._read_batch, requests))

    def read_checksums(self, requests: Sequence[Request], checksum: Checksum, block_nbytes: int) -> Future[list[str]]:
        def read(batch: Sequence[Request]) -> list[str]:
            blocks: list[list[str]] = [[] for _ in batch]
            self._read_batch(batch, block_nbytes, lambda i, memory: blocks[i].append(checksum(memory)))
            return ["".join(known) or checksum(out) for known, (_, _, out) in zip(blocks, batch, strict=True)]

        batches = self._start(read, requests)
        return joined(batches, lambda: [text for batch in batches for text in batch.result()])

    def _start(self, read: Callable[[Sequence[Request]], T], requests: Sequence[Request]) -> list[Future[T]]:
        """Calls `read` with one batch of the requests after the other, where they are little at once."""
        if self._closed:
            raise errors.ClosedError(f"{self._location.url}: the reader was closed before this read.")
        batches = list(_batches(requests))
        is_little = len(batches) == 1 and sum([out.nbytes for _, _, out in batches[0]]) <= _AT_ONCE_NBYTES
        if is_little and self._location.local_path is not None:
            return [called(read, batches[0])]
        return [self._pool.submit(read, batch) for batch in batches]

    def place(self, name: str, index: Index) -> str:
        listing = self._listed()
        document = listing.documents.get(key_prefix(name))
        value = None if document is None else listing.values.get(_key(name, document, index))
        return f"{value.path} from byte {value.offset} on" if isinstance(value, Extent) else ""

    def close(self) -> None:
        self._closed = True
        self._pool.close()
        self._listing = None

    def _listed(self) -> _Listing:
        with self._lock:
            if self._closed:
                raise errors.ClosedError(f"{self._location.url}: the reader was closed before this call.")
            if self._listing is None:
                self._listing = self._list()
            return self._listing

    def _list(self) -> _Listing:
        values = self._values.entries()
        documents = {prefix: document for version in DOCUMENT_NAMES for prefix, document in self._parsed(values, version)}
        self._check_claims(values, documents)
        specs = {p: ArraySpec(_name(p), d.shape, d.dtype, d.chunk_shape) for p, d in documents.items()}
        return _Listing(values, documents, _Arrays(specs))

    def _parsed(self, values: Mapping[bytes, Value], version: Version) -> Iterator[tuple[str, Document]]:
        """Key prefixes and documents of the arrays of one version of zarr; documents that are the same are parsed once."""
        last = DOCUMENT_NAMES[version]
        alone, below = last.encode(), f"/{last}".encode()
        keys = [key for key in values if key.endswith(below) or key == alone]
        parsed = functools.cache(functools.partial(parse, version=version))
        sized = zip(keys, self._values.sized([values[key] for key in keys]), strict=True)
        present = {key: value for key, value in sized if value is not None}
        stored = self._values.read([*present.values()], limit=MAX_DOCUMENT_NBYTES + 1)
        for key, data in zip(present, stored, strict=True):
            try:
                prefix, document = key.decode().removesuffix(last), parsed(data)
            except (UnicodeDecodeError, errors.FormatError) as error:
                raise errors.FormatError(f"{self._location.url}: the document at key {key!r}: {error}.") from error
            if document is not None and prefix != "/":  # no name leads there
                yield prefix, document

    def _check_claims(self, values: Mapping[bytes, Value], documents: Mapping[str, Document]) -> None:
        """No array claims more memory, or more chunks, than what is stored bears out."""
        large = {p: d for p, d in documents.items() if d.padded_nbytes > _MAX_LOST_NBYTES or d.chunk_count > _FEW_CHUNKS}
        if not large:
            return
        keys = list(values)
        held = [0, *accumulate(map(nbytes_of, values.values()))]
        absent = 0
        for prefix, document in large.items():
            if 0 in document.shape:
                continue
            begin = prefix.encode()
            first, last = bisect.bisect_left(keys, begin), bisect.bisect_left(keys, begin + b"\xff")
            absent += max(0, document.chunk_count - (last - first))
            if absent > _MAX_ABSENT_CHUNKS:
                raise errors.FormatError(
                    f"{self._location.url}: array {_name(prefix)!r} of shape {document.shape} has {document.chunk_count} chunks, "
                    f"but {last - first} keys are stored: the file is damaged or not to be trusted."
                )
            ratio = 1 if document.raw else _MAX_RATIO
            least = -(-document.cell_nbytes // ratio)  # what bears out one chunk
            unread = self._values.unread_of([values[key] for key in keys[first:last]], least)
            stored = held[last] - held[first] + unread * least
            unborne = document.padded_nbytes - stored * ratio
            if unborne > _MAX_FILLED_NBYTES or (unborne > _MAX_LOST_NBYTES and not self._absent_is_fill(document)):
                raise errors.FormatError(
                    f"{self._location.url}: array {_name(prefix)!r} of shape {document.shape} and dtype {document.dtype} claims "
                    f"{document.padded_nbytes} bytes, but {stored} are stored: the file is damaged or not to be trusted."
                )

    @functools.cached_property
    def _stores_fill_values(self) -> bool | None:
        """Whether Orbax's metadata says that chunks equal to the fill value were stored too; None without metadata."""
        if not self._location.exists("_METADATA"):
            return None
        try:
            metadata = json.loads(self._location.read_bytes("_METADATA"))
            return bool(metadata.get("store_array_data_equal_to_fill_value", False))
        except (ValueError, RecursionError, AttributeError):
            return None

    def _absent_is_fill(self, document: Document) -> bool:
        stores = self._stores_fill_values
        return document.fill is not None if stores is None else not stores

    def _read_batch(
        self, requests: Sequence[Request], part_nbytes: int = sys.maxsize, seen: Callable[[int, Bytes], object] | None = None
    ) -> None:
        """Fills the requests' memory; tells `seen` of the parts of those that are read as they are, in their order."""
        raw: list[_Cell] = []
        encoded: dict[Document, list[_Cell]] = {}
        found = [self._stored(name, index) for name, index, _ in requests]
        values = self._values.sized([value for _, value in found])
        for position, ((name, index, out), (document, _), value) in enumerate(zip(requests, found, values, strict=True)):
            self._check_size(name, index, document, value)
            if value is None:
                self._fill(name, index, document, out)
                continue
            cells = raw if _lies_as_stored(out, document) else encoded.setdefault(document, [])
            cells.append(_Cell(position, name, index, out, value))
        parts = [part for cell in raw for part in _parts(cell, part_nbytes)]

        def filled(i: int) -> None:
            cell, _, memory = parts[i]
            if seen is not None and not has_unused_bits(cell.out.dtype):  # those are cleared below
                seen(cell.position, memory)

        self._values.read_into([(value, memory) for _, value, memory in parts], filled)
        for document, cells in encoded.items():
            count = max(1, _STACK_NBYTES // document.cell_nbytes)
            for i in range(0, len(cells), count):
                self._decode(document, cells[i : i + count])
        for _, _, out in requests:
            canonicalise(out)

    def _stored(self, name: str, index: Index) -> tuple[Document, Value | None]:
        listing = self._listed()
        document = listing.documents.get(key_prefix(name))
        if document is None:
            raise errors.NotFoundError(errno.ENOENT, f"there is no array {name!r} here", self._location.url)
        return document, listing.values.get(_key(name, document, index))

    def _check_size(self, name: str, index: Index, document: Document, value: Value | None) -> None:
        least, most = document.stored_nbytes
        if value is not None and not least <= nbytes_of(value) <= most:
            raise self._corrupt(
                name, index, f"has {nbytes_of(value)} bytes, expected {least if least == most else (least, most)}"
            )

    def _fill(self, name: str, index: Index, document: Document, out: Array) -> None:
        if not self._absent_is_fill(document):
            what = f"chunk {index} of array {name!r} is missing; restore another checkpoint"
            raise errors.NotFoundError(errno.ENOENT, what, self._location.url)
        try:
            out[...] = fill_value(document)
        except Exception as error:
            what = f"the fill value {document.fill!r} of array {name!r} does not suit it"
            raise errors.FormatError(f"{self._location.url}: {what}: {error}") from error

    def _decode(self, document: Document, cells: Sequence[_Cell]) -> None:
        encoded = self._values.read([cell.value for cell in cells])
        try:
            decode(document, encoded, [cell.out for cell in cells])
        except MemoryError as error:
            what = f"no memory for {document.cell_nbytes} bytes of array {cells[0].name!r}"
            raise errors.StorageError(errno.ENOMEM, what, self._location.url) from error
        except Exception as error:
            if len(cells) == 1:
                raise self._corrupt(cells[0].name, cells[0].index, f"cannot be decoded: {error}") from error
            for cell in cells:  # one by one, so that the error names the right one
                self._decode(document, [cell])

    def _corrupt(self, name: str, index: Index, what: str) -> errors.CorruptCheckpointError:
        where = f"{self._location.url}: chunk {index} of array {name!r}"
        return errors.CorruptCheckpointError(f"{where} {what}; restore another checkpoint.")


def _parts(cell: _Cell, part_nbytes: int) -> Iterator[tuple[_Cell, Value, Bytes]]:
    """A chunk that lies in a file in parts, each with where it lies and its memory; another as it is."""
    memory = cell.out.reshape(-1).view(np.uint8)
    if not isinstance(cell.value, Extent) or memory.size <= part_nbytes:
        yield cell, cell.value, memory
        return
    path, offset, nbytes = cell.value
    for start in range(0, memory.size, part_nbytes):
        yield cell, Extent(path, offset + start, nbytes - start), memory[start : start + part_nbytes]


def _key(name: str, document: Document, index: Index) -> bytes:
    return (key_prefix(name) + document.chunk_key(index)).encode()


def _lies_as_stored(out: Array, document: Document) -> bool:
    """Whether the bytes of `out` are the first bytes of the stored chunk."""
    return document.raw and out.shape[1:] == document.chunk_shape[1:] and out.nbytes <= document.cell_nbytes


def _name(prefix: str) -> str:
    """The shortest name of the array whose keys begin with `prefix`."""
    return prefix[:-1] if key_prefix(prefix[:-1]) == prefix else prefix


def _batches(requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
    begin = nbytes = 0
    for end, (_, _, out) in enumerate(requests, 1):
        nbytes += out.nbytes
        if nbytes >= _BATCH_NBYTES or end - begin >= _BATCH_REQUESTS:
            yield requests[begin:end]
            begin, nbytes = end, 0
    if begin < len(requests):
        yield requests[begin:]
