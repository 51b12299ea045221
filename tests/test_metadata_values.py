"""What `metadata()` returns, compared with what Orbax's returns."""

from __future__ import annotations

import collections
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding

from ckptkit.metadata.sharding import ShardingMetadata, encode_sharding
from ckptkit.metadata.values import ArrayMetadata, ScalarMetadata, StorageMetadata, StringMetadata, TreeMetadata

Pair = collections.namedtuple("Pair", ["first", "second"])  # noqa: PYI024 - as optax's states are to jax


def array(name="a", shape=(2,)):
    sharding = ShardingMetadata(encode_sharding(SingleDeviceSharding(jax.devices()[0])))
    return ArrayMetadata(name=name, shape=shape, dtype=np.dtype("float32"), sharding=sharding)


def scalar(name="s"):
    return ScalarMetadata(name=name, dtype=np.dtype("int64"))


def tree():
    return {"w": {"b": array("w.b"), "a": array("w.a")}, "l": [scalar(), (), None], "s": StringMetadata(name="s")}


@pytest.fixture(scope="module")
def orbax_metadata(tmp_path_factory):
    """Orbax's tree metadata of a tree like `tree()`."""
    path = tmp_path_factory.mktemp("orbax") / "c"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, {"w": {"b": jnp.ones(2), "a": jnp.ones(2)}, "l": [1, (), None], "s": "text"})
        return checkpointer.metadata(path).item_metadata


def test_jax_sees_the_same_key_paths_as_in_orbax(orbax_metadata):
    def paths(metadata):
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(metadata)]

    assert sorted(paths(TreeMetadata(tree=tree()))) == sorted(paths(orbax_metadata))


@pytest.mark.parametrize("name", ["name", "directory", "shape", "dtype", "sharding", "storage"])
def test_leaves_have_orbax_attributes(orbax_metadata, name):
    assert hasattr(orbax_metadata["w"]["a"], name)
    assert hasattr(array(), name)
    assert hasattr(scalar(), name)


@pytest.mark.parametrize("root", [tree(), [scalar(), {"a": array()}], (scalar(),), Pair(array(), scalar()), array(), {}, []])
def test_a_map_over_it_is_a_tree_metadata_of_the_same_structure(root):
    metadata = TreeMetadata(tree=root, custom_metadata={"a": [1]}, use_zarr3=True)
    shapes = jax.tree.map(lambda leaf: getattr(leaf, "shape", "text"), metadata)
    assert shapes.tree == jax.tree.map(lambda leaf: getattr(leaf, "shape", "text"), root)
    assert (type(shapes), shapes.custom_metadata, shapes.use_zarr3) == (TreeMetadata, {"a": [1]}, True)


def test_two_of_the_same_structure_map_together_whatever_else_is_known():
    one, other = TreeMetadata(tree=tree(), custom_metadata={"step": 1}), TreeMetadata(tree=tree(), use_zarr3=True)
    assert jax.tree.leaves(jax.tree.map(lambda a, b: a == b, one, other)) == [True] * 4


def test_the_tree_maps_with_a_plain_tree_and_the_metadata_does_not():
    metadata, plain = TreeMetadata(tree={"a": array()}), {"a": np.ones(2)}
    assert jax.tree.map(lambda m, x: m.shape == x.shape, metadata.tree, plain) == {"a": True}
    with pytest.raises(ValueError, match="pytree"):
        jax.tree.map(lambda m, x: m.shape == x.shape, metadata, plain)


def test_it_goes_into_a_jitted_function():
    targets = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), TreeMetadata(tree={"a": array()}, custom_metadata=[{}])
    )
    assert jax.jit(lambda t: t["a"].sum())(targets) == 0


def test_a_dict_is_accessed_like_one():
    metadata = TreeMetadata(tree=tree())
    assert metadata["w"]["a"].name == "w.a"
    assert list(metadata) == list(metadata.keys()) == ["w", "l", "s"]
    assert len(metadata) == 3
    assert "w" in metadata
    assert "x" not in metadata
    assert metadata.get("x", 7) == 7
    assert list(metadata.values()) == list(metadata.tree.values())
    assert dict(metadata.items()) == metadata.tree


def test_a_list_is_accessed_like_one():
    metadata = TreeMetadata(tree=[scalar(), array()])
    assert metadata[1].shape == (2,)
    assert metadata.get(5) is None


def test_leaves_are_equal_where_they_describe_alike_values():
    assert array("a") == array("b")
    assert array(shape=(3,)) != array()
    assert scalar() != ArrayMetadata(name="s", shape=(), dtype=np.dtype("int64"))
    assert StringMetadata(name="a") == StringMetadata(name="b")


def test_a_leaf_is_one_for_jax_and_names_where_it_lived():
    leaf = array()
    assert jax.tree.leaves(leaf) == [leaf]
    assert leaf.sharding.to_jax_sharding() == SingleDeviceSharding(jax.devices()[0])


def test_metadata_is_pickled():
    metadata = TreeMetadata(
        tree={"a": ArrayMetadata(name="a", shape=(), dtype=np.dtype("int8"), storage=StorageMetadata(chunk_shape=()))}
    )
    assert pickle.loads(pickle.dumps(metadata)) == metadata  # noqa: S301 - its own bytes
