"""The conformance suite of storage backends."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit import errors
from ckptkit.args import PyTreeRestore
from ckptkit.file_list import read_file_list
from ckptkit.options import StorageOptions
from ckptkit.registry import Registry
from ckptkit.storage import Job, Location, ManyWriters, PartialReader, StorageBackend, chunk_indices
from ckptkit.testing import _backends as by_hand
from ckptkit.testing import _checkpoints as checkpoints
from ckptkit.testing import strategies
from ckptkit.testing._promises import drawn, missing_fixture, promise
from ckptkit.testing.comparison import abstract, assert_same

__all__ = ["StorageBackendTests"]

_REFUSE = "ckptkit.storage.StorageBackend.refuse"
_REFUSE_NAMES = "ckptkit.storage.StorageBackend.refuse_names"
_EVERYONES_DTYPES = ("float32", "int32", "uint8")

HOSTILE_NAMES = (
    *("..", "../outside", "/outside", "a/../../outside", "a/..", ".", "", "/", "a//b", "a/", "a\0b", "\0", "..\\outside"),
    *("%2e%2e/outside", "~", "~/outside", "$HOME", "CON", "a\nb", " ", "größe", "日本", "\ud800", "n" * 300, "_METADATA"),
)
"""Names that a file system or a database may take for something else."""

FAMILIES = (("a", "A"), ("a", "a/b", "a/0"), ("a", "a.b", "a/b"), ("a", "a/"), ("a/b", "a\\b"), ("0", "0.0", "c/0"))
"""Names of which a backend may take one for a part of the other."""


_ENDING_SECS = 5
"""For threads that were told to end."""

_BOTH = (0, 1)


class StorageBackendTests:
    """What every storage backend promises.

    Override the fixture `backend`; `new_location` of `ckptkit.testing.fixtures` too where the backend, or what is tested with
    it, is at home elsewhere than in files.

    Attributes:
      many: arrays that must not take out of proportion longer than a tenth as many.
      fresh_process: whether another process finds the backend and what it wrote; False for places that end with the process.
    """

    many: ClassVar[int] = 10_000
    fresh_process: ClassVar[bool] = True

    @pytest.fixture
    def backend(self) -> StorageBackend:
        return missing_fixture(self, "backend", "the StorageBackend under test")  # type: ignore[no-any-return]  # it raises

    # What can be stored

    @promise(
        "refuse() gives one answer for each array: None, or a reason that can be read; the plain dtypes are taken.",
        _REFUSE,
    )
    def test_refuses_with_reasons_and_takes_plain_arrays(self, backend: StorageBackend) -> None:
        arrays = [by_hand.array(f"a{i}", (2, 3), dtype).spec for i, dtype in enumerate(strategies.NUMPY_DTYPES)]
        answers = backend.refuse(arrays)
        assert len(answers) == len(arrays)
        reasons: list[Any] = [answer for answer in answers if answer is not None]
        assert all(isinstance(reason, str) and reason.strip() for reason in reasons), reasons
        plain = [answer for spec, answer in zip(arrays, answers, strict=True) if spec.dtype.name in _EVERYONES_DTYPES]
        assert plain == [None] * len(_EVERYONES_DTYPES), f"refused one of {_EVERYONES_DTYPES}: {plain}"

    @promise("What refuse() takes comes back bit for bit: every dtype, shape and grid.", "ckptkit.storage.Reader.read")
    @given(data=st.data())
    @drawn
    def test_arrays_come_back(self, backend: StorageBackend, new_location: Callable[[], Location], data: st.DataObject) -> None:
        shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
        arrays = []
        for i in range(data.draw(st.integers(1, 4))):
            shape, dtype = data.draw(shapes), data.draw(st.sampled_from(strategies.NUMPY_DTYPES))
            cut = tuple(data.draw(st.integers(1, max(1, n))) for n in shape)
            arrays.append(by_hand.array(f"a{i}", shape, dtype, cut, seed=i))
        taken = _taken(backend, arrays)
        location = new_location()
        by_hand.write(backend, location, taken)
        by_hand.read(backend, location, taken)

    @promise(
        "Every array that is not refused is listed, those without a chunk too, and a tree may have none.",
        "ckptkit.storage.Reader.arrays",
    )
    @pytest.mark.parametrize("shapes", [(), ((0,),), ((), (3, 0, 2), (2,))], ids=["none", "empty", "mixed"])
    def test_empty_arrays_are_listed(self, backend: StorageBackend, location: Location, shapes: Any) -> None:
        arrays = _taken(backend, [by_hand.array(f"a{i}", shape, seed=i) for i, shape in enumerate(shapes)])
        by_hand.write(backend, location, arrays)
        with contextlib.closing(backend.reader(location)) as reader:
            assert set(reader.arrays()) == {stored.spec.name for stored in arrays}
        by_hand.read(backend, location, arrays)

    @promise("A name is refused, or kept; nothing is ever written outside of the directory.", _REFUSE_NAMES)
    @pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name[:20]))
    def test_names_are_kept_or_refused(self, backend: StorageBackend, location: Location, name: str) -> None:
        _kept_or_refused(backend, location, [name])

    @promise("Names that a backend cannot tell apart are refused, others are kept apart.", _REFUSE_NAMES)
    @pytest.mark.parametrize("names", FAMILIES, ids=ascii)
    def test_names_do_not_run_into_each_other(self, backend: StorageBackend, location: Location, names: tuple[str, ...]) -> None:
        _kept_or_refused(backend, location, names)

    @promise("A name of any characters is refused, or kept.", _REFUSE_NAMES)
    @given(names=st.lists(st.text(max_size=6), min_size=1, max_size=3, unique=True))
    @drawn
    def test_drawn_names(self, backend: StorageBackend, new_location: Callable[[], Location], names: list[str]) -> None:
        _kept_or_refused(backend, new_location(), names)

    # Writing

    @promise("Chunks may come in any order, over any number of calls.", "ckptkit.storage.Writer.write")
    def test_chunks_in_any_order(self, backend: StorageBackend, location: Location) -> None:
        arrays = [by_hand.array(name, (6, 5), chunk_shape=(2, 2), seed=i) for i, name in enumerate("ab")]
        pieces = [chunk for stored in arrays for chunk in by_hand.chunks(stored)]
        writer = backend.writer(location, [stored.spec for stored in arrays], StorageOptions(), Job())
        for i in np.random.default_rng(0).permutation(len(pieces)):
            writer.write([pieces[i]])
        writer.commit()
        by_hand.read(backend, location, arrays)

    @promise(
        "When write's future is done, which it is before commit, the data is no longer looked at.", "ckptkit.storage.Writer.write"
    )
    @pytest.mark.parametrize("side", [4, 1024], ids=["small", "large"])
    def test_data_is_free_when_the_future_is_done(self, backend: StorageBackend, location: Location, side: int) -> None:
        stored = by_hand.array("a", (side, side), chunk_shape=(side // 2, side))
        writer = backend.writer(location, [stored.spec], StorageOptions(), Job())
        pieces = list(by_hand.chunks(stored))
        writer.write(pieces).result(by_hand.TIMEOUT_SECS)
        for chunk in pieces:
            chunk.data[...] = 0
        writer.commit()
        by_hand.read(backend, location, [stored])

    @promise(
        "Data is only read: what the caller hands over may be write-protected, and stays as it is.",
        "ckptkit.storage.Writer.write",
    )
    def test_data_is_only_read(self, backend: StorageBackend, location: Location) -> None:
        stored = by_hand.array("a", (8, 8), chunk_shape=(4, 8))
        writer = backend.writer(location, [stored.spec], StorageOptions(), Job())
        pieces = list(by_hand.chunks(stored))
        for chunk in pieces:
            chunk.data.flags.writeable = False
        writer.write(pieces)
        writer.commit()
        by_hand.read(backend, location, [stored])

    @promise("After abort nothing more is written, and the next writer starts from nothing.", "ckptkit.storage.Writer.abort")
    def test_nothing_is_written_after_abort(self, backend: StorageBackend, new_location: Callable[[], Location]) -> None:
        stored, location = by_hand.array("a", (64, 1024), chunk_shape=(1, 1024)), new_location()
        writer = backend.writer(location, [stored.spec], StorageOptions(), Job())
        writer.write(list(by_hand.chunks(stored))[:32])
        writer.abort()
        checkpoints.stays_as_it_is(location)
        other = by_hand.array("b", (3,), seed=1)
        _write_and_read(backend, new_location(), [other])

    @promise("One backend serves many checkpoints at once.", "ckptkit.storage.StorageBackend")
    def test_concurrent_writers(self, backend: StorageBackend, new_location: Callable[[], Location]) -> None:
        work = [(new_location(), [by_hand.array("a", (16, 16), chunk_shape=(4, 16), seed=seed)]) for seed in range(4)]
        writers = [backend.writer(place, [stored.spec for stored in arrays], StorageOptions(), Job()) for place, arrays in work]

        def save(number: int) -> None:
            for stored in work[number][1]:
                for chunk in by_hand.chunks(stored):
                    writers[number].write([chunk])
            writers[number].commit()

        checkpoints.together(save, len(work))
        for place, arrays in work:
            by_hand.read(backend, place, arrays)

    @promise("A write that fails is a CheckpointError, at the latest from commit.", "ckptkit.storage.Writer")
    def test_a_failed_write_is_an_error(self, backend: StorageBackend, location: Location) -> None:
        stored = by_hand.array("a", (512, 1024), chunk_shape=(256, 1024))
        with checkpoints.small_files(location, 1 << 18):
            try:
                by_hand.write(backend, location, [stored])
            except errors.CheckpointError:
                return
        by_hand.read(backend, location, [stored])  # it found a way, or it kept silent

    @promise("Several processes write one checkpoint: merge() makes one of what each wrote.", "ckptkit.storage.ManyWriters")
    @pytest.mark.parametrize("owners", [(0, 1), (0,), (1,)], ids=["both", "primary", "other"])
    def test_several_processes_write_together(self, backend: StorageBackend, location: Location, owners: tuple[int, ...]) -> None:
        if not isinstance(backend, ManyWriters):
            pytest.skip("one process writes with it: it is no ManyWriters")
        arrays = [by_hand.array(name, (7, 5), chunk_shape=(2, 5), seed=i) for i, name in enumerate("abc")]
        specs = [stored.spec for stored in arrays]
        writers = [backend.writer(location, specs, StorageOptions(), Job(process, _BOTH)) for process in _BOTH]
        for number, chunk in enumerate(chunk for stored in arrays for chunk in by_hand.chunks(stored)):
            writers[owners[number % len(owners)]].write([chunk])
        writers[0].commit()

        def committed() -> Iterator[int]:
            yield 0
            writers[1].commit()  # not before this process is asked for, as where it is slow
            yield 1

        processes = committed()
        directories = list(backend.merge(location, processes))
        assert all(isinstance(directory, str) for directory in directories), directories
        assert list(processes) in ([], [1], [*_BOTH])  # those for which merge did not wait
        assert backend.recognises(location)
        by_hand.read(backend, location, arrays)

    # Reading

    @promise(
        "Any chunks can be read, in any order, into any C-contiguous memory, and nothing else is touched.",
        "ckptkit.storage.Reader.read",
    )
    def test_reads_parts(self, backend: StorageBackend, location: Location) -> None:
        stored = by_hand.array("a", (6, 4), np.int32, chunk_shape=(2, 4))
        by_hand.write(backend, location, [stored, by_hand.array("b", (3,))])
        memory = np.full((8, 4), -1, np.int32)
        with contextlib.closing(backend.reader(location)) as reader:
            wanted = [("a", ((4, 6), (0, 4)), memory[1:3]), ("a", ((0, 2), (0, 4)), memory[5:7])]
            reader.read(wanted).result(by_hand.TIMEOUT_SECS)
        expected = np.full((8, 4), -1, np.int32)
        expected[1:3], expected[5:7] = stored.values[4:6], stored.values[0:2]
        assert_same(memory, expected)

    @promise("A PartialReader reads any part of an array, not only cells of its grid.", "ckptkit.storage.PartialReader")
    @given(data=st.data())
    @drawn
    def test_reads_any_part(self, backend: StorageBackend, new_location: Callable[[], Location], data: st.DataObject) -> None:
        shape = tuple(data.draw(st.lists(st.integers(1, 40), max_size=3)))
        cut = tuple(data.draw(st.integers(1, n)) for n in shape)
        [stored, *_] = arrays = [by_hand.array(name, shape, np.int32, cut, seed=i) for i, name in enumerate("ab")]
        if _taken(backend, arrays) != arrays:
            return
        location = new_location()
        by_hand.write(backend, location, arrays)
        bounds = [st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda ends: ends[0] < ends[1]) for n in shape]
        with contextlib.closing(backend.reader(location)) as reader:
            if not isinstance(reader, PartialReader):
                pytest.skip("it reads whole chunks: its reader is no PartialReader")
            parts = data.draw(st.lists(st.tuples(*bounds), min_size=1, max_size=3))
            requests = [("a", part, np.zeros_like(by_hand.cell(stored.values, part))) for part in parts]
            reader.read(requests).result(by_hand.TIMEOUT_SECS)
        for _, part, out in requests:
            assert out.tobytes() == by_hand.cell(stored.values, part).tobytes(), f"part {part} of {stored.spec} has other bytes"

    @promise("A reader may be used from several threads.", "ckptkit.storage.Reader")
    def test_concurrent_reads(self, backend: StorageBackend, location: Location) -> None:
        arrays = [by_hand.array(f"a{i}", (32, 8), chunk_shape=(4, 8), seed=i) for i in range(8)]
        by_hand.write(backend, location, arrays)
        with contextlib.closing(backend.reader(location)) as reader:

            def values_of(number: int) -> Any:
                spec, values = arrays[number]
                found = np.empty_like(values)
                reader.read([(spec.name, i, found[slice(*i[0])]) for i in chunk_indices(spec)]).result(by_hand.TIMEOUT_SECS)
                return found

            for found, (spec, values) in zip(checkpoints.together(values_of, len(arrays)), arrays, strict=True):
                assert found.tobytes() == values.tobytes(), f"array {spec.name!r} came back with other bytes"

    @promise("An unknown array is a NotFoundError from the future.", "ckptkit.storage.Reader.read")
    def test_an_unknown_array_is_not_found(self, backend: StorageBackend, location: Location) -> None:
        by_hand.write(backend, location, [by_hand.array("a", (2,))])
        with contextlib.closing(backend.reader(location)) as reader, pytest.raises(errors.NotFoundError):
            reader.read([("b", ((0, 2),), np.empty(2, np.float32))]).result(by_hand.TIMEOUT_SECS)

    @promise("A directory of another kind is not recognised, its own is.", "ckptkit.storage.StorageBackend.recognises")
    def test_recognises_its_own(self, backend: StorageBackend, new_location: Callable[[], Location]) -> None:
        own, empty, foreign = new_location(), new_location(), new_location()
        by_hand.write(backend, own, [by_hand.array("a", (2,))])
        foreign.write_bytes("notes.txt", b"milk")
        assert backend.recognises(own)
        assert not backend.recognises(empty)
        assert not backend.recognises(foreign)
        assert not backend.recognises(empty.child("absent"))

    @promise("close() gives back every file and thread.", "ckptkit.storage.Reader.close")
    def test_leaves_no_file_open(self, backend: StorageBackend, new_location: Callable[[], Location]) -> None:
        stored = by_hand.array("a", (16, 16), chunk_shape=(4, 16))
        _write_and_read(backend, new_location(), [stored])  # whatever is kept for good is there now
        before = _open_files()
        places = [new_location() for _ in range(8)]
        for location in places:
            _write_and_read(backend, location, [stored])
        assert _open_files() - before < len(places), "files stay open after close"

    @promise("close() gives back every file and thread.", "ckptkit.storage.Reader.close")
    def test_leaves_no_thread_running(self, backend: StorageBackend, new_location: Callable[[], Location]) -> None:
        stored = by_hand.array("a", (16, 16), chunk_shape=(4, 16))
        _write_and_read(backend, new_location(), [stored])  # as above
        before = _threads()
        places = [new_location() for _ in range(8)]
        for location in places:
            _write_and_read(backend, location, [stored])
        end = time.monotonic() + _ENDING_SECS
        while len(left := _threads() - before) >= len(places) and time.monotonic() < end:
            time.sleep(0.01)
        assert len(left) < len(places), f"threads run on after close: {left}"

    # Through a checkpoint

    @promise("Trees come back under any sharding.", "docs/extending.md, A storage backend")
    @given(data=st.data())
    @drawn
    def test_trees_come_back(
        self, backend: StorageBackend, new_location: Callable[[], Location], registry: Registry, data: st.DataObject
    ) -> None:
        dtypes = [d for d in strategies.JAX_DTYPES if backend.refuse([by_hand.array("a", (1,), d).spec]) == [None]]
        tree = data.draw(strategies.trees(st.one_of(strategies.jax_arrays(dtypes), strategies.numpy_arrays(dtypes))))
        checkpoint = checkpoints.saved(tree, registry, new_location(), backend)
        assert_same(checkpoint.restore(abstract(tree)), tree)
        target = jax.tree.map(lambda leaf: _moved(leaf, data), abstract(tree))
        assert_same(checkpoint.restore(target), jax.tree.map(_like, tree, target))

    @promise("What cannot be stored is refused before anything is written, the rest is stored.", _REFUSE)
    def test_refusals_come_before_any_io(
        self, backend: StorageBackend, new_location: Callable[[], Location], registry: Registry
    ) -> None:
        arrays = [by_hand.array(f"a{i}", (3,), dtype, seed=i) for i, dtype in enumerate(strategies.NUMPY_DTYPES)]
        reasons = backend.refuse([stored.spec for stored in arrays])
        if any(reasons):
            location = new_location()
            with pytest.raises(errors.TreeError):
                checkpoints.saved({stored.spec.name: stored.values for stored in arrays}, registry, location, backend)
            assert by_hand.snapshot(location) == {}
        taken = {s.spec.name: s.values for s, reason in zip(arrays, reasons, strict=True) if reason is None}
        assert_same(checkpoints.saved(taken, registry, new_location(), backend).restore(), taken)

    @promise("A part of a tree can be restored, and only its bytes are read.", "ckptkit.storage.Reader.read")
    def test_partial_restore(self, backend: StorageBackend, location: Location, registry: Registry) -> None:
        tree = {name: by_hand.array(name, (64, 64), seed=i).values for i, name in enumerate("abcd")}
        checkpoint = checkpoints.saved(tree, registry, location, backend)
        found, report = checkpoint.restore_reported(PyTreeRestore({**dict.fromkeys("acd", ...), "b": tree["b"]}))
        assert_same(found["b"], tree["b"])
        assert report.byte_count == tree["b"].nbytes
        assert report.verified

    @promise("A wrong byte is an error, never a wrong value.", "docs/architecture.md, What is verified")
    def test_damage_is_an_error(self, backend: StorageBackend, location: Location, registry: Registry) -> None:
        tree = {"w": by_hand.array("w", (32, 16), seed=1).values, "b": by_hand.array("b", (5,), np.int32, seed=2).values}
        checkpoint = checkpoints.saved(tree, registry, location, backend)
        checkpoint.survives(checkpoints.damages, lambda found: assert_same(found, tree))

    @promise(
        "Of a file that data_files() names, any change of the bytes behind its head is an error.",
        "ckptkit.storage.Writer.data_files",
    )
    def test_changed_data_files_are_an_error(self, backend: StorageBackend, location: Location, registry: Registry) -> None:
        arrays = [by_hand.array(f"a{i}", (5, 3), dtype, seed=i) for i, dtype in enumerate(strategies.NUMPY_DTYPES)]
        tree = {stored.spec.name: stored.values for stored in _taken(backend, arrays)}
        checkpoint = checkpoints.saved(tree, registry, location, backend)
        listed = read_file_list(checkpoint.location)
        heads = {} if listed is None else {path: entry.size for path, entry in listed.files.items() if entry.is_head}
        if not heads:
            pytest.skip("its writer names no data_files")
        for path, size in heads.items():
            data = checkpoint.location.read_bytes(path)
            for what, damaged in checkpoints.changes(data, size, 100 // len(heads)):
                checkpoint.location.write_bytes(path, damaged)
                checkpoint.is_refused(f"{path}, {what}")
            checkpoint.location.write_bytes(path, data)

    @promise("A save that was given up leaves nothing running, and the next one is whole.", "ckptkit.storage.Writer.abort")
    def test_a_cancelled_save(self, backend: StorageBackend, new_location: Callable[[], Location], registry: Registry) -> None:
        tree = {str(i): by_hand.array("a", (256, 256), seed=i).values for i in range(16)}
        checkpoints.cancelled(tree, registry, new_location(), backend)
        assert_same(checkpoints.saved(tree, registry, new_location(), backend).restore(), tree)

    @promise("A save that fails leaves no checkpoint.", "docs/saving.md")
    def test_a_failed_save_leaves_nothing(self, backend: StorageBackend, location: Location, registry: Registry) -> None:
        tree = {"a": by_hand.array("a", (512, 1024)).values}
        with checkpoints.small_files(location, 1 << 18), contextlib.suppress(errors.CheckpointError):
            assert_same(checkpoints.saved(tree, registry, location, backend).restore(), tree)
            return
        assert by_hand.snapshot(location) == {}, "files of the failed save are still there"

    @promise("A fresh process restores what was saved: the backend is found by entry point.", "docs/extending.md, A package")
    def test_a_fresh_process_restores(self, backend: StorageBackend, location: Location, registry: Registry) -> None:
        if not self.fresh_process:
            pytest.skip("what is stored in this place ends with the process")
        tree = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.arange(5, dtype=np.int32)}
        checkpoint = checkpoints.saved(tree, registry, location, backend)
        checkpoint.copied_by_fresh_process(backend.name)
        assert_same(checkpoint.sibling("copy").restore(), tree)

    @promise("Ten times the arrays take about ten times as long.", "docs/architecture.md, Contracts")
    def test_many_arrays_in_proportion(self, backend: StorageBackend, new_location: Callable[[], Location]) -> None:
        few, many = by_hand.grid(self.many // 10), by_hand.grid(self.many)
        checkpoints.in_proportion(lambda arrays: _write_and_read(backend, new_location(), arrays), few, many)


def _taken(backend: StorageBackend, arrays: list[by_hand.Stored]) -> list[by_hand.Stored]:
    """The arrays that the backend does not refuse."""
    answers = backend.refuse([stored.spec for stored in arrays])
    return [stored for stored, answer in zip(arrays, answers, strict=True) if answer is None]


def _write_and_read(backend: StorageBackend, location: Location, arrays: list[by_hand.Stored]) -> None:
    by_hand.write(backend, location, arrays)
    by_hand.read(backend, location, arrays)


def _kept_or_refused(backend: StorageBackend, location: Location, names: Any) -> None:
    arrays = [by_hand.array(name, (2, 3), chunk_shape=(1, 3), seed=i) for i, name in enumerate(names)]
    before = by_hand.beside(location)
    if not any([*backend.refuse([arrays[0].spec]), *backend.refuse_names(list(names))]):  # as a save asks: one of each kind
        _write_and_read(backend, location, arrays)
    assert by_hand.beside(location) == before, "something was written outside of the directory"


def _moved(leaf: Any, data: st.DataObject) -> Any:
    """A target for the leaf in another place."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    struct: Any = jax.ShapeDtypeStruct  # jax gives it no types
    return struct(leaf.shape, leaf.dtype, sharding=data.draw(strategies.shardings(leaf.shape)))


def _like(leaf: Any, target: Any) -> Any:
    return jax.device_put(leaf, target.sharding) if isinstance(leaf, jax.Array) else leaf


def _open_files() -> int:
    """File descriptors of this process, counted where the system tells."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        pytest.skip("this system does not tell which files are open")


def _threads() -> set[threading.Thread]:
    """Python's threads that run now; a library's own that only once called Python are listed there for ever, and left out."""
    return {thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}  # noqa: SLF001 - has no other name
