"""The Array handler, on its own and against Orbax's: what it takes, how it stores it, and how it gives it back."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import ckptkit
from ckptkit import args, errors
from ckptkit.testing import assert_same

ORBAX_TYPESTR = ocp.ArrayCheckpointHandler().typestr()


def sharded():
    return jax.device_put(
        jnp.arange(48.0).reshape(8, 6), NamedSharding(jax.make_mesh((4, 2), ("x", "y")), PartitionSpec("x", "y"))
    )


ITEMS = {
    "np.ndarray": lambda: np.arange(5),
    "0-d": lambda: np.array(2.5, np.float32),
    "bfloat16": lambda: np.ones((2, 3), jnp.bfloat16),
    "jax.Array": lambda: jnp.ones((3, 4)),
    "sharded": sharded,
    "key": lambda: jax.random.key(7),
    "rbg keys": lambda: jax.random.split(jax.random.key(7, impl="rbg"), 3),
    "int": lambda: 3,
    "negative": lambda: -(2**63),
    "float": lambda: 0.1,
    "bool": lambda: True,
}


@pytest.fixture(params=ITEMS)
def item(request):
    return ITEMS[request.param]()


def save(path, item, name=None, **fields):
    ckptkit.Checkpointer(ckptkit.ArrayCheckpointHandler(name)).save(path, args.ArraySave(item, **fields))


def restore(path, name=None, **fields):
    return ckptkit.Checkpointer(ckptkit.ArrayCheckpointHandler(name)).restore(path, args.ArrayRestore(**fields))


def orbax_save(path, item, name=None, **fields):
    with ocp.Checkpointer(ocp.ArrayCheckpointHandler(name)) as checkpointer:
        checkpointer.save(path, args=ocp.args.ArraySave(item, **fields))


def orbax_restore(path, name=None, **fields):
    with ocp.Checkpointer(ocp.ArrayCheckpointHandler(name)) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.ArrayRestore(**fields))


# What is saved comes back, here and there.


def test_round_trip(tmp_path, item):
    save(tmp_path / "a", item)
    assert_same(restore(tmp_path / "a"), item)


def test_a_fresh_call_finds_the_handler(tmp_path, item):
    ckptkit.Checkpointer().save(tmp_path / "a", args.ArraySave(item))
    assert_same(ckptkit.restore(tmp_path / "a"), item)


def test_orbax_restores_what_is_saved(tmp_path, item):
    save(tmp_path / "a", item)
    assert_same(orbax_restore(tmp_path / "a"), item)


def test_what_orbax_saved_is_restored(tmp_path, item):
    orbax_save(tmp_path / "a", item)
    assert_same(ckptkit.restore(tmp_path / "a"), item)


@pytest.mark.parametrize("number", [np.float32(2), np.int8(-3), np.complex64(1 + 2j), jnp.bfloat16(1.5)])
def test_numpy_scalars_come_back_as_python_numbers(tmp_path, number):
    save(tmp_path / "a", number)
    assert_same(restore(tmp_path / "a"), number.item() if isinstance(number, np.generic) else number)
    if isinstance(number, np.number):
        assert_same(orbax_restore(tmp_path / "a"), number.item())


def test_it_is_a_composites_item_too(tmp_path):
    ckptkit.Checkpointer().save(tmp_path / "a", args.Composite(w=args.ArraySave(np.arange(3)), n=args.ArraySave(4)))
    restored = ckptkit.restore(tmp_path / "a")
    assert_same(dict(restored), {"n": 4, "w": np.arange(3)})


def test_an_async_save_is_of_the_values_at_the_call(tmp_path):
    values = np.arange(5)
    with ckptkit.AsyncCheckpointer(ckptkit.ArrayCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "a", args.ArraySave(values))
        values[:] = 0
        checkpointer.wait_until_finished()
    assert_same(restore(tmp_path / "a"), np.arange(5))


# How it is stored.


def test_the_type_string_is_orbaxs():
    assert ckptkit.ArrayCheckpointHandler.typestr() == ORBAX_TYPESTR


@pytest.mark.parametrize(("name", "folder"), [(None, "checkpoint"), ("", "checkpoint"), ("weights", "weights"), ("a/b", "a/b")])
def test_the_array_lies_under_its_checkpoint_name(tmp_path, name, folder):
    save(tmp_path / "a", np.arange(3), name)
    assert (tmp_path / "a" / folder / ".zarray").exists()
    assert_same(restore(tmp_path / "a", name), np.arange(3))
    assert_same(orbax_restore(tmp_path / "a", name), np.arange(3))


def test_save_args_cast_and_cut(tmp_path):
    save(tmp_path / "a", np.arange(64.0), save_args=ckptkit.SaveArgs(dtype=np.float32, chunk_byte_size=64))
    assert len(list((tmp_path / "a" / "checkpoint").glob("[0-9]*"))) == 4
    assert_same(restore(tmp_path / "a"), np.arange(64, dtype=np.float32))


def test_metadata_describes_the_array(tmp_path):
    save(tmp_path / "a", jnp.ones((3, 4)))
    described = ckptkit.ArrayCheckpointHandler().metadata(epath.Path(tmp_path / "a")).tree["checkpoint"]
    assert (described.shape, described.dtype) == ((3, 4), np.float32)


# What it does not take.


@pytest.mark.parametrize(
    "item", [None, "text", b"bytes", [1], (1,), {}, {"a": 1}, jax.ShapeDtypeStruct((2,), np.float32), object()]
)
def test_anything_else_is_a_type_error(tmp_path, item):
    with pytest.raises(TypeError, match="Unsupported type: <class"):
        save(tmp_path / "a", item)
    assert not (tmp_path / "a").exists()


def test_an_array_of_objects_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(errors.TreeError, match="dtype object"):
        save(tmp_path / "a", np.array([1, None]))
    assert not (tmp_path / "a").exists()


# How it is restored.


@pytest.mark.parametrize(
    "make",
    [
        lambda lib: lib.RestoreArgs(dtype=np.float32),
        lambda lib: lib.RestoreArgs(restore_type=np.ndarray, dtype=np.int8),
        lambda lib: lib.ArrayRestoreArgs(sharding=SingleDeviceSharding(jax.devices()[3])),
        lambda lib: lib.ArrayRestoreArgs(sharding=SingleDeviceSharding(jax.devices()[0]), dtype=jnp.bfloat16),
        lambda lib: lib.ArrayRestoreArgs(sharding=SingleDeviceSharding(jax.devices()[0]), shape=(11,), strict=False),
        lambda lib: lib.ArrayRestoreArgs(sharding=SingleDeviceSharding(jax.devices()[0]), global_shape=(3,), strict=False),
        lambda lib: lib.ArrayRestoreArgs(mesh=jax.make_mesh((8,), ("x",)), mesh_axes=PartitionSpec("x")),
    ],
)
def test_restore_args_mean_what_they_mean_to_orbax(tmp_path, make):
    orbax_save(tmp_path / "a", np.arange(8, dtype=np.int32))
    assert_same(restore(tmp_path / "a", restore_args=make(ckptkit)), orbax_restore(tmp_path / "a", restore_args=make(ocp)))


def test_another_shape_is_an_error_unless_it_is_asked_for(tmp_path):
    save(tmp_path / "a", jnp.arange(8))
    with pytest.raises(errors.TargetError, match=r"stored shape \(8,\), requested shape \(3,\)"):
        restore(tmp_path / "a", restore_args=ckptkit.ArrayRestoreArgs(shape=(3,)))


def test_an_array_is_no_number(tmp_path):
    save(tmp_path / "a", np.arange(3))
    with pytest.raises(errors.TargetError, match=r"stored shape \(3,\), requested shape \(\)"):
        restore(tmp_path / "a", restore_args=ckptkit.RestoreArgs(restore_type=int))


def test_a_number_becomes_the_type_that_is_asked_for(tmp_path):
    save(tmp_path / "a", 3)
    assert_same(restore(tmp_path / "a", restore_args=ckptkit.RestoreArgs(restore_type=float)), 3.0)


@pytest.mark.parametrize("target", [np.zeros(2), jax.ShapeDtypeStruct((9,), np.float32), 4])
def test_the_item_is_not_used(tmp_path, target):
    save(tmp_path / "a", np.arange(3))
    assert_same(restore(tmp_path / "a", item=target), np.arange(3))


def test_a_wrong_checkpoint_name_names_what_is_there(tmp_path):
    save(tmp_path / "a", np.arange(3), "weights")
    with pytest.raises(errors.TargetError, match=r"no array of the name 'wrong'.*ArrayCheckpointHandler\([^']*'weights'"):
        restore(tmp_path / "a", "wrong")


def test_a_flipped_bit_is_found(tmp_path):
    save(tmp_path / "a", np.arange(3))
    chunk = tmp_path / "a" / "checkpoint" / "0"
    chunk.write_bytes(b"\xff" + chunk.read_bytes()[1:])
    with pytest.raises(errors.CorruptCheckpointError):
        restore(tmp_path / "a")


def test_orbaxs_arguments_of_old_are_taken_with_a_warning(tmp_path):
    handler = ckptkit.ArrayCheckpointHandler()
    with pytest.warns(DeprecationWarning, match="item"):
        handler.save(epath.Path(tmp_path), np.arange(3), ckptkit.SaveArgs(dtype=np.int8))
    with pytest.warns(DeprecationWarning, match="restore_args"):
        assert_same(
            handler.restore(epath.Path(tmp_path), restore_args=ckptkit.RestoreArgs(dtype=np.float32)), np.arange(3, dtype="f4")
        )


# Directories of older releases.


@pytest.mark.parametrize("name", ["checkpoint", "weights"])
def test_a_directory_without_metadata_is_read(tmp_path, name):
    orbax_save(tmp_path / "a", np.arange(5), name)
    for file in ("_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt"):
        (tmp_path / "a" / file).unlink()
    assert_same(restore(tmp_path / "a", name), orbax_restore(tmp_path / "a", name))


def test_without_metadata_restore_args_say_what_it_becomes(tmp_path):
    orbax_save(tmp_path / "a", 3.5)
    (tmp_path / "a" / "_METADATA").unlink()
    assert_same(restore(tmp_path / "a", restore_args=ckptkit.RestoreArgs(restore_type=float)), 3.5)
    where = SingleDeviceSharding(jax.devices()[1])
    restored = restore(tmp_path / "a", restore_args=ckptkit.ArrayRestoreArgs(sharding=where, dtype=np.float32))
    assert_same(restored, jax.device_put(np.float32(3.5), where))


def test_without_metadata_a_wrong_checkpoint_name_names_what_is_there(tmp_path):
    orbax_save(tmp_path / "a", np.arange(5))
    (tmp_path / "a" / "_METADATA").unlink()
    with pytest.raises(errors.TargetError, match=r"'wrong'[^']*'checkpoint'"):
        restore(tmp_path / "a", "wrong")


def test_a_missing_array_is_named(tmp_path):
    save(tmp_path / "a", np.arange(3))
    shutil.rmtree(tmp_path / "a" / "checkpoint")
    with pytest.raises(errors.NotFoundError, match="no array data"):
        restore(tmp_path / "a")
