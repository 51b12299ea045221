"""The interface of a storage backend: chunks of arrays to and from bytes somewhere. It knows no leaf and no jax.

The pipeline guarantees: a writer is told of all arrays before the first chunk; every chunk written or read is one cell
of the array's regular grid (`ArraySpec.chunk_shape`, cut off at the array's end), C-contiguous; `out` arrays are
C-contiguous and writable. Checksums are the pipeline's affair.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ClassVar

from ckptkit.grid import Array, ArraySpec, Chunk, Index, chunk_count, chunk_indices, whole

if TYPE_CHECKING:
    from ckptkit.location import Location
    from ckptkit.options import StorageOptions
    from ckptkit.processes import Job

__all__ = [
    "ArraySpec",
    "Checksum",
    "ChecksumReader",
    "Chunk",
    "Index",
    "ManyWriters",
    "PartialReader",
    "Reader",
    "StorageBackend",
    "Writer",
    "chunk_count",
    "chunk_indices",
    "whole",
]


class Writer(abc.ABC):
    """Writes the chunks of one checkpoint. Used from one thread at a time."""

    @abc.abstractmethod
    def write(self, chunks: Sequence[Chunk]) -> Future[None]:
        """Starts to write chunks; the future is done when their data is no longer referenced."""

    @abc.abstractmethod
    def commit(self) -> None:
        """Finishes everything: when it returns, all arrays are on storage.

        Files of a local directory need not be synced: whoever commits the checkpoint syncs every file of it.
        """

    def data_files(self) -> Mapping[str, int]:
        """Files, by their paths in the directory, that are arrays from a byte on, with the number of bytes before it.

        Asked for once `commit` has returned. The checkpoint's list of files has the checksum of those bytes alone, so that a
        restore reads arrays once. Each byte that follows must be a chunk's, which the index checks, and the reader refuses a file
        that is longer or shorter. Where whole directories are such, see `StorageBackend.data_directories`.
        """
        return {}

    @abc.abstractmethod
    def abort(self) -> None:
        """Stops and releases everything; what was written may stay (the directory is removed by the caller)."""


class Reader(abc.ABC):
    """Reads the chunks of one checkpoint. Thread-safe."""

    @abc.abstractmethod
    def arrays(self) -> Mapping[str, ArraySpec]:
        """Every array that is stored, by name, with the grid it was written in. No array data is read.

        Raises:
          errors.FormatError: a document that cannot be understood, or sizes that the files cannot hold.
        """

    @abc.abstractmethod
    def read(self, requests: Sequence[tuple[str, Index, Array]]) -> Future[None]:
        """Fills `out` with the chunk at `index` of the array `name`, for each (name, index, out).

        The future raises `errors.NotFoundError` for an unknown array or a missing chunk, `errors.StorageError` for
        failed reads, `errors.CorruptCheckpointError` for bytes that cannot be decoded.
        """

    def place(self, name: str, index: Index) -> str:
        """The file, below the directory, and the first byte of a chunk as it is stored, in words; '' where that is not known."""
        return ""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases files and memory."""


class PartialReader(Reader):
    """A reader whose `read` takes any part of an array, not only cells of its grid.

    Where there are no checksums to verify, which are those of whole cells, it is asked for what the devices hold and no more.
    """


Checksum = Callable[[Any], str]


class ChecksumReader(Reader):
    """A reader that checksums what it reads in the thread that reads it, where the processor's cache still holds the bytes."""

    @abc.abstractmethod
    def read_checksums(
        self, requests: Sequence[tuple[str, Index, Array]], checksum: Checksum, block_nbytes: int
    ) -> Future[list[str]]:
        """Reads as `read` does; gives what `checksum` says of each chunk when all of its bytes are in place.

        Args:
          requests: as for `read`.
          checksum: takes a C-contiguous array; may be called from any thread. What it says of a chunk is what it says of the
            chunk's blocks, joined in their order.
          block_nbytes: bytes of a block; the last one of a chunk is what is left.
        """


class StorageBackend(abc.ABC):
    """A format: how arrays become bytes. Stateless; one instance serves every checkpoint.

    Attributes:
      name: what users write in `storage=`.
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def refuse(self, arrays: Sequence[ArraySpec]) -> Sequence[str | None]:
        """For each array the reason why none of its shape, dtype and chunk shape can be stored, or None.

        Called before any I/O, with one array of each kind; what their names are does not matter here.
        """

    def refuse_names(self, names: Sequence[str]) -> Sequence[str | None]:
        """For each name the reason why no array can have it beside the others, or None; called before any I/O."""
        return [None] * len(names)

    @abc.abstractmethod
    def writer(self, location: Location, arrays: Sequence[ArraySpec], options: StorageOptions, job: Job) -> Writer:
        """A writer into an empty directory. `arrays` is everything that will be written."""

    @abc.abstractmethod
    def reader(self, location: Location) -> Reader:
        """A reader of a directory that this backend wrote, or that another program wrote in its format."""

    def data_directories(self, names: Iterable[str]) -> Iterable[str]:
        """Directories, by their paths in the checkpoint's, of files of which a reader uses only what arrays and chunks say.

        Their checksums need not be in the checkpoint's list of files, since the index checks whatever is read from them.

        Args:
          names: of all arrays.
        """
        return ()

    @abc.abstractmethod
    def recognises(self, location: Location) -> bool:
        """Whether the directory, or the single file, looks like this format; a few existence checks, nothing is opened."""

    def keys_of(self, name: str) -> tuple[str, ...]:
        """The keys that lead to an array in a tree of which its name is all that is stored: its parts between dots.

        A target may group them otherwise: it is compared by joined names.
        """
        return tuple(name.split("."))


class ManyWriters(StorageBackend):
    """A backend that several processes can write one checkpoint with.

    Each process has a writer in the same directory and gives it the chunks that it owns. What a process other than the primary
    has written is durable when its writer's `commit` returns, since nobody else can sync what lies in the memory of its machine.
    """

    @abc.abstractmethod
    def merge(self, location: Location, processes: Iterable[int]) -> Iterable[str]:
        """Called on the primary once its own writer has committed: makes one of what the processes wrote.

        Args:
          location: as of the writers.
          processes: gives each process, this one too, once its writer has committed; so it may wait, and raise what went wrong
            elsewhere.

        Returns:
          directories beside `data_directories` of which a restore uses nothing but chunks.
        """
