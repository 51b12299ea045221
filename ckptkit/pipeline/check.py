"""Whether what was read is what was written: chunk by chunk, so that what is whole can be told from what is not."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from ckptkit import errors
from ckptkit._gc import wait
from ckptkit.grid import Array, ArraySpec, Index, chunk_indices, index_nbytes, index_shape
from ckptkit.index import BLOCK_BYTE_SIZE, IndexDocument, block_checksums
from ckptkit.pipeline import answers
from ckptkit.pipeline.limits import BATCH_BYTE_SIZE, BATCH_LEAVES
from ckptkit.pipeline.memory import aligned_empty
from ckptkit.registry import Registry
from ckptkit.storage.base import ChecksumReader, Reader

__all__ = ["ChunkRead", "check_arrays", "chunk_problems", "is_damage", "start_reading"]


class ChunkRead(NamedTuple):
    """A chunk, and the memory that it is read into."""

    array: ArraySpec
    cell: Index
    out: Array


def is_damage(error: errors.CheckpointError) -> bool:
    """Whether an error means that stored bytes are lost, rather than that they cannot be had now."""
    if isinstance(error, errors.StorageError):
        return error.errno == errno.EIO
    return isinstance(error, errors.CorruptCheckpointError | errors.NotFoundError | errors.FormatError)


def start_reading(chunks: Sequence[ChunkRead], registry: Registry, reader: Reader, index: IndexDocument | None) -> Future[Any]:
    """Starts to read chunks; where the reader makes their checksums, and somebody compares them, the future gives them.

    Raises:
      errors.PluginError: the reader did not do what it must.
    """
    requests = [(array.name, cell, out) for array, cell, out in chunks]
    reading: Future[Any]
    with answers.calling(registry, reader, _method(reader, index)) as asked:
        if isinstance(reader, ChecksumReader) and index is not None:
            reading = reader.read_checksums(requests, block_checksums, BLOCK_BYTE_SIZE)
        else:
            reading = reader.read(requests)
        return answers.instance(asked, reading, Future)


def _method(reader: Reader, index: IndexDocument | None) -> str:
    """What of a reader is called."""
    return "read_checksums" if isinstance(reader, ChecksumReader) and index is not None else "read"


def chunk_problems(
    chunks: Sequence[ChunkRead], reading: Future[Any], registry: Registry, reader: Reader, index: IndexDocument | None
) -> dict[int, errors.CheckpointError]:
    """What is wrong with chunks that are being read, by position; nothing where all of them are whole.

    Args:
      chunks: those that are being read.
      reading: what `start_reading` returned for them.
      registry: knows whose reader it is.
      reader: reads them again one by one where that failed.
      index: their checksums; None where none were written.

    Raises:
      errors.StorageError: they cannot be read now.
      errors.PluginError: the reader's future raised what is no error of ckptkit's or the operating system's.
    """
    problems: dict[int, errors.CheckpointError] = {}
    checksums: Sequence[str] | None = None
    try:
        with answers.calling(registry, reader, _method(reader, index)) as asked:
            wait(reading)
            found = reading.result()
            if _method(reader, index) == "read_checksums":
                checksums = asked.each(found, len(chunks), "chunk", (str,))
    except errors.CheckpointError as error:
        if not is_damage(error):
            raise
        problems = _unreadable(chunks, registry, reader)
    if index is None:
        return problems
    if checksums is None:
        checksums = ["" if i in problems else block_checksums(out) for i, (_, _, out) in enumerate(chunks)]
    for position, ((array, cell, _), found) in enumerate(zip(chunks, checksums, strict=True)):
        if position not in problems and (reason := index.check(array, cell, found)) is not None:
            with answers.calling(registry, reader, "place"):
                place = reader.place(array.name, cell)
            problems[position] = errors.CorruptCheckpointError(reason + (f"; it lies in {place}" if place else ""))
    return problems


def _unreadable(chunks: Sequence[ChunkRead], registry: Registry, reader: Reader) -> dict[int, errors.CheckpointError]:
    problems: dict[int, errors.CheckpointError] = {}
    for position, (array, cell, out) in enumerate(chunks):
        try:
            with answers.calling(registry, reader, "read"):
                reading = reader.read([(array.name, cell, out)])
                wait(reading)
                reading.result()
        except errors.CheckpointError as error:
            if not is_damage(error):
                raise
            problems[position] = error
    return problems


def check_arrays(
    arrays: Sequence[ArraySpec], registry: Registry, reader: Reader, index: IndexDocument | None
) -> Iterator[tuple[int, Index, errors.CheckpointError | None]]:
    """Reads every chunk of every array: the array's position, the chunk, and what is wrong with it.

    Raises:
      errors.StorageError: chunks cannot be read now, or there is no memory for one.
      errors.PluginError: as for `chunk_problems`.
    """
    ahead: list[tuple[Sequence[tuple[int, Index]], Sequence[ChunkRead], Future[Any]]] = []
    for batch in [*_batches(arrays), ()]:
        if batch:
            made = [ChunkRead(arrays[i], cell, aligned_empty(index_shape(cell), arrays[i].dtype)) for i, cell in batch]
            ahead.append((batch, made, start_reading(made, registry, reader, index)))
        if ahead and (not batch or len(ahead) > 1):
            places, chunks, reading = ahead.pop(0)
            problems = chunk_problems(chunks, reading, registry, reader, index)
            yield from ((i, cell, problems.get(position)) for position, (i, cell) in enumerate(places))


def _batches(arrays: Sequence[ArraySpec]) -> Iterator[Sequence[tuple[int, Index]]]:
    batch: list[tuple[int, Index]] = []
    nbytes = 0
    for i, array in enumerate(arrays):
        for cell in chunk_indices(array):
            batch.append((i, cell))
            nbytes += index_nbytes(array, cell)
            if nbytes >= BATCH_BYTE_SIZE or len(batch) >= BATCH_LEAVES:
                yield batch
                batch, nbytes = [], 0
    if batch:
        yield batch
