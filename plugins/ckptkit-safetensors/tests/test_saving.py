"""What is saved comes back, is what other programs read, and is refused or reported where it cannot be."""

import asyncio
import gc
import json
import os
import shutil
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import ckptkit
from ckptkit import errors
from ckptkit.args import Composite, PyTreeSave, StandardSave
from ckptkit.options import StorageOptions
from ckptkit.storage import ArraySpec, Chunk, Job, chunk_indices
from ckptkit.testing import assert_same
from ckptkit_safetensors import SafetensorsBackend
from ckptkit_safetensors.header import DTYPES

BACKEND = SafetensorsBackend()


def values(shape, dtype, seed=0):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)


def spec(name, data, chunk_shape=None):
    return ArraySpec(name, data.shape, data.dtype, tuple(max(1, n) for n in chunk_shape or data.shape))


def write(path, arrays, options=None, order=None):
    """Writes (spec, values) pairs, in random order where there is one."""
    location = ckptkit.default_registry().location(path)
    writer = BACKEND.writer(location, [array for array, _ in arrays], options or StorageOptions(), Job())
    chunks = [
        Chunk(array, index, np.asarray(data[tuple(slice(*bounds) for bounds in index)], order="C"))
        for array, data in arrays
        for index in chunk_indices(array)
    ]
    if order is not None:
        order.shuffle(chunks)
    for chunk in chunks:
        writer.write([chunk])
    writer.commit()
    return location


def tree(mesh):
    rng = np.random.default_rng(0)
    return {
        "layers": [{"w": jnp.asarray(rng.random((8, 16)), jnp.bfloat16)}, {"w": jnp.arange(6, dtype=jnp.int8)}],
        "sharded": jax.device_put(rng.random((16, 6), np.float32), NamedSharding(mesh, PartitionSpec("x", "y"))),
        "columns": jax.device_put(rng.random((64, 8), np.float32), NamedSharding(mesh, PartitionSpec(None, "x"))),
        "fp8": jnp.ones((3,), jnp.float8_e4m3fn),
        "bool": np.array([True, False]),
        "scalar": np.full((), 3.5),
        "empty": np.zeros((0, 3), np.float32),
        "step": 7,
        "key": jax.random.key(0),
        "none": None,
        "a.b/../c": np.arange(3),
    }


# What is saved comes back.


def test_a_tree_comes_back(tmp_path, mesh):
    ckptkit.save(tmp_path / "c", tree(mesh), storage="safetensors")
    assert_same(ckptkit.restore(tmp_path / "c"), tree(mesh))
    assert_same(ckptkit.restore(tmp_path / "c", tree(mesh)), tree(mesh))


def test_in_the_background_and_on_other_devices(tmp_path, mesh):
    with ckptkit.StandardCheckpointer(storage="safetensors") as checkpointer:
        checkpointer.save(tmp_path / "c", tree(mesh))
        checkpointer.wait_until_finished()
        target = tree(mesh)
        for name in ("sharded", "columns"):
            sharding = NamedSharding(mesh, PartitionSpec("y"))
            target[name] = jax.ShapeDtypeStruct(target[name].shape, target[name].dtype, sharding=sharding)
        found = checkpointer.restore(tmp_path / "c", target)
    for name in ("sharded", "columns"):
        assert found[name].sharding == target[name].sharding
        np.testing.assert_array_equal(found[name], tree(mesh)[name])


def test_str_leaves_and_items_of_a_composite(tmp_path):
    handler = ckptkit.PyTreeCheckpointHandler(storage="safetensors")
    with ckptkit.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "texts", {"name": "größe", "w": np.arange(3)})
    assert ckptkit.restore(tmp_path / "texts")["name"] == "größe"
    items = ckptkit.CompositeCheckpointHandler(state=ckptkit.StandardCheckpointHandler(storage="safetensors"))
    with ckptkit.Checkpointer(items) as checkpointer:
        checkpointer.save(tmp_path / "items", Composite(state=StandardSave({"w": np.arange(3)})))
    assert (tmp_path / "items" / "state" / "model.safetensors").exists()
    np.testing.assert_array_equal(ckptkit.restore(tmp_path / "items").state["w"], np.arange(3))


def test_inside_a_running_event_loop(tmp_path):
    async def main():
        ckptkit.save(tmp_path / "c", {"a": np.arange(3)}, storage="safetensors")
        return ckptkit.restore(tmp_path / "c")

    np.testing.assert_array_equal(asyncio.run(main())["a"], np.arange(3))


@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    dtype=st.sampled_from(list(DTYPES.values())),
    limit=st.sampled_from([None, 1, 64]),
    data=st.data(),
)
def test_chunks_of_any_grid_in_any_order(tmp_path_factory, shape, dtype, limit, data):
    arrays = []
    for i in range(data.draw(st.integers(0, 3))):
        chunk_shape = tuple(data.draw(st.integers(1, 10)) for _ in shape)
        filled = values(shape, dtype, i)
        arrays.append((spec(f"a{i}", filled, chunk_shape), filled))
    path = tmp_path_factory.mktemp("arrays")
    location = write(path, arrays, StorageOptions(target_data_file_size=limit), data.draw(st.randoms(use_true_random=False)))
    reader = BACKEND.reader(location)
    assert reader.arrays() == {array.name: array for array, _ in arrays}
    outs = [
        (array.name, index, np.empty([b - a for a, b in index], dtype)) for array, _ in arrays for index in chunk_indices(array)
    ]
    reader.read(outs).result(60)
    reader.close()
    expected = {array.name: filled for array, filled in arrays}
    for name, index, out in outs:
        assert out.tobytes() == expected[name][tuple(slice(*bounds) for bounds in index)].tobytes()
    for file in path.glob("*.safetensors"):  # what was written is what the library takes it for
        for name, found in safetensors.deserialize(file.read_bytes()):
            assert bytes(found["data"]) == expected[name].tobytes()


# Other programs read it.


@pytest.fixture
def saved(tmp_path):
    """Every dtype, as saved by name."""
    arrays = {f"x.{word}": values((4, 3), dtype, 1) for word, dtype in DTYPES.items()}
    ckptkit.save(tmp_path / "c", arrays, storage="safetensors")
    return tmp_path / "c", arrays


def test_the_library_sees_names_dtypes_shapes_and_bytes(saved):
    path, arrays = saved
    found = dict(safetensors.deserialize((path / "model.safetensors").read_bytes()))
    assert {name: (f"x.{f['dtype']}", f["shape"], bytes(f["data"])) for name, f in found.items()} == {
        name: (name, [4, 3], array.tobytes()) for name, array in arrays.items()
    }


def test_safe_open_reads_it(saved):
    path, arrays = saved
    with safetensors.safe_open(path / "model.safetensors", "numpy") as file:
        assert set(file.keys()) == set(arrays)
        assert file.metadata()["format"] == "pt"  # without a format it knows, transformers refuses a file
        np.testing.assert_array_equal(file.get_slice("x.F32")[1:3], arrays["x.F32"][1:3])


def test_orbax_reads_it(tmp_path, mesh):
    arrays = {"a.w": np.arange(32, dtype=np.float32).reshape(8, 4), "b": np.ones(3, ml_dtypes.bfloat16)}
    ckptkit.save(tmp_path / "c", arrays, storage="safetensors")
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    target = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding if a.ndim == 2 else None) for name, a in arrays.items()
    }
    with ocp.Context(checkpoint_layout=ocp.options.CheckpointLayout.SAFETENSORS):
        for path in (tmp_path / "c", tmp_path / "c" / "model.safetensors"):
            for found in (ocp.load(path), ocp.load(path, target)):
                assert {name: np.asarray(a).tobytes() for name, a in found.items()} == {n: a.tobytes() for n, a in arrays.items()}


def test_files_beyond_a_size_are_those_of_the_hub(tmp_path):
    arrays = {f"w{i}": values((100,), np.float64, i) for i in range(5)} | {"large": values((1000,), np.float64, 9)}
    with ckptkit.StandardCheckpointer(storage="safetensors", target_data_file_size=1700) as checkpointer:
        checkpointer.save(tmp_path / "c", arrays)
    index = json.loads((tmp_path / "c" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 12000}
    assert set(index["weight_map"]) == set(arrays)
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert files == sorted(path.name for path in (tmp_path / "c").glob("*.safetensors"))
    for file in files:
        found = safetensors.numpy.load_file(tmp_path / "c" / file)
        assert list(found) == ["large"] or sum(a.nbytes for a in found.values()) <= 1700
        for name, array in found.items():
            assert index["weight_map"][name] == file
            np.testing.assert_array_equal(array, arrays[name])
    assert_same(ckptkit.restore(tmp_path / "c"), arrays)


def test_the_size_of_files_can_be_that_of_one_save(tmp_path):
    with ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler(storage="safetensors")) as checkpointer:
        checkpointer.save(tmp_path / "c", PyTreeSave({"a": np.arange(9), "b": np.arange(9)}, ocdbt_target_data_file_size=72))
    assert len(list((tmp_path / "c").glob("model-*-of-00002.safetensors"))) == 2


def test_the_first_array_begins_at_a_multiple_of_64_and_each_at_one_of_its_items(tmp_path):
    arrays = {"a": values((3,), np.int8), "b": values((3,), np.float64), "c": values((3,), np.float16)}
    ckptkit.save(tmp_path / "c", arrays, storage="safetensors")
    data = (tmp_path / "c" / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 64 == 0
    header = json.loads(data[8:start])
    assert all(header[name]["data_offsets"][0] % a.itemsize == 0 for name, a in arrays.items())


# What cannot be saved is refused before anything is written.


@pytest.mark.parametrize("dtype", ["complex128", ml_dtypes.int4, ml_dtypes.float8_e4m3b11fnuz, ml_dtypes.float4_e2m1fn])
def test_dtypes_that_the_format_lacks(tmp_path, dtype):
    tree = {"good": np.arange(3), "bad": np.zeros(3, dtype), "worse": np.zeros(2, dtype)}
    with pytest.raises(errors.TreeError, match=r"2 of 3 leaves(?s:.)*\('bad',\): safetensors has no dtype(?s:.)*\('worse',\)"):
        ckptkit.save(tmp_path / "c", tree, storage="safetensors")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "reason"), [("__metadata__", "is taken in a safetensors file"), ("\ud800", "cannot be encoded as UTF-8")]
)
def test_names_that_the_format_lacks(name, reason):
    assert reason in BACKEND.refuse_names([name])[0]


@pytest.mark.parametrize("options", [{"use_compression": True}, {"use_zarr3": True}])
def test_options_that_the_format_lacks(tmp_path, options):
    handler = ckptkit.PyTreeCheckpointHandler(storage="safetensors", **options)
    with ckptkit.Checkpointer(handler) as checkpointer, pytest.raises(errors.ArgsError, match=r"leave out use_compression"):
        checkpointer.save(tmp_path / "c", {"a": np.arange(3)})
    assert os.listdir(tmp_path) == []


# Faults


def test_a_flipped_bit_is_reported_with_the_leaf(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": np.zeros(1000), "b": np.zeros(1000)}, storage="safetensors")
    file = tmp_path / "c" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(errors.CorruptCheckpointError, match=r"\('b',\): chunk"):
        ckptkit.restore(tmp_path / "c")
    with pytest.warns(UserWarning, match="1 of 2 leaves differ"):
        assert ckptkit.restore(tmp_path / "c", on_corrupt="skip")["b"] is ...


def test_a_bit_flipped_anywhere_is_an_error(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": values((3,), bool), "b": np.arange(4, dtype=np.int16)}, storage="safetensors")
    file = tmp_path / "c" / "model.safetensors"
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(errors.CorruptCheckpointError):
            ckptkit.restore(tmp_path / "c")


def test_the_list_of_files_has_the_header_alone(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": np.zeros(1000)}, storage="safetensors")
    listed = json.loads((tmp_path / "c" / "ckptkit_files.json").read_bytes())["files"]["model.safetensors"]
    data = (tmp_path / "c" / "model.safetensors").read_bytes()
    assert listed == [len(data) - 8000, xxhash.xxh3_64_hexdigest(data[:-8000]), True]
    assert ckptkit.verify(tmp_path / "c").state == "whole"


def test_a_folder_that_looks_like_an_array_of_zarr_changes_nothing(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": np.arange(3)}, storage="safetensors")
    ckptkit.save(tmp_path / "other", {"a": np.arange(4)}, storage="zarr")
    shutil.copytree(tmp_path / "other" / "a", tmp_path / "c" / "a")
    assert_same(ckptkit.restore(tmp_path / "c"), {"a": np.arange(3)})
    assert ckptkit.verify(tmp_path / "c").state == "whole"


@pytest.mark.parametrize("item", ["", "tree"])
@pytest.mark.parametrize("size", [None, 100], ids=["one file", "several"])
def test_files_that_came_later_change_nothing(tmp_path, item, size):
    values = {"a": np.arange(30.0), "b": np.ones(30)}
    saved = PyTreeSave(values, ocdbt_target_data_file_size=size)
    trees = ckptkit.PyTreeCheckpointHandler(storage="safetensors")
    with ckptkit.Checkpointer(ckptkit.CompositeCheckpointHandler(tree=trees) if item else trees) as checkpointer:
        checkpointer.save(tmp_path / "c", Composite(tree=saved) if item else saved)
    folder = tmp_path / "c" / item
    safetensors.numpy.save_file({"a": np.zeros(3), "z": np.zeros(3)}, folder / "ema.safetensors")
    (folder / "other.safetensors.index.json").touch()
    if size is None:
        (folder / "model.safetensors.index.json").touch()
    found = ckptkit.restore(tmp_path / "c")
    assert_same(found.tree if item else found, values)
    assert ckptkit.verify(tmp_path / "c").state == "whole"


def test_a_file_cut_off_is_reported(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": np.zeros(1000)}, storage="safetensors")
    os.truncate(tmp_path / "c" / "model.safetensors", 4000)
    with pytest.raises(errors.CorruptCheckpointError, match=r"it was cut off"):
        ckptkit.restore(tmp_path / "c")


def test_a_file_cut_off_while_it_is_read_is_reported(tmp_path):
    location = write(tmp_path, [(spec("a", np.zeros(1000)), np.zeros(1000))])
    reader = BACKEND.reader(location)
    reader.arrays()
    os.truncate(tmp_path / "model.safetensors", 4000)
    with pytest.raises(errors.CorruptCheckpointError, match=r"the file ends at byte 4000"):
        reader.read([("a", ((0, 1000),), np.empty(1000))]).result(60)
    reader.close()


def test_a_write_that_fails_is_reported(tmp_path):
    data = np.zeros(1000)
    array = spec("a", data)
    writer = BACKEND.writer(ckptkit.default_registry().location(tmp_path), [array], StorageOptions(), Job())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(errors.NotFoundError, match=r"cannot write"):
        writer.write([Chunk(array, ((0, 1000),), data)]).result(60)
    with pytest.raises(errors.NotFoundError):
        writer.commit()
    writer.abort()


def test_an_unknown_array_and_a_closed_reader_are_errors(tmp_path):
    reader = BACKEND.reader(write(tmp_path, [(spec("a", np.zeros(3)), np.zeros(3))]))
    with pytest.raises(errors.NotFoundError, match=r"there is no array 'b' here"):
        reader.read([("b", ((0, 3),), np.empty(3))]).result(60)
    reader.close()
    with pytest.raises(errors.ClosedError):
        reader.arrays()


# Memory, and calls of the system.


def test_data_is_let_go_when_it_is_written(tmp_path):
    data = np.zeros((64, 64))
    for chunk_shape in [(64, 64), (64, 4)]:  # in runs, and in rows
        array = spec("a", data, chunk_shape)
        path = tmp_path / str(chunk_shape)
        path.mkdir()
        writer = BACKEND.writer(ckptkit.default_registry().location(path), [array], StorageOptions(), Job())
        chunks = [Chunk(array, index, np.zeros([b - a for a, b in index])) for index in chunk_indices(array)]
        alive = [weakref.ref(chunk.data) for chunk in chunks]
        writing = writer.write(chunks)
        del chunks
        writing.result(60)
        gc.collect()
        assert [ref() for ref in alive] == [None] * len(alive)
        writer.commit()


def test_writing_takes_no_memory_of_its_own(tmp_path):
    data = np.zeros((64 << 20) // 8)
    array = spec("a", data, (1 << 20,))
    tracemalloc.start()
    try:
        write(tmp_path, [(array, data)])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture
def calls(monkeypatch):
    """Bytes of every call that reads or writes several buffers, as the system is asked for them."""
    made = {"preadv": [], "pwritev": []}
    for name, record in made.items():
        real = getattr(os, name)

        def spied(descriptor, buffers, offset, real=real, record=record):
            record.append(sum(memoryview(b).nbytes for b in buffers))
            return real(descriptor, buffers, offset)

        monkeypatch.setattr(os, name, spied)
    return made


def test_no_call_moves_more_than_1_mib(tmp_path, calls):
    ckptkit.save(tmp_path / "c", {"a": np.zeros(3 << 17)}, storage="safetensors")
    assert calls["pwritev"][1:] == [1 << 20] * 3  # the first is the header


def test_small_arrays_move_together(tmp_path, calls):
    tree = {f"a{i:04}": np.full(128, i, np.float64) for i in range(4000)}
    ckptkit.save(tmp_path / "c", tree, storage="safetensors")
    assert len(calls["pwritev"]) <= 8
    ckptkit.restore(tmp_path / "c")
    assert len(calls["preadv"]) <= 8


def test_columns_too_short_to_move_alone_move_as_rows(tmp_path, mesh, calls):
    array = jax.device_put(
        np.random.default_rng(0).random((1 << 16, 8), np.float32), NamedSharding(mesh, PartitionSpec(None, "x"))
    )
    ckptkit.save(tmp_path / "c", {"a": array}, storage="safetensors")
    assert len(calls["pwritev"]) <= 1 + 4 * 2
    np.testing.assert_array_equal(ckptkit.restore(tmp_path / "c")["a"], array)
