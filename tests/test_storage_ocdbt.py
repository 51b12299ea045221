"""The OCDBT backend: what it writes it and Orbax read back, what others wrote it reads, and what goes wrong says so."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import sys
import textwrap
import threading
import weakref

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ckptkit import errors
from ckptkit.grid import ArraySpec, Chunk, chunk_indices, index_shape
from ckptkit.index import BLOCK_BYTE_SIZE, block_checksums
from ckptkit.location import FileLocation
from ckptkit.options import StorageOptions
from ckptkit.processes import Job
from ckptkit.storage import _chunk_reader, _data_files, _ocdbt_nodes, ocdbt
from ckptkit.storage._tensorstore import reading_error
from ckptkit.storage._zarr_dtypes import V3_DTYPES
from ckptkit.storage.kvstore import memory_location
from ckptkit.storage.zarr_documents import emit

BACKEND = ocdbt.OcdbtBackend()
MIB = 1 << 20


class PlaceWithoutPath(FileLocation):
    """A directory that is reached through TensorStore alone, as an object store is."""

    @property
    def local_path(self):
        return None


def array(shape, dtype="float32", seed=0):
    """Random bits that are values of the dtype."""
    dtype = V3_DTYPES[dtype]
    used = {"bool": 1, "int2": 3, "int4": 15, "float4_e2m1fn": 15}.get(dtype.name, 255)
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8) & used
    return bits.view(dtype).reshape(shape)


def spec_of(name, values, chunk_shape=None):
    return ArraySpec(name, values.shape, values.dtype, tuple(max(1, n) for n in chunk_shape or values.shape))


def chunks_of(spec, values):
    for index in chunk_indices(spec):
        part = values[tuple(slice(*bounds) for bounds in index)]
        yield Chunk(spec, index, np.asarray(part, order="C"))


def write(location, arrays, chunk_shape=None, **options):
    """Saves arrays by name in one call, in chunks of one shape or as wholes."""
    specs = [spec_of(name, values, chunk_shape) for name, values in arrays.items()]
    assert [*BACKEND.refuse(specs), *BACKEND.refuse_names(list(arrays))] == [None] * 2 * len(specs)
    writer = BACKEND.writer(location, specs, StorageOptions(**options), Job())
    writer.write([chunk for spec in specs for chunk in chunks_of(spec, arrays[spec.name])])
    writer.commit()


def read(location, names=None):
    """Arrays by name, all that are stored or those named, filled chunk by chunk."""
    reader = BACKEND.reader(location)
    try:
        specs = {name: reader.arrays()[name] for name in names or reader.arrays()}
        chunks = [(name, index) for name, spec in specs.items() for index in chunk_indices(spec)]
        outs = [np.empty(index_shape(index), specs[name].dtype) for name, index in chunks]
        reader.read([(name, index, out) for (name, index), out in zip(chunks, outs, strict=True)]).result(timeout=60)
    finally:
        reader.close()
    found = {name: np.empty(spec.shape, spec.dtype) for name, spec in specs.items()}
    for (name, index), out in zip(chunks, outs, strict=True):
        found[name][tuple(slice(*bounds) for bounds in index)] = out
    return found


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("place", ["file", "memory"])
def test_checksums_made_while_reading_are_those_of_what_was_read(tmp_path, place, compression):
    """Whatever is done to the bytes: blocks of large chunks, decoding, bits that a dtype does not use, no bytes at all."""
    location = FileLocation(tmp_path) if place == "file" else memory_location(f"memory://{tmp_path.name}")
    random = np.random.default_rng(0)
    arrays = {
        "large": random.standard_normal((3 * BLOCK_BYTE_SIZE + 99) // 4).astype(np.float32),
        "bool": random.integers(0, 2, 2 * BLOCK_BYTE_SIZE).astype(bool),
        "int4": random.integers(-8, 8, 2 * BLOCK_BYTE_SIZE).astype(jnp.int4),
        "small": np.arange(7),
        "scalar": np.array(1.5),
        "empty": np.empty((0, 3)),
    }
    write(location, arrays, compression=compression)
    reader = BACKEND.reader(location)
    requests = [
        (name, index, np.empty(index_shape(index), spec.dtype))
        for name, spec in reader.arrays().items()
        for index in chunk_indices(spec)
    ]
    found = reader.read_checksums(requests, block_checksums, BLOCK_BYTE_SIZE).result(timeout=60)
    reader.close()
    assert found == [block_checksums(out) for _, _, out in requests]
    for name, index, out in requests:
        np.testing.assert_array_equal(out, arrays[name][tuple(slice(*bounds) for bounds in index)])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name].shape, found[name].dtype) == (values.shape, values.dtype.newbyteorder("="))
        assert found[name].tobytes() == values.astype(values.dtype.newbyteorder("=")).tobytes()


def database(location):
    """The database as TensorStore's key-value store."""
    return ts.KvStore.open({"driver": "ocdbt", "base": location.kvstore()}).result()


def store(location, name, metadata, values, driver="zarr"):
    """Writes an array as another program would, in any encoding."""
    kvstore = {"driver": "ocdbt", "base": location.kvstore(), "path": name}
    ts.open({"driver": driver, "kvstore": kvstore, "metadata": metadata}, create=True).result().write(values).result()


def add_orbax_metadata(location, arrays, **fields):
    """The one file that Orbax wants beside the database."""
    entries = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
        for name in arrays
    }
    tree = {"tree_metadata": entries, "use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    location.write_bytes("_METADATA", json.dumps(tree | {"custom_metadata": None} | fields).encode())


def orbax_restore(location, names):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return checkpointer.restore(location.local_path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


@pytest.fixture
def location(tmp_path):
    return FileLocation(tmp_path / "database")


# What is written is read.


@given(
    shape=st.lists(st.integers(0, 7), max_size=4).map(tuple),
    dtype=st.sampled_from(sorted(V3_DTYPES)),
    use_zarr3=st.booleans(),
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=4),
    data=st.data(),
)
def test_round_trip(tmp_path_factory, shape, dtype, use_zarr3, names, data):
    chunk_shape = tuple(data.draw(st.integers(1, 9)) for _ in shape)
    arrays = {name: array(shape, dtype, i) for i, name in enumerate(names) if BACKEND.refuse_names(names[: i + 1])[i] is None}
    location = FileLocation(tmp_path_factory.mktemp("database"))
    write(location, arrays, chunk_shape, use_zarr3=use_zarr3)
    assert_same(read(location, arrays), arrays)


@pytest.mark.parametrize("use_zarr3", [False, True])
@pytest.mark.parametrize("place", [FileLocation, PlaceWithoutPath])
def test_small_large_and_padded_chunks_round_trip(tmp_path, monkeypatch, place, use_zarr3):
    monkeypatch.setattr(_data_files, "_CALL_NBYTES", 4096)
    monkeypatch.setattr(_data_files, "_OBJECT_NBYTES", 20_000)
    arrays = {"rows": array((100, 50)), "both": array((70, 90), "bfloat16"), "tiny": array((3,)), "zero": array((0, 5))}
    write(place(tmp_path), arrays, chunk_shape=None, use_zarr3=use_zarr3)
    write(place(tmp_path / "cut"), {k: v for k, v in arrays.items() if v.ndim == 2}, (32, 48), use_zarr3=use_zarr3)
    assert_same(read(place(tmp_path)), arrays)
    assert_same(read(place(tmp_path / "cut")), {k: v for k, v in arrays.items() if v.ndim == 2})


def test_a_large_read_only_array_is_written_from_where_it_is(location):
    values = array((5, MIB))
    values.flags.writeable = False
    write(location, {"a": values})
    assert_same(read(location), {"a": values})


@pytest.mark.parametrize("shape", [(3,), (600, 600)])
def test_big_endian_values_are_stored_little_endian(location, shape):
    values = array(shape).astype(">f4")
    write(location, {"a": values})
    assert_same(read(location), {"a": values})
    assert database(location).read("a/" + ".".join("0" * len(shape))).result().value == values.astype("<f4").tobytes()


def test_chunks_may_come_in_many_calls_and_any_order(location):
    values = array((64, 64))
    spec = spec_of("a", values, (16, 16))
    writer = BACKEND.writer(location, [spec], StorageOptions(), Job())
    for chunk in reversed(list(chunks_of(spec, values))):
        assert writer.write([chunk]).done()
    writer.commit()
    assert_same(read(location), {"a": values})


def test_no_array_at_all_is_a_database_all_the_same(location):
    write(location, {})
    assert BACKEND.recognises(location)
    assert read(location) == {}


@pytest.mark.parametrize("place", [FileLocation, PlaceWithoutPath])
def test_a_database_of_many_nodes_is_listed_whole(tmp_path, monkeypatch, place):
    monkeypatch.setattr(_ocdbt_nodes, "_MAX_NODE_NBYTES", 500)
    location = place(tmp_path)
    arrays = {f"layer.{i:03d}": array((100,), seed=i) for i in range(500)}
    write(location, arrays)
    root = ts.ocdbt.dump(ts.KvStore.open(location.kvstore()).result()).result()["versions"][-1]
    assert root["root_height"] > 1
    assert_same(read(location), arrays)


@settings(max_examples=60)
@given(
    values=st.dictionaries(st.binary(max_size=300), st.binary(max_size=300), max_size=60),
    node_nbytes=st.sampled_from([50, 500, 8_000_000]),
    file_nbytes=st.sampled_from([0, 700]),
)
def test_tensorstore_reads_every_value_of_a_tree(tmp_path_factory, values, node_nbytes, file_nbytes):
    location = FileLocation(tmp_path_factory.mktemp("database"))
    files = _data_files.data_files(location, "", file_nbytes)

    def stored(data):
        return files.append([np.frombuffer(data, np.uint8)])[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ocdbt_nodes, "_MAX_NODE_NBYTES", node_nbytes)
        entries = [_ocdbt_nodes.Entry(key, stored(value) if len(value) > 255 else value) for key, value in values.items()]
        location.write_bytes("manifest.ocdbt", _ocdbt_nodes.encode_manifest(*_ocdbt_nodes.encode_tree(entries, stored)))
    files.finish()
    store = database(location)
    assert sorted(store.list().result()) == sorted(values)
    assert {key: store.read(key).result().value for key in values} == values


def test_values_of_any_size_are_written_whole_where_the_system_takes_less(location, monkeypatch):
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, buffers: writev(descriptor, [bytes(b)[:777] for b in buffers[:2]][:1]))
    values = {"a": array((1000,)), "b": array((70, 90), "bfloat16"), "c": array((100,))}
    write(location, values)
    assert_same(read(location), values)


def test_files_end_near_the_size_that_is_asked_for(location):
    values = {f"a{i}": array((256,), seed=i) for i in range(100)}
    write(location, values, target_data_file_size=10_000)
    assert len(os.listdir(os.path.join(location.local_path, "d"))) >= 10
    assert_same(read(location), values)


def test_the_memory_of_a_large_chunk_is_released_once_the_future_is_done(location):
    values = np.zeros(MIB, np.float32)
    gone = weakref.ref(values)
    spec = spec_of("a", values)
    writer = BACKEND.writer(location, [spec], StorageOptions(), Job())
    writer.write([Chunk(spec, ((0, MIB),), values)]).result(timeout=60)
    del values
    gc.collect()
    assert gone() is None
    writer.abort()


# Names.


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", "a//", "//", "..", "../a", "a\0b", "é %2F", "|", "file://x", "c", ".zarray"]
)
@pytest.mark.parametrize("size", [3, MIB])
def test_a_name_is_a_key_as_tensorstore_derives_it(location, name, size):
    values = array((size,))
    write(location, {name: values})
    kvstore = {"driver": "ocdbt", "base": location.kvstore(), "path": name}
    stored = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result().read().result()
    assert stored.tobytes() == values.tobytes()


@pytest.mark.parametrize("name", ["", "/", "a/", "a//", "a\0b"])
def test_an_array_is_found_under_the_name_it_was_given(location, name):
    write(location, {name: array((3,))})
    reader = BACKEND.reader(location)
    assert reader.arrays()[name].name == name
    reader.close()


@pytest.mark.parametrize("use_zarr3", [False, True])
def test_names_that_look_like_keys_of_another_array_do_not_collide(location, use_zarr3):
    names = ["a", "a/0", "a/c", "a/c/0", "a/.zarray", "a/zarr.json", "", "c", "0"]
    arrays = {name: array((2, 2), seed=i) for i, name in enumerate(names)}
    write(location, arrays, (1, 1), use_zarr3=use_zarr3)
    assert_same(read(location), arrays)


@pytest.mark.parametrize(("first", "second"), [("a", "a/"), ("", "/")])
def test_names_with_the_same_keys_are_refused_naming_both(first, second):
    reasons = BACKEND.refuse_names([first, second])
    assert reasons[0] is None
    assert repr(first) in reasons[1]
    assert repr(second) in reasons[1]


def test_a_lone_surrogate_in_a_name_is_refused():
    assert "surrogate" in BACKEND.refuse_names(["a\ud800"])[0]


# Orbax reads what is written.


@pytest.mark.parametrize("use_zarr3", [False, True])
def test_orbax_reads_every_dtype(location, use_zarr3):
    arrays = {f"{dtype}.{i}": array(shape, dtype) for dtype in V3_DTYPES for i, shape in enumerate([(), (5,), (7, 3)])}
    write(location, arrays, use_zarr3=use_zarr3)
    add_orbax_metadata(location, arrays, use_zarr3=use_zarr3)
    assert_same(orbax_restore(location, arrays), arrays)


def test_orbax_reads_large_and_padded_chunks(location):
    arrays = {"large": array((700, 600)), "padded": array((1000, 1000), "int16")}
    specs = [spec_of("large", arrays["large"]), spec_of("padded", arrays["padded"], (900, 600))]
    writer = BACKEND.writer(location, specs, StorageOptions(), Job())
    for spec in specs:
        writer.write(list(chunks_of(spec, arrays[spec.name])))
    writer.commit()
    add_orbax_metadata(location, arrays)
    assert_same(orbax_restore(location, arrays), arrays)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\0b", "é %2F", "a.b"])
def test_orbax_reads_unusual_names(location, name):
    arrays = {name: array((3,))}
    write(location, arrays)
    add_orbax_metadata(location, arrays)
    assert_same(orbax_restore(location, arrays), arrays)


# What others wrote is read.


def sharded(shape, spec):
    values = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    return jax.device_put(values, NamedSharding(jax.make_mesh((4, 2), ("x", "y")), spec))


@pytest.mark.parametrize("use_zarr3", [False, True])
@pytest.mark.parametrize("use_compression", [False, True])
def test_what_orbax_wrote_is_read(tmp_path, use_zarr3, use_compression):
    tree = {
        "both": sharded((8, 6), PartitionSpec("x", "y")),
        "rows": sharded((16, 3), PartitionSpec("x")),
        "large": sharded((800, 512), PartitionSpec("y")),
        **{dtype: array((5, 4), dtype) for dtype in V3_DTYPES},
        "scalar": 7,
        "a/b %": np.float32(1.5),
    }
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=use_zarr3, use_compression=use_compression)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=400_000), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "step", args=ocp.args.PyTreeSave(tree, save_args=save_args))
    assert_same(read(FileLocation(tmp_path / "step")), {name: np.asarray(value) for name, value in tree.items()})


def test_what_orbax_merged_from_several_processes_is_read(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"a": np.arange(5000.0), "b": {"c": np.arange(6)}})
    assert (tmp_path / "step" / "ocdbt.process_0").exists()
    assert_same(read(FileLocation(tmp_path / "step")), {"a": np.arange(5000.0), "b.c": np.arange(6)})


def written_in_turn(location, spec, values, count):
    """Each process once it has written its chunks."""
    for rank in range(count):
        writer = BACKEND.writer(location, [spec], StorageOptions(), Job(rank, tuple(range(count))))
        writer.write(list(chunks_of(spec, values))[rank::count])
        writer.commit()
        yield rank


@pytest.mark.parametrize("place", [FileLocation, PlaceWithoutPath])
def test_what_several_processes_wrote_is_one_database(tmp_path, place):
    values = array((64, 128))
    directories = BACKEND.merge(place(tmp_path), written_in_turn(place(tmp_path), spec_of("a", values, (8, 128)), values, 4))
    assert list(directories) == [f"ocdbt.process_{rank}" for rank in range(4)]
    assert_same(read(place(tmp_path)), {"a": values})


def test_a_process_is_read_while_others_still_write(location):
    values = array((64, 128))

    def processes():
        for rank in written_in_turn(location, spec_of("a", values, (8, 128)), values, 3):
            yield rank
            location.delete(f"ocdbt.process_{rank}/manifest.ocdbt")  # whoever reads it later does not find it

    BACKEND.merge(location, processes())
    assert_same(read(location), {"a": values})


@pytest.mark.parametrize("place", [FileLocation, PlaceWithoutPath])
@pytest.mark.parametrize(
    "changes",
    [
        {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}},
        {"compressor": {"id": "bz2", "level": 1}},
        {"compressor": None},
        {"compressor": None, "order": "F"},
        {"compressor": None, "dtype": ">f4"},
        {"compressor": None, "dimension_separator": "/"},
    ],
)
def test_encodings_of_other_programs_are_read(tmp_path, place, changes):
    values = array((50, 70))
    metadata = {"shape": [50, 70], "chunks": [20, 30], "dtype": "<f4", "fill_value": None} | changes
    location = place(tmp_path)
    store(location, "a", metadata, values)
    assert_same(read(location), {"a": values})


def test_a_chunk_larger_than_its_array_is_read(location):
    store(location, "a", {"shape": [3], "chunks": [1000], "dtype": "<f4", "compressor": None, "fill_value": None}, array((3,)))
    assert_same(read(location), {"a": array((3,))})


def test_invalid_bytes_of_a_boolean_are_read_as_true(location):
    write(location, {"a": np.array([True, False, True])})
    database(location).write("a/0", b"\x02\x00\xff").result()
    assert read(location)["a"].view(np.uint8).tolist() == [1, 0, 1]


# Chunks that are not stored.


def with_a_missing_chunk(location, fill_value=None, **metadata):
    fields = {"shape": [4], "chunks": [2], "dtype": "<f4", "compressor": None, "fill_value": fill_value}
    store(location, "a", fields, np.array([1, 2, 3, 4], np.float32))
    database(location).delete_range(ts.KvStore.KeyRange("a/1", "a/2")).result()
    if metadata:
        add_orbax_metadata(location, ["a"], **metadata)


def test_a_missing_chunk_is_an_error_where_orbax_says_that_all_are_stored(location):
    with_a_missing_chunk(location, fill_value=0, store_array_data_equal_to_fill_value=True)
    with pytest.raises(errors.NotFoundError, match=r"chunk \(\(2, 4\),\) of array 'a'"):
        read(location)


def test_a_missing_chunk_is_zero_where_orbax_says_that_zeros_are_not_stored(location):
    with_a_missing_chunk(location, store_array_data_equal_to_fill_value=False)
    assert read(location)["a"].tolist() == [1, 2, 0, 0]
    assert orbax_restore(location, ["a"])["a"].tolist() == [1, 2, 0, 0]


def test_a_missing_chunk_is_the_fill_value_where_the_document_has_one(location):
    with_a_missing_chunk(location, fill_value=7.5)
    assert read(location)["a"].tolist() == [1, 2, 7.5, 7.5]


def test_a_missing_chunk_is_an_error_where_nothing_says_what_it_stands_for(location):
    with_a_missing_chunk(location)
    with pytest.raises(errors.NotFoundError, match="array 'a'"):
        read(location)


def test_an_unknown_array_is_not_found(location):
    write(location, {"a": array((2,))})
    reader = BACKEND.reader(location)
    with pytest.raises(errors.NotFoundError, match="'b'"):
        reader.read([("b", ((0, 2),), np.empty(2))]).result(timeout=60)
    reader.close()


# Damage.


def data_files(location):
    directory = os.path.join(location.local_path, "d")
    return [os.path.join(directory, name) for name in os.listdir(directory)]


@pytest.fixture
def saved(location):
    write(location, {"a": array((1000,)), "b": array((5,))})
    return location


@pytest.mark.parametrize("remove", ["", "manifest.ocdbt"])
def test_a_missing_database_names_its_manifest(saved, remove):
    path = os.path.join(saved.local_path, remove)
    shutil.rmtree(path) if not remove else os.unlink(path)
    with pytest.raises(errors.NotFoundError, match=r"manifest\.ocdbt"):
        read(saved)


def test_a_missing_data_file_is_named(saved):
    for path in data_files(saved):
        os.unlink(path)
    with pytest.raises(errors.NotFoundError, match="/d/"):
        read(saved)


@pytest.mark.parametrize("content", [b"", b"\x0c", b"garbage" * 50])
def test_a_damaged_manifest_is_an_error(saved, content):
    saved.write_bytes("manifest.ocdbt", content)
    with pytest.raises(errors.CorruptCheckpointError, match=r"manifest\.ocdbt"):
        read(saved)


@pytest.mark.parametrize("name", ["manifest.ocdbt", "d"])
def test_what_is_no_regular_file_is_never_waited_for(saved, name):
    for path in [os.path.join(saved.local_path, name)] if name != "d" else data_files(saved):
        os.unlink(path)
        os.mkfifo(path)
    with pytest.raises(errors.FormatError, match="regular file"):
        read(saved)


def test_a_link_out_of_the_directory_is_not_followed(saved, tmp_path):
    for i, path in enumerate(data_files(saved)):
        shutil.move(path, tmp_path / str(i))
        os.symlink(tmp_path / str(i), path)
    with pytest.raises(errors.FormatError, match="outside the directory"):
        read(saved)


def test_a_truncated_data_file_is_an_error(saved):
    for path in data_files(saved):
        os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(errors.CorruptCheckpointError, match="was cut off"):
        read(saved)


def test_a_data_file_that_shrinks_after_the_listing_is_an_error(saved):
    reader = BACKEND.reader(saved)
    reader.arrays()
    for path in data_files(saved):
        os.truncate(path, 100)
    with pytest.raises(errors.CorruptCheckpointError, match="was cut off"):
        reader.read([("a", ((0, 1000),), np.empty(1000, np.float32))]).result(timeout=60)
    reader.close()


@pytest.mark.parametrize("value", [b"", b"x" * 3999, b"x" * 4001, b"x" * 100])
def test_a_chunk_of_the_wrong_size_is_an_error(saved, value):
    database(saved).write("a/0", value).result()
    with pytest.raises(errors.CorruptCheckpointError, match=r"of array 'a' has \d+ bytes, expected 4000"):
        read(saved)


def test_a_compressed_chunk_that_cannot_be_decoded_is_named(location):
    metadata = {"shape": [40], "chunks": [10], "dtype": "<f4", "compressor": {"id": "zstd"}, "fill_value": None}
    store(location, "a", metadata, array((40,)))
    database(location).write("a/2", b"garbage").result()
    with pytest.raises(errors.CorruptCheckpointError, match=r"chunk \(\(20, 30\),\) of array 'a' cannot be decoded"):
        read(location)


def test_a_shard_too_small_for_its_own_index_is_an_error(location):
    array_spec = ArraySpec("a", (1 << 20,), np.dtype("u1"), (1 << 20,))
    document = json.loads(emit(array_spec, 3))
    shard = {"chunk_shape": [1], "codecs": [{"name": "bytes"}], "index_codecs": document["codecs"]}
    document["codecs"] = [{"name": "sharding_indexed", "configuration": shard}]
    database(location).write("a/zarr.json", json.dumps(document)).result()
    database(location).write("a/c/0", b"x" * 1000).result()
    with pytest.raises(errors.CorruptCheckpointError, match=r"has 1000 bytes, expected \(16777216"):
        read(location)


@pytest.mark.parametrize(
    ("key", "document"),
    [
        ("a/.zarray", b"{}"),
        ("a/.zarray", b"x" * 2_000_000),
        (b"\xff/.zarray", emit(ArraySpec("a", (2,), np.dtype("f4"), (2,)), 2)),
        ("a/zarr.json", b"null"),
    ],
)
def test_a_document_that_is_none_is_named(saved, key, document):
    database(saved).write(key, document).result()
    with pytest.raises(errors.FormatError, match=r"the document at key b'"):
        read(saved)


@pytest.mark.parametrize("compressor", [None, {"id": "zstd"}])
@pytest.mark.parametrize("stored", [b"", b"x" * 4000])
def test_an_array_that_claims_what_is_not_stored_is_refused_before_any_is_allocated(saved, compressor, stored):
    document = json.loads(emit(ArraySpec("a", (1 << 50,), np.dtype("f4"), (1 << 50,)), 2)) | {"compressor": compressor}
    database(saved).write("a/.zarray", json.dumps(document)).result()
    database(saved).write("a/0", stored).result()
    reader = BACKEND.reader(saved)
    with pytest.raises(errors.FormatError, match=r"'a' of shape .* claims 4503599627370496 bytes"):
        reader.arrays()
    reader.close()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000])
def test_damaged_metadata_of_orbax_says_nothing_about_missing_chunks(location, content):
    with_a_missing_chunk(location, fill_value=1)
    location.write_bytes("_METADATA", content)
    assert read(location)["a"].tolist() == [1, 2, 1, 1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("NOT_FOUND: Manifest not found"), errors.NotFoundError),
        (ValueError("DATA_LOSS: Error decoding"), errors.CorruptCheckpointError),
        (ValueError("Invalid key"), errors.CorruptCheckpointError),
        (ValueError("UNAVAILABLE: connection refused"), errors.StorageError),
        (ValueError("PERMISSION_DENIED: no [os_error_code='13']"), errors.StorageError),
        (ValueError("NOT_FOUND: no [os_error_code='2']"), errors.NotFoundError),
        (TypeError("Unable to cast Python instance"), errors.StorageError),
    ],
)
def test_what_tensorstore_says_while_reading_becomes_one_of_our_errors(error, expected):
    assert type(reading_error(error, "/there")) is expected


# Failures while writing, and the ends of things.


def run_limited(tmp_path, body):
    """Runs a save in a process whose files may not grow beyond a million bytes."""
    program = f"""
        import resource, sys
        import numpy as np
        from ckptkit import errors
        from ckptkit.grid import ArraySpec, Chunk
        from ckptkit.location import FileLocation
        from ckptkit.options import StorageOptions
        from ckptkit.processes import Job
        from ckptkit.storage.ocdbt import OcdbtBackend
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        specs = [ArraySpec(f"a{{i}}", (size,), np.dtype("u1"), (size,)) for i, size in enumerate(int(s) for s in sys.argv[1:])]
        writer = OcdbtBackend().writer(FileLocation({str(tmp_path / "database")!r}), specs, StorageOptions(), Job())
        chunks = [Chunk(spec, ((0, spec.shape[0]),), np.ones(spec.shape, "u1")) for spec in specs]
    """
    done = fresh.run(textwrap.dedent(program) + textwrap.dedent(body), *["900000"] * 50)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_surfaces_with_its_number(tmp_path):
    body = """
        try:
            writer.write(chunks)
            writer.commit()
        except errors.StorageError as error:
            print(error.errno, error.filename)
        writer.abort()
        writer.abort()
    """
    number, path = run_limited(tmp_path, body).split()
    assert number == "27"
    assert path.startswith(str(tmp_path / "database" / "d"))


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(errors.StorageError) as caught:
        write(FileLocation(tmp_path / "file"), {"a": array((3,))})
    assert caught.value.errno == 20  # ENOTDIR


def test_abort_leaves_no_manifest_of_what_did_not_commit(location):
    values = array((1000,))
    spec = spec_of("a", values)
    writer = BACKEND.writer(location, [spec], StorageOptions(), Job())
    writer.write(list(chunks_of(spec, values)))
    writer.abort()
    assert not BACKEND.recognises(location)


def test_a_closed_reader_says_so(saved):
    reader = BACKEND.reader(saved)
    reader.close()
    reader.close()
    with pytest.raises(errors.ClosedError):
        reader.read([])
    with pytest.raises(errors.ClosedError):
        reader.arrays()


def test_many_threads_share_a_reader(location, monkeypatch):
    monkeypatch.setattr(_chunk_reader, "_BATCH_REQUESTS", 7)
    arrays = {f"a{i}": array((64,), seed=i) for i in range(200)}
    write(location, arrays)
    reader = BACKEND.reader(location)
    wrong = []

    def read_all():
        outs = {name: np.empty(64, np.float32) for name in arrays}
        reader.read([(name, ((0, 64),), out) for name, out in outs.items()]).result(timeout=60)
        wrong.extend(name for name, out in outs.items() if out.tobytes() != arrays[name].tobytes())

    threads = [threading.Thread(target=read_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.close()
    assert wrong == []


def test_other_directories_are_not_recognised(tmp_path):
    assert not BACKEND.recognises(FileLocation(tmp_path))
    assert not BACKEND.recognises(FileLocation(tmp_path / "missing"))


def test_a_sync_that_fails_while_the_file_is_written_fails_the_save(tmp_path, monkeypatch):
    def fail(descriptor):
        monkeypatch.undo()  # as the kernel, which tells it once
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(errors.StorageError, match="the disk is gone"):
        write(FileLocation(tmp_path), {str(i): array((4 * MIB,), seed=i) for i in range(4)})


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which file a descriptor is of")
def test_a_file_that_fails_to_close_fails_the_save_with_that_error(tmp_path, monkeypatch):
    close = os.close

    def fail(descriptor):
        data = "/d/" in os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)  # as Linux does, whatever it returns
        if data:
            raise OSError(errno.EDQUOT, "the quota is used up")

    monkeypatch.setattr(os, "close", fail)
    with pytest.raises(errors.StorageError, match="the quota is used up"):
        write(FileLocation(tmp_path), {"a": array((2000,))})


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which files are open")
def test_a_disk_that_is_full_before_the_first_chunk_leaves_no_file_open(tmp_path, monkeypatch):
    def fail(descriptor, buffers):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "writev", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(errors.StorageError, match="full"):
        write(FileLocation(tmp_path), {"a": array((2000,))})
    assert os.listdir("/proc/self/fd") == before
