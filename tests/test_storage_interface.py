"""What a storage backend of a stranger's can rely on: a folder or a file in its format is a checkpoint, read as far as needed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ckptkit
from ckptkit import errors
from ckptkit.args import StandardRestore
from ckptkit.storage import ArraySpec, PartialReader, StorageBackend, joined
from ckptkit.testing import assert_same


class NpzReader(PartialReader):
    """Reads a file of numpy's, and remembers what it was asked for."""

    def __init__(self, path, asked):
        self._arrays = dict(np.load(path))
        self._asked = asked

    def arrays(self):
        return {name: ArraySpec(name, a.shape, a.dtype, a.shape) for name, a in self._arrays.items()}

    def read(self, requests):
        for name, index, out in requests:
            self._asked.append((name, index))
            out[...] = self._arrays[name][tuple(slice(*bounds) for bounds in index)]
        return joined([])

    def close(self):
        self._arrays.clear()


class NpzBackend(StorageBackend):
    """The one file of a folder, or a file itself; read only."""

    name = "npz"

    def __init__(self):
        self.asked = []

    def refuse(self, arrays):
        return ["npz is for reading"] * len(arrays)

    def writer(self, location, arrays, options, job):
        raise NotImplementedError

    def reader(self, location):
        return NpzReader(self._path(location), self.asked)

    def recognises(self, location):
        return self._path(location).is_file()

    def _path(self, location):
        path = Path(location.local_path)
        return path if path.suffix == ".npz" else path / "arrays.npz"


class FlatNpzBackend(NpzBackend):
    name = "flat"

    def keys_of(self, name):
        return (name,)


@pytest.fixture
def backend(registry):
    backend = NpzBackend()
    registry.add_storage(backend)
    return backend


@pytest.fixture
def checkpointer(registry):
    with ckptkit.Checkpointer(registry=registry) as checkpointer:
        yield checkpointer


ARRAYS = {"a.w": np.arange(32.0, dtype=np.float32).reshape(8, 4), "a.b": np.arange(3), "c": np.full((), 5, np.float32)}
NESTED = {"a": {"w": ARRAYS["a.w"], "b": ARRAYS["a.b"]}, "c": ARRAYS["c"]}


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "arrays.npz", **ARRAYS)
    return tmp_path


def test_a_folder_in_its_format_is_a_checkpoint(backend, checkpointer, folder):
    assert_same(checkpointer.restore(folder), NESTED)


def test_a_single_file_in_its_format_is_a_checkpoint(backend, checkpointer, folder):
    assert_same(checkpointer.restore(folder / "arrays.npz"), NESTED)
    assert checkpointer.metadata(folder / "arrays.npz").item_metadata["a"]["w"].shape == (8, 4)


def test_a_file_that_no_backend_recognises_is_none(backend, checkpointer, tmp_path):
    (tmp_path / "notes.txt").write_text(json.dumps({}))
    with pytest.raises(errors.NotFoundError, match=r"this is a file, and no storage backend recognises it: .*notes\.txt"):
        checkpointer.restore(tmp_path / "notes.txt")


def test_the_backend_says_how_names_become_keys(registry, checkpointer, folder):
    registry.add_storage(FlatNpzBackend())
    assert_same(checkpointer.restore(folder), ARRAYS)


@pytest.mark.parametrize("kind", [NpzBackend, FlatNpzBackend])
@pytest.mark.parametrize("target", [NESTED, ARRAYS, {**NESTED, "a": {**NESTED["a"], "state": {}, "none": None}}])
def test_a_target_may_group_the_names_as_it_likes(registry, checkpointer, folder, kind, target):
    registry.add_storage(kind())
    assert_same(checkpointer.restore(folder, StandardRestore(target)), target)


def test_leaves_that_are_not_stored_are_named(backend, checkpointer, folder):
    with pytest.raises(errors.TargetError, match=r"1 in the target, but not in the checkpoint:\n  \('a.x',\)"):
        checkpointer.restore(folder, StandardRestore({**NESTED, "a": {**NESTED["a"], "x": np.zeros(1)}}))


def test_a_partial_reader_is_asked_for_what_the_devices_hold(backend, checkpointer, folder, mesh):
    target = {
        "a": {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "y"))), "b": ...},
        "c": ...,
    }
    restored = checkpointer.restore(folder, StandardRestore(target))
    np.testing.assert_array_equal(restored["a"]["w"], ARRAYS["a.w"])
    assert backend.asked == [("a.w", ((0, 8), (0, 2))), ("a.w", ((0, 8), (2, 4)))]


@pytest.mark.parametrize("checkpointer_class", [ckptkit.StandardCheckpointer, ckptkit.PyTreeCheckpointHandler])
def test_a_file_size_above_nothing_is_asked_for(checkpointer_class):
    with pytest.raises(errors.ArgsError, match=r"target_data_file_size=0\): expected bytes above 0"):
        checkpointer_class(target_data_file_size=0)


def test_the_file_size_reaches_the_backend(tmp_path):
    tree = {f"w{i}": np.random.default_rng(i).random(1 << 15) for i in range(8)}
    with ckptkit.StandardCheckpointer(target_data_file_size=1 << 19) as checkpointer:
        checkpointer.save(tmp_path / "small", tree)
    ckptkit.save(tmp_path / "large", tree)
    assert len(list((tmp_path / "small" / "d").iterdir())) > len(list((tmp_path / "large" / "d").iterdir()))
