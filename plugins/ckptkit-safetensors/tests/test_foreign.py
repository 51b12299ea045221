"""Files and folders of other programs are checkpoints: as they are, into any tree, onto any devices."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

import ckptkit
from ckptkit import errors
from ckptkit.args import StandardRestore

WEIGHTS = {
    "model.layers.0.w": np.arange(64, dtype=np.float32).reshape(8, 8),
    "model.layers.1.w": np.arange(64, 128, dtype=np.float32).reshape(8, 8),
    "model.norm": np.ones((4,), ml_dtypes.bfloat16),
    "model": np.full((), 2, np.int64),
    "": np.zeros((0, 2), np.float16),
}


def assert_same(found, expected):
    assert {name: (a.dtype, a.shape, np.asarray(a).tobytes()) for name, a in found.items()} == {
        name: (a.dtype, a.shape, np.asarray(a).tobytes()) for name, a in expected.items()
    }


@pytest.fixture
def file(tmp_path):
    (tmp_path / "hub").mkdir()
    path = tmp_path / "hub" / "model.safetensors"
    safetensors.numpy.save_file(WEIGHTS, path)
    (tmp_path / "hub" / "config.json").write_text("{}")
    return path


@pytest.fixture
def parts(tmp_path):
    """A folder of two numbered files with their index, and one more file that the index does not list."""
    folder = tmp_path / "parts"
    folder.mkdir()
    names = list(WEIGHTS)
    files = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for name, held in files.items():
        safetensors.numpy.save_file({key: WEIGHTS[key] for key in held}, folder / name)
    safetensors.numpy.save_file(WEIGHTS, folder / "consolidated.safetensors")
    weight_map = {key: name for name, held in files.items() for key in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def edit_index(folder, **weights):
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"] |= weights
    index.write_text(json.dumps(document))


# Which files make a checkpoint.


def test_a_file_is_a_flat_dict(file):
    assert_same(ckptkit.restore(file), WEIGHTS)


def test_a_folder_of_one_file_is_the_same(file):
    assert_same(ckptkit.restore(file.parent), WEIGHTS)


def test_an_index_says_which_files_count(parts):
    assert_same(ckptkit.restore(parts), WEIGHTS)


def test_numbered_files_without_an_index(parts):
    (parts / "model.safetensors.index.json").unlink()
    (parts / "consolidated.safetensors").unlink()
    assert_same(ckptkit.restore(parts), WEIGHTS)


@pytest.mark.parametrize("keep_index", [True, False])
def test_a_missing_file_is_named(parts, keep_index):
    (parts / "consolidated.safetensors").unlink()
    (parts / "model-00001-of-00002.safetensors").unlink()
    if not keep_index:
        (parts / "model.safetensors.index.json").unlink()
    with pytest.raises(errors.NotFoundError, match=r"model-00001-of-00002\.safetensors is missing"):
        ckptkit.restore(parts)


def test_an_array_in_two_files_without_an_index_is_refused(parts):
    (parts / "model.safetensors.index.json").unlink()
    with pytest.raises(errors.FormatError, match=r"is in consolidated\.safetensors and in model-00001-of"):
        ckptkit.restore(parts)


def test_an_array_that_is_not_where_the_index_says_is_named(parts):
    edit_index(parts, extra="model-00001-of-00002.safetensors")
    with pytest.raises(errors.NotFoundError, match=r"says that array 'extra' is in model-00001-of-00002\.safetensors"):
        ckptkit.restore(parts)


@pytest.mark.parametrize("name", ["../hub/model.safetensors", "/etc/passwd", "..", "config.json", "a/b.safetensors"])
def test_an_index_leads_nowhere_else(file, parts, name):
    edit_index(parts, extra=name)
    with pytest.raises(errors.FormatError, match=r"is not the name of a safetensors file in the same directory"):
        ckptkit.restore(parts)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "[" * 100_000, "\xff"])
def test_an_index_that_is_none(parts, text):
    (parts / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(errors.FormatError, match=r"model\.safetensors\.index\.json"):
        ckptkit.restore(parts)


def test_several_indices_are_several_models(parts):
    (parts / "model.safetensors.index.json").rename(parts / "a.safetensors.index.json")
    (parts / "b.safetensors.index.json").write_text("{}")
    with pytest.raises(errors.FormatError, match=r"holds several models: a\.saf.*, b\.saf"):
        ckptkit.restore(parts)


def test_folders_of_models_are_items(tmp_path, file):
    for name in ("unet", "vae"):
        (tmp_path / "pipeline" / name).mkdir(parents=True)
        safetensors.numpy.save_file({name: np.arange(3)}, tmp_path / "pipeline" / name / "model.safetensors")
    found = ckptkit.restore(tmp_path / "pipeline")
    assert_same(found["unet"], {"unet": np.arange(3)})
    assert_same(found["vae"], {"vae": np.arange(3)})


def test_the_cache_of_the_hub_links_to_its_blobs(tmp_path, file):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    file.rename(tmp_path / "models--x" / "blobs" / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert_same(ckptkit.restore(snapshot), WEIGHTS)
    assert_same(ckptkit.restore(snapshot / "model.safetensors"), WEIGHTS)


def test_other_links_out_of_a_folder_are_refused(tmp_path, file):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").symlink_to(file)
    with pytest.raises(errors.FormatError, match=r"the link leads out of"):
        ckptkit.restore(tmp_path / "other")


@pytest.mark.timeout(20)
def test_a_named_pipe_is_no_file_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(errors.FormatError, match=r"expected a regular file"):
        ckptkit.restore(tmp_path)


def test_nothing_there_and_nothing_in_it(tmp_path):
    with pytest.raises(errors.NotFoundError):
        ckptkit.restore(tmp_path / "model.safetensors")
    safetensors.numpy.save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(errors.FormatError, match="It holds: no arrays"):
        ckptkit.restore(tmp_path / "model.safetensors")


def test_a_file_of_a_checkpoint_of_ours_stands_for_its_arrays(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": {"b": np.arange(3)}, "n": 1}, storage="safetensors")
    assert_same(ckptkit.restore(tmp_path / "c" / "model.safetensors"), {"a.b": np.arange(3), "n": np.array(1)})


def test_metadata_tells_of_the_arrays(file):
    found = ckptkit.Checkpointer().metadata(file).item_metadata
    assert found["model.norm"].dtype == ml_dtypes.bfloat16
    assert found["model.layers.0.w"].shape == (8, 8)


# Into which tree, onto which devices.


def test_a_target_may_be_flat_or_nested(file):
    w0, w1 = WEIGHTS["model.layers.0.w"], WEIGHTS["model.layers.1.w"]
    flat = {"model.layers.0.w": w0, "model.layers.1.w": w1, "model.norm": ..., "model": ..., "": ...}
    nested = {"model": {"layers": [{"w": w0}, {"w": w1}], "state": {}}, "rest": None}
    assert_same(
        {k: v for k, v in ckptkit.restore(file, flat).items() if v is not ...}, {k: WEIGHTS[k] for k in list(WEIGHTS)[:2]}
    )
    found = ckptkit.Checkpointer().restore(file, ckptkit.args.PyTreeRestore(nested, partial_restore=True))
    np.testing.assert_array_equal(found["model"]["layers"][1]["w"], w1)
    assert found["rest"] is None
    assert found["model"]["state"] == {}


def test_what_does_not_agree_is_listed(file):
    with pytest.raises(errors.TargetError, match=r"1 in the target.*\n.*('model.x',)(?s:.)*5 in the checkpoint, but not"):
        ckptkit.restore(file, {"model": {"x": np.arange(3)}})


@pytest.fixture
def read_bytes(monkeypatch):
    """Bytes that were read into arrays."""
    counts = []
    real = os.preadv

    def spied(descriptor, buffers, offset):
        counts.append(real(descriptor, buffers, offset))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", spied)
    return counts


@pytest.mark.parametrize("spec", [("x", "y"), (None, "x"), ("x",), (("x", "y"),), (None, ("x", "y")), ()])
def test_any_sharding_reads_each_byte_once(tmp_path, mesh, read_bytes, spec):
    weight = np.random.default_rng(0).random((1024, 2048), np.float32)
    safetensors.numpy.save_file({"a": weight, "unwanted": weight}, tmp_path / "model.safetensors")
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    found = ckptkit.restore(tmp_path, {"a": jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=sharding), "unwanted": ...})
    assert found["a"].sharding == sharding
    np.testing.assert_array_equal(found["a"], weight)
    assert sum(read_bytes) == weight.nbytes


def test_a_part_on_one_device_reads_that_part(tmp_path, read_bytes):
    weight = np.random.default_rng(0).random((1 << 14, 64), np.float32)
    safetensors.numpy.save_file({"a": weight}, tmp_path / "model.safetensors")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {"a": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding)}
    found = ckptkit.restore(tmp_path, StandardRestore(target, strict=False))
    np.testing.assert_array_equal(found["a"], weight[:64])
    assert sum(read_bytes) == 64 * 64 * 4


@pytest.mark.parametrize("spec", [(None, "x"), (None, None, "y"), ("x", None, "y")])
def test_short_runs_are_read_in_rows(tmp_path, mesh, read_bytes, spec):
    weight = np.random.default_rng(0).integers(0, 99, (512, 8, 4), np.int16)
    safetensors.numpy.save_file({"a": weight}, tmp_path / "model.safetensors")
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    found = ckptkit.restore(tmp_path, {"a": jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=sharding)})
    np.testing.assert_array_equal(found["a"], weight)
    assert len(read_bytes) <= 8


def test_devices_and_casts_as_for_any_checkpoint(file):
    target = dict.fromkeys(WEIGHTS, ...) | {"model.norm": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=None)}
    assert ckptkit.restore(file, target)["model.norm"].dtype == jnp.float32
    assert isinstance(ckptkit.restore(file, devices="numpy")["model.norm"], np.ndarray)


def bools(path, stored, metadata):
    """A file that holds one array of bools, with these bytes."""
    header = {"__metadata__": metadata, "a": {"dtype": "BOOL", "shape": [len(stored)], "data_offsets": [0, len(stored)]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + stored)


def test_any_byte_but_0_is_true(tmp_path):
    bools(tmp_path / "model.safetensors", bytes([0, 1, 2, 255]), {})
    assert ckptkit.restore(tmp_path)["a"].tobytes() == bytes([0, 1, 1, 1])


@pytest.mark.parametrize("byte", [2, 255])
def test_a_file_that_claims_to_be_ckptkits_is_held_to_its_bytes_of_bools(tmp_path, byte):
    bools(tmp_path / "model.safetensors", bytes([0, 1, byte, 1]), {"ckptkit.chunk_shapes": "{}"})
    with pytest.raises(errors.CorruptCheckpointError, match=rf"a bool is the byte {byte}, expected 0 or 1"):
        ckptkit.restore(tmp_path)
    bools(tmp_path / "model.safetensors", bytes([0, 1, 1, 1]), {"ckptkit.chunk_shapes": "{}"})
    assert ckptkit.restore(tmp_path)["a"].tobytes() == bytes([0, 1, 1, 1])
