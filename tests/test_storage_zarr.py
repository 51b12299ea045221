"""The backend without a database: what it writes it and Orbax read back, which names it refuses, and what goes wrong says so."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import shutil
import time
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import ckptkit
from ckptkit import errors
from ckptkit.grid import ArraySpec, Chunk, chunk_indices, index_shape, whole
from ckptkit.location import FileLocation
from ckptkit.options import StorageOptions
from ckptkit.processes import Job
from ckptkit.storage import _zarr_files
from ckptkit.storage._zarr_dtypes import V3_DTYPES
from ckptkit.storage.zarr import ZarrBackend
from ckptkit.testing import abstract, assert_same
from ckptkit.testing.strategies import trees

BACKEND = ZarrBackend()


def array(shape, dtype="float32", seed=0):
    """Random bits that are values of the dtype."""
    used = {"bool": 1, "int2": 3, "int4": 15, "float4_e2m1fn": 15}.get(dtype, 255)
    dtype = V3_DTYPES[dtype]
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8) & used
    return bits.view(dtype).reshape(shape)


def spec_of(name, values, chunk_shape=None):
    return ArraySpec(name, values.shape, values.dtype, tuple(max(1, n) for n in chunk_shape or values.shape))


def chunks_of(spec, values):
    for index in chunk_indices(spec):
        yield Chunk(spec, index, np.asarray(values[tuple(slice(*bounds) for bounds in index)], order="C"))


def write(location, arrays, chunk_shape=None, **options):
    specs = [spec_of(name, values, chunk_shape) for name, values in arrays.items()]
    assert [*BACKEND.refuse(specs), *BACKEND.refuse_names(list(arrays))] == [None] * 2 * len(specs)
    writer = BACKEND.writer(location, specs, StorageOptions(**options), Job())
    writer.write([chunk for spec in specs for chunk in chunks_of(spec, arrays[spec.name])])
    writer.commit()


def read(location):
    """Every array that is stored, by name, filled chunk by chunk."""
    reader = BACKEND.reader(location)
    try:
        specs = reader.arrays()
        found = {name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()}
        parts = [
            (name, index, np.empty(index_shape(index), spec.dtype))
            for name, spec in specs.items()
            for index in chunk_indices(spec)
        ]
        reader.read(parts).result(timeout=60)
    finally:
        reader.close()
    for name, index, out in parts:
        found[name][tuple(slice(*bounds) for bounds in index)] = out
    return found


def refusals(*names):
    return BACKEND.refuse_names(names)


@pytest.fixture
def location(tmp_path):
    return FileLocation(tmp_path / "arrays")


# What is written is read.


@given(
    shape=st.lists(st.integers(0, 7), max_size=4).map(tuple),
    dtype=st.sampled_from(sorted(V3_DTYPES)),
    use_zarr3=st.booleans(),
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=4, unique=True),
    data=st.data(),
)
def test_round_trip(tmp_path_factory, shape, dtype, use_zarr3, names, data):
    chunk_shape = tuple(data.draw(st.integers(1, 9)) for _ in shape)
    accepted = []
    for name in names:
        if not any(refusals(*accepted, name)):
            accepted.append(name)
    arrays = {name: array(shape, dtype, i) for i, name in enumerate(accepted)}
    location = FileLocation(tmp_path_factory.mktemp("arrays"))
    write(location, arrays, chunk_shape, use_zarr3=use_zarr3)
    assert_same(read(location), {name.removesuffix("/"): values for name, values in arrays.items()})


@pytest.mark.parametrize(
    ("use_zarr3", "files"),
    [
        (False, ["a/.zarray", "a/0.0", "a/0.1", "b/c/.zarray", "b/c/0"]),
        (True, ["a/c/0/0", "a/c/0/1", "a/zarr.json", "b/c/c", "b/c/zarr.json"]),
    ],
)
def test_an_array_is_a_directory_with_its_document_and_chunks(location, use_zarr3, files):
    writer = BACKEND.writer(
        location,
        [a := spec_of("a", array((2, 4)), (2, 2)), c := spec_of("b/c", array(()))],
        StorageOptions(use_zarr3=use_zarr3),
        Job(),
    )
    writer.write([*chunks_of(a, array((2, 4))), *chunks_of(c, array(()))])
    writer.commit()
    root = location.local_path
    assert sorted(os.path.relpath(os.path.join(at, name), root) for at, _, names in os.walk(root) for name in names) == files


def test_chunks_may_come_in_many_calls_and_any_order(location):
    values = array((64, 64))
    spec = spec_of("a", values, (16, 16))
    writer = BACKEND.writer(location, [spec], StorageOptions(), Job())
    for chunk in reversed(list(chunks_of(spec, values))):
        writer.write([chunk])
    writer.commit()
    assert_same(read(location), {"a": values})


def test_big_endian_values_are_stored_little_endian(location):
    write(location, {"a": array((3,)).astype(">f4")})
    assert location.read_bytes("a/0") == array((3,)).tobytes()


def test_the_memory_of_a_chunk_is_released_once_the_future_is_done(location):
    values = np.zeros(1 << 20, np.float32)
    gone = weakref.ref(values)
    spec = spec_of("a", values)
    writer = BACKEND.writer(location, [spec], StorageOptions(), Job())
    writer.write([Chunk(spec, ((0, 1 << 20),), values)]).result(timeout=60)
    del values
    gc.collect()
    assert gone() is None
    writer.commit()


def test_thousands_of_small_arrays_are_written_and_read_in_batches(location, monkeypatch):
    monkeypatch.setattr(_zarr_files, "_BATCH_FILES", 7)
    arrays = {f"layer.{i}": array((16,), seed=i) for i in range(1000)}
    start = time.process_time()
    write(location, arrays)
    assert_same(read(location), arrays)
    assert time.process_time() - start < 10


@given(tree=trees(), use_zarr3=st.booleans())
@settings(max_examples=20)
def test_trees_round_trip_with_their_checksums(tmp_path_factory, tree, use_zarr3):
    path = tmp_path_factory.mktemp("tree") / "step"
    handler = ckptkit.StandardCheckpointHandler(use_ocdbt=False, use_zarr3=use_zarr3)
    try:
        ckptkit.Checkpointer(handler).save(path, tree)
    except errors.TreeError as error:
        assert "rename" in str(error) or "at least one entry" in str(error)  # noqa: PT017 - names that the tree drew may clash
        return
    assert_same(ckptkit.restore(path, abstract(tree)), tree)


def test_a_flipped_bit_is_found(tmp_path):
    ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler(use_ocdbt=False)).save(tmp_path / "step", {"a": np.arange(1000)})
    file = tmp_path / "step" / "a" / "0"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(errors.CorruptCheckpointError, match="'a'"):
        ckptkit.restore(tmp_path / "step")


# Names.


@pytest.mark.parametrize("name", ["", "/", ".", "..", "../a", "a/../b", "/a", "a//b", "a//", "./a", "a/."])
def test_names_that_lead_elsewhere_are_refused(name):
    assert "has a part that is empty, '.' or '..'" in refusals(name)[0]


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "a\\b", "a\nb", "\x7f", "\uffff"])
def test_names_with_characters_that_files_cannot_hold_are_refused(name):
    assert "cannot hold everywhere" in refusals(name)[0]


@pytest.mark.parametrize(
    "name", ["_METADATA", "_metadata", "_sharding/x", "array_metadatas", "manifest.ocdbt", "ckptkit_index.json"]
)
def test_names_of_other_files_of_a_checkpoint_are_refused(name):
    assert "another file of a checkpoint" in refusals(name)[0]


@pytest.mark.parametrize("part", ["x" * 256, "é" * 128])
def test_names_longer_than_a_file_system_takes_are_refused(part):
    assert refusals("a/" + part[:-1]) == [None]
    assert "more than 255 bytes" in refusals("a/" + part)[0]


@pytest.mark.parametrize("below", ["a/0", "a/1.2", "a/c", "a/C/x", "a/.zarray/x", "a/zarr.json"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_name_among_the_files_of_another_array_is_refused_naming_it(below, order):
    reasons = refusals(*["a", below][::order])[::order]
    assert reasons[0] is None
    assert "chunk of the array 'a'" in reasons[1]


def test_an_array_below_another_one_is_stored_where_no_file_is_in_the_way(location):
    arrays = {"a": array((2,)), "a/b": array((2,), seed=1), "a/b/w0": array((2,), seed=2)}
    write(location, arrays)
    assert_same(read(location), arrays)


def test_two_names_of_one_directory_are_refused_naming_both():
    assert "'a' and 'a/' are one directory" in refusals("a", "a/")[1]


def test_names_that_the_file_system_takes_for_one_are_not_written_over_each_other(location):
    os.makedirs(location.local_path)
    os.mkdir(os.path.join(location.local_path, "A"))
    os.symlink("A", os.path.join(location.local_path, "a"))  # what a file system that ignores case looks like
    writer = BACKEND.writer(location, [spec_of(name, array((2,))) for name in ("A", "a")], StorageOptions(), Job())
    with pytest.raises(errors.StorageError, match="does not tell their names apart") as caught:
        writer.commit()
    writer.abort()
    assert caught.value.errno == errno.EEXIST


def test_a_chunk_that_two_processes_write_is_refused_and_said_to_be_that(location):
    spec = spec_of("a", array((2,)))
    chunk = Chunk(spec, whole((2,)), np.zeros(2, spec.dtype))
    writers = [BACKEND.writer(location, [spec], StorageOptions(), Job(process, (0, 1))) for process in (0, 1)]
    for writer in writers:
        writer.write([chunk])
    writers[0].commit()
    with pytest.raises(errors.StorageError, match="or two processes wrote the same chunk: `owned`"):
        writers[1].commit()
    writers[1].abort()


@pytest.mark.parametrize("name", ["a/b", "a b", "50%", "größe", "a.b", "file:x", "W", "-", "a" * 255])
def test_orbax_reads_unusual_names(tmp_path, name):
    tree = {name: np.arange(3)}
    ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler(use_ocdbt=False)).save(tmp_path / "step", tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "step"), tree)


# Both programs.


def tree_of_all_dtypes():
    sharding = NamedSharding(jax.make_mesh((4, 2), ("x", "y")), PartitionSpec("x", "y"))
    return {
        "sharded": jax.device_put(jnp.arange(48.0).reshape(8, 6), sharding),
        "deep": {"list": [np.arange(3), 7, 2.5]},
        "key": jax.random.key(3),
        **{dtype: array((5, 4), dtype) for dtype in sorted(V3_DTYPES)},
    }


@pytest.mark.parametrize("use_zarr3", [False, True])
def test_orbax_restores_what_is_written(tmp_path, use_zarr3):
    tree = tree_of_all_dtypes()
    ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=use_zarr3)).save(tmp_path / "step", tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "step"), tree)


def test_orbax_restores_a_standard_save(tmp_path):
    tree = {"a": np.arange(6), "b": {"c": jnp.ones((2, 3))}}
    ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler(use_ocdbt=False)).save(tmp_path / "step", tree)
    assert not json.loads((tmp_path / "step" / "_METADATA").read_text())["use_ocdbt"]
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(use_ocdbt=False)) as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "step"), tree)


@pytest.mark.parametrize("use_zarr3", [False, True])
@pytest.mark.parametrize("use_compression", [False, True])
def test_what_orbax_wrote_is_restored(tmp_path, use_zarr3, use_compression):
    tree = tree_of_all_dtypes()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=use_zarr3, use_compression=use_compression)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=100), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "step", args=ocp.args.PyTreeSave(tree, save_args=save_args))
    assert_same(ckptkit.restore(tmp_path / "step"), tree)


# What others wrote, and damage.


@pytest.mark.parametrize(
    "changes",
    [
        {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}},
        {"compressor": None, "order": "F"},
        {"compressor": None, "dtype": ">f4"},
        {"compressor": None, "dimension_separator": "/"},
    ],
)
def test_encodings_of_other_programs_are_read(location, changes):
    metadata = {"shape": [50, 70], "chunks": [20, 30], "dtype": "<f4", "fill_value": None} | changes
    kvstore = location.kvstore() | {"path": location.local_path + "/deep/a/"}
    ts.open({"driver": "zarr", "kvstore": kvstore, "metadata": metadata}, create=True).result().write(array((50, 70))).result()
    assert_same(read(location), {"deep/a": array((50, 70))})


@pytest.fixture
def saved(location):
    write(location, {"a": array((1000,)), "b": array((5,))})
    return location


@pytest.mark.parametrize("damage", ["shorter", "longer", "missing"])
def test_a_damaged_chunk_is_named(saved, damage):
    path = os.path.join(saved.local_path, "a", "0")
    os.unlink(path) if damage == "missing" else os.truncate(path, {"shorter": 3999, "longer": 4001}[damage])
    with pytest.raises((errors.CorruptCheckpointError, errors.NotFoundError), match=r"chunk \(\(0, 1000\),\) of array 'a'"):
        read(saved)


def test_a_missing_document_is_an_unknown_array(saved):
    os.unlink(os.path.join(saved.local_path, "a", ".zarray"))
    reader = BACKEND.reader(saved)
    assert list(reader.arrays()) == ["b"]
    with pytest.raises(errors.NotFoundError, match="'a'"):
        reader.read([("a", ((0, 1000),), np.empty(1000, np.float32))]).result(timeout=60)
    reader.close()


@pytest.mark.parametrize("document", [b"", b"{}", b"null", b"x" * 2_000_000])
def test_a_document_that_is_none_is_named(saved, document):
    saved.write_bytes("a/.zarray", document)
    with pytest.raises(errors.FormatError, match=r"a/\.zarray"):
        read(saved)


def test_an_array_that_claims_what_is_not_stored_is_refused_before_any_is_allocated(saved):
    document = json.loads(saved.read_bytes("a/.zarray")) | {"shape": [1 << 50], "chunks": [1 << 50]}
    saved.write_bytes("a/.zarray", json.dumps(document).encode())
    with pytest.raises(errors.FormatError, match="claims 4503599627370496 bytes"):
        read(saved)


def test_a_chunk_that_shrinks_after_the_listing_is_an_error(saved):
    reader = BACKEND.reader(saved)
    reader.arrays()
    os.truncate(os.path.join(saved.local_path, "a", "0"), 100)
    with pytest.raises(errors.CorruptCheckpointError, match="was cut off"):
        reader.read([("a", ((0, 1000),), np.empty(1000, np.float32))]).result(timeout=60)
    reader.close()


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_link_out_of_the_directory_is_not_followed(saved, tmp_path, what):
    path = os.path.join(saved.local_path, "a", "0") if what == "file" else os.path.join(saved.local_path, "a")
    shutil.move(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(errors.FormatError, match="leads out of"):
        read(saved)


def test_a_link_to_a_file_of_the_same_checkpoint_is_followed(saved):
    path = os.path.join(saved.local_path, "a", "0")
    os.rename(path, os.path.join(saved.local_path, "blob"))
    os.symlink("../blob", path)
    assert_same(read(saved)["a"], array((1000,)))


def test_a_link_in_a_circle_is_not_followed(saved):
    os.symlink(".", os.path.join(saved.local_path, "again"))
    with pytest.raises(errors.FormatError, match="again"):
        read(saved)


def test_a_named_pipe_is_never_waited_for(saved):
    os.unlink(os.path.join(saved.local_path, "a", "0"))
    os.mkfifo(os.path.join(saved.local_path, "a", "0"))
    with pytest.raises(errors.FormatError, match="regular file"):
        read(saved)


def test_a_full_disk_surfaces_with_its_number(location):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    spec = spec_of("a", np.zeros(1 << 20, np.uint8))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        writer = BACKEND.writer(location, [spec], StorageOptions(), Job())
        future = writer.write([Chunk(spec, ((0, 1 << 20),), np.zeros(1 << 20, np.uint8))])
        assert future.exception(60).errno == errno.EFBIG
        with pytest.raises(errors.StorageError):
            writer.write([])
        with pytest.raises(errors.StorageError):
            writer.commit()
        writer.abort()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Which directories are taken for this format.


def test_a_directory_of_arrays_is_recognised_and_an_ocdbt_database_is_not(saved):
    assert BACKEND.recognises(saved)
    saved.write_bytes("manifest.ocdbt", b"")
    assert not BACKEND.recognises(saved)


def test_other_directories_are_not_recognised(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert not BACKEND.recognises(FileLocation(tmp_path))
    assert not BACKEND.recognises(FileLocation(tmp_path / "missing"))
    assert not BACKEND.recognises(FileLocation(tmp_path / "file"))


class PlaceWithoutPath(FileLocation):
    """A directory that is reached through TensorStore alone."""

    local_path = None


@pytest.mark.parametrize("use_zarr3", [True, False])
def test_a_place_that_is_no_directory_of_this_machine_holds_the_same_files(tmp_path, use_zarr3):
    arrays = {"a": array((5, 7)), "b/c": array((4, 4)), "empty": array((0, 3))}
    for place in (PlaceWithoutPath, FileLocation):
        write(place(tmp_path / place.__name__), arrays, (2, 4), use_zarr3=use_zarr3)
    files = [sorted(f.relative_to(tmp_path / d) for f in (tmp_path / d).rglob("*")) for d in os.listdir(tmp_path)]
    assert files[0] == files[1]
    assert BACKEND.recognises(PlaceWithoutPath(tmp_path / "FileLocation"))
    assert_same(read(PlaceWithoutPath(tmp_path / "FileLocation")), arrays)


def test_a_file_that_is_cut_off_is_noticed_in_a_place_without_path(saved):
    os.truncate(os.path.join(saved.local_path, "a", "0"), 100)
    with pytest.raises(errors.CorruptCheckpointError, match="has 100 bytes, expected"):
        read(PlaceWithoutPath(saved.local_path))


@pytest.mark.parametrize("use_ocdbt", [True, False])
@pytest.mark.parametrize("use_zarr3", [True, False])
def test_compressed_chunks_take_less_and_both_libraries_read_them(tmp_path: Path, use_ocdbt: bool, use_zarr3: bool) -> None:
    tree = {"zeros": np.zeros((300, 1000)), "small": np.arange(7, dtype=np.int8), "big": np.tile(np.arange(1 << 18), 3)}
    options = {"use_ocdbt": use_ocdbt, "use_zarr3": use_zarr3, "use_compression": True}
    ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler(**options)).save(tmp_path / "c", tree)
    assert sum(file.stat().st_size for file in (tmp_path / "c").rglob("*") if file.is_file()) < 4_000_000
    for library in (ckptkit, ocp):
        restored = library.Checkpointer(library.PyTreeCheckpointHandler()).restore(tmp_path / "c")
        jax.tree.map(np.testing.assert_array_equal, restored, tree)
