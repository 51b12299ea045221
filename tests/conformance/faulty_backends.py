"""A backend of plain files that keeps every promise, and others that break one each."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import numpy as np

from ckptkit import errors
from ckptkit.storage import ArraySpec, Chunk, ManyWriters, PartialReader, Reader, StorageBackend, Writer, chunk_indices

FOLDER = "plain"
LIST = f"{FOLDER}/list.json"


def done(error=None):
    future = Future()
    future.set_result(None) if error is None else future.set_exception(error)
    return future


class PlainWriter(Writer):
    def __init__(self, location, arrays):
        self.directory, self.arrays = location.local_path, arrays

    def write(self, chunks):
        for chunk in chunks:
            self.store(chunk)
        return done()

    def store(self, chunk):
        self.create(file_of(chunk.array.name, chunk.index), chunk.data.tobytes())

    def commit(self):
        listed = [[a.name, a.shape, a.dtype.name, a.chunk_shape] for a in self.arrays]
        self.create(LIST, json.dumps(listed).encode())

    def abort(self):
        pass

    def create(self, name, data):
        try:
            Path(self.directory, FOLDER).mkdir(exist_ok=True)
            Path(self.directory, name).write_bytes(data)
        except OSError as error:
            raise errors.StorageError(error.errno, error.strerror, name) from error


def file_of(name, index):
    readable = base64.urlsafe_b64encode(name.encode()).decode()
    return f"{FOLDER}/{readable}@{'_'.join(str(start) for start, _ in index)}.bin"


class PlainReader(Reader):
    def __init__(self, location):
        self.location = location

    def arrays(self):
        try:
            listed = json.loads(self.location.read_bytes(LIST))
            return {n: ArraySpec(n, tuple(s), np.dtype(d), tuple(c)) for n, s, d, c in listed}
        except (ValueError, TypeError) as error:
            raise errors.FormatError(f"{self.location.url}/{LIST}: {error}") from error

    def read(self, requests):
        try:
            for name, index, out in requests:
                self.fill(name, index, out)
        except errors.CheckpointError as error:
            return done(error)
        return done()

    def fill(self, name, index, out):
        data = self.location.read_bytes(file_of(name, index))
        if len(data) != out.nbytes:
            raise errors.CorruptCheckpointError(f"{name!r} {index}: {len(data)} bytes, expected {out.nbytes}")
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)

    def close(self):
        pass


class Plain(StorageBackend):
    name = "plain"
    Writer, Reader = PlainWriter, PlainReader

    def refuse(self, arrays):
        return [None if np.dtype(array.dtype.name) == array.dtype else "byte order" for array in arrays]

    def refuse_names(self, names):
        return [None if self.is_name(name) else f"the name {name!a} is too long, or not printable: rename it." for name in names]

    def is_name(self, name):
        return name.isprintable() and len(name) <= 100

    def writer(self, location, arrays, options, job):
        return self.Writer(location, list(arrays))

    def reader(self, location):
        return self.Reader(location)

    def data_directories(self, names):
        return (FOLDER,)

    def recognises(self, location):
        return location.exists(LIST)


class Together(Plain, ManyWriters):
    """Every process writes files of its own, and the same list."""

    def merge(self, location, processes):
        return ()


class NeverMerges(Together):
    def merge(self, location, processes):
        raise NotImplementedError


class WritesAlone(Together):
    """Stores what the primary process hands over, and no more."""

    def writer(self, location, arrays, options, job):
        made = super().writer(location, arrays, options, job)
        if not job.is_primary:
            made.store = lambda chunk: None
        return made


class KeepsReferences(PlainWriter):
    """Writes when it commits what may have changed since."""

    def __init__(self, location, arrays):
        super().__init__(location, arrays)
        self.pending = []

    def write(self, chunks):
        self.pending += chunks
        return done()

    def commit(self):
        for chunk in self.pending:
            self.store(chunk)
        super().commit()


class Late(KeepsReferences):
    """Writes when it commits."""

    def write(self, chunks):
        return super().write([Chunk(chunk.array, chunk.index, chunk.data.copy()) for chunk in chunks])


class MergesTooSoon(Together):
    """Keeps what is there before it asks for the other process."""

    Writer = Late

    def merge(self, location, processes):
        folder = Path(location.local_path, FOLDER)
        there = set(os.listdir(folder))
        for _ in processes:
            for name in {*os.listdir(folder)} - there:
                (folder / name).unlink()
        return ()


class HasNoEmptyArrays(Plain):
    """As its format has none, it says so, and wants to hear of none."""

    def refuse(self, arrays):
        return [
            reason or (None if array.nbytes else "empty") for reason, array in zip(super().refuse(arrays), arrays, strict=True)
        ]

    def writer(self, location, arrays, options, job):
        assert all(array.nbytes for array in arrays)
        return super().writer(location, arrays, options, job)


def broken(writer=PlainWriter, reader=PlainReader, **methods):
    """A class of backends with some methods of the plain one replaced."""
    return type("Broken", (Plain,), {"Writer": writer, "Reader": reader, **methods})


class DropsAChunk(PlainWriter):
    def write(self, chunks):
        return super().write(chunks[:-1] if len(chunks) > 1 else chunks)


class SwapsTwoChunks(PlainWriter):
    def write(self, chunks):
        twins = [(a, b) for a, b in itertools.pairwise(chunks) if a.data.shape == b.data.shape and a.array == b.array]
        future = super().write(chunks)
        for a, b in twins[:1]:
            self.create(file_of(a.array.name, a.index), b.data.tobytes())
            self.create(file_of(b.array.name, b.index), a.data.tobytes())
        return future


class NeedsOrder(PlainWriter):
    """Numbers the chunks as they come."""

    def __init__(self, location, arrays):
        super().__init__(location, arrays)
        self.places = [(a.name, i) for a in arrays for i in chunk_indices(a)]

    def store(self, chunk):
        self.create(file_of(*self.places.pop(0)), chunk.data.tobytes())


class WaitsForCommit(PlainWriter):
    def write(self, chunks):
        super().write(chunks)
        return Future()


class WritesIntoTheData(PlainWriter):
    def store(self, chunk):
        super().store(chunk)
        chunk.data[...] = 0


class WritesLater(PlainWriter):
    """Neither commit nor abort waits for it."""

    def write(self, chunks):
        self.thread = threading.Thread(target=self.slowly, args=(list(chunks),))
        self.thread.start()
        return done()

    def slowly(self, chunks):
        for chunk in chunks:
            time.sleep(0.002)
            if os.path.isdir(self.directory):
                super().store(chunk)


class Silent(PlainWriter):
    def create(self, name, data):
        with contextlib.suppress(errors.StorageError):
            super().create(name, data)


class Leaks(PlainWriter):
    def store(self, chunk):
        super().store(chunk)
        Path(self.directory, "..", "scratch.tmp").write_bytes(b"")


class FollowsNames(PlainWriter):
    def store(self, chunk):
        super().store(chunk)
        path = Path(self.directory, f"{chunk.array.name}.txt")
        if path.parent.is_dir() and "\0" not in str(path):
            path.write_text("")


class NamesWhatNobodyChecks(PlainWriter):
    def commit(self):
        super().commit()
        self.create("unused.bin", b"12")

    def data_files(self):
        return {"unused.bin": 1}


class Stumbles(PlainReader):
    """Sees that the file was changed, and raises what no reader may."""

    def arrays(self):
        if self.location.read_bytes("unused.bin") != b"12":
            raise ValueError("12 was expected")
        return super().arrays()


class Stale(PlainReader):
    """Hands out what was read of a chunk of this array and shape before, wherever that was."""

    seen: ClassVar = {}

    def fill(self, name, index, out):
        super().fill(name, index, out)
        out[...] = self.seen.setdefault((name, out.dtype, out.shape), out.copy())


class MisShapes(PlainReader):
    def arrays(self):
        return {n: a._replace(shape=a.shape[::-1], chunk_shape=a.chunk_shape[::-1]) for n, a in super().arrays().items()}


class FillsTooMuch(PlainReader):
    def fill(self, name, index, out):
        super().fill(name, index, out)
        base = out if out.base is None else out.base  # the memory that the caller cut it from
        if base.size > out.size and base.dtype == out.dtype:
            base.reshape(-1)[-1] = 7


class OneAtATime(PlainReader):
    """Keeps what it reads in itself."""

    def fill(self, name, index, out):
        self.current = self.location.read_bytes(file_of(name, index))
        time.sleep(0.001)
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(self.current, np.uint8)


class MakesUpArrays(PlainReader):
    def fill(self, name, index, out):
        try:
            super().fill(name, index, out)
        except errors.NotFoundError:
            out[...] = 0


class ForgetsEmpty(PlainReader):
    def arrays(self):
        return {name: array for name, array in super().arrays().items() if 0 not in array.shape}


class LeavesOpen(PlainReader):
    kept: ClassVar = []

    def arrays(self):
        self.kept.append(open(Path(self.location.local_path, LIST), "rb"))  # noqa: SIM115 - that is the fault
        return super().arrays()


class LeavesThreads(PlainReader):
    def __init__(self, location):
        super().__init__(location)
        threading.Thread(target=time.sleep, args=(2,), daemon=True).start()


class ReadsNoParts(PlainReader, PartialReader):
    """Gives zeros for what is no chunk of its own."""

    def fill(self, name, index, out):
        if index in chunk_indices(self.arrays()[name]):
            super().fill(name, index, out)


class Unchecked(PlainReader):
    """Raises what comes."""

    def arrays(self):
        return {n: ArraySpec(n, tuple(s), np.dtype(d), tuple(c)) for n, s, d, c in json.loads(self.location.read_bytes(LIST))}


class Quadratic(PlainReader):
    """Works for each chunk as long as there are arrays."""

    def read(self, requests):
        for _ in requests:
            sum(range(500 * len(requests)))
        return super().read(requests)


class Zeros(PlainReader):
    def fill(self, name, index, out):
        out[...] = 0


class LikesFewDtypes(PlainWriter):
    """Says so late."""

    def store(self, chunk):
        if chunk.data.dtype == "complex128":
            raise errors.StorageError("no complex numbers")
        super().store(chunk)


class SharesItsState(Plain):
    """The last writer's directory is everybody's."""

    def writer(self, location, arrays, options, job):
        made = super().writer(location, arrays, options, job)
        self.last, backend = location.local_path, self

        class Lost(PlainWriter):
            def create(self, name, data):
                self.directory = backend.last
                super().create(name, data)

        return Lost(location, made.arrays)
