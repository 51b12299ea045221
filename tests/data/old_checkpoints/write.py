"""Writes the checkpoints that an installed release of orbax-checkpoint can write, and says what is in them.

    pip install "orbax-checkpoint==0.2.7" "jax==0.4.13" "jaxlib==0.4.13" "tensorstore<0.1.46" "flax<0.7.3" "ml_dtypes<0.3" \\
        "scipy<1.13" "numpy<2"
    python write.py 0.2.7.zip

runs with any release from 0.2.3 on, in an environment of its own with the packages of its day (those before need an older jax
than Python 3.11 can have); names of kinds after the archive's write those alone. The archive holds one directory for each kind
of checkpoint (a kind that the release cannot write is left out, and why is told) and `expected.json`, which describes every
value saved and names the versions that wrote it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

WRITERS = {}


def kind(function):
    WRITERS[function.__name__] = function
    return function


def tree():
    return {
        "params": {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 4, "b": jnp.asarray([1.5, -2, 3], jnp.bfloat16)},
        "opt": [jnp.int32(7), {"nu": jnp.asarray([1, 255], jnp.uint8)}, {"mask": jnp.asarray([True, False])}],
        "numpy": {"f8": np.array([[0.1, -1e300]]), "i8": np.array([2**40 + 1, -5]), "f2": np.array([0.5], np.float16)},
        "step": 1234,
        "lr": 0.125,
    }


def tree_with_empty_nodes():
    return {**tree(), "none": None, "no_keys": {}, "no_items": [], "nested": {"none": None, "x": jnp.ones(2)}}


def sharded_tree():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    specs = {"xy": ("x", "y"), "both": (("x", "y"), None), "y": (None, "y"), "replicated": ()}
    return {name: jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec))) for name, spec in specs.items()}


def save(path, item, *, aggregate=lambda path: False, **options):
    save_args = jax.tree_util.tree_map_with_path(
        lambda key_path, _: ocp.SaveArgs(aggregate=aggregate(jax.tree_util.keystr(key_path))), item
    )
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(path, item, save_args=save_args)
    return item


@kind
def pytree_default(path):
    return save(path, tree_with_empty_nodes())


@kind
def pytree_zarr(path):
    return save(path, tree_with_empty_nodes(), use_ocdbt=False)


@kind
def pytree_ocdbt(path):
    return save(path, tree_with_empty_nodes(), use_ocdbt=True)


@kind
def pytree_aggregate(path):
    return save(path, {**tree_with_empty_nodes(), "np_scalar": np.float32(2.5)}, aggregate=lambda _: True, use_ocdbt=False)


@kind
def pytree_partly_aggregate_zarr(path):
    return save(path, tree_with_empty_nodes(), aggregate=lambda key: "params" in key or "opt" in key, use_ocdbt=False)


@kind
def pytree_partly_aggregate_ocdbt(path):
    return save(path, tree_with_empty_nodes(), aggregate=lambda key: "numpy" in key or "step" in key, use_ocdbt=True)


@kind
def pytree_aggregate_strings(path):
    return save(path, {"name": "run 7", "w": jnp.ones(2)}, aggregate=lambda key: "name" in key, use_ocdbt=False)


@kind
def pytree_strings(path):
    return save(path, {"name": "run 7", "größe": {"日本": "x"}, "w": jnp.ones(2)})


@kind
def pytree_zarr3(path):
    return save(path, tree(), use_ocdbt=True, use_zarr3=True)


@kind
def pytree_zarr3_directories(path):
    return save(path, tree(), use_ocdbt=False, use_zarr3=True)


@kind
def pytree_sharded_zarr(path):
    return save(path, sharded_tree(), use_ocdbt=False)


@kind
def pytree_sharded_ocdbt(path):
    return save(path, sharded_tree(), use_ocdbt=True)


@kind
def pytree_list(path):
    return save(path, [jnp.arange(3), {"a": np.arange(2.0)}, (jnp.ones(1), 5)])


@kind
def standard(path):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, tree_with_empty_nodes())
    getattr(checkpointer, "wait_until_finished", lambda: None)()
    checkpointer.close()
    return tree_with_empty_nodes()


@kind
def array(path):
    value = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    ocp.Checkpointer(ocp.ArrayCheckpointHandler()).save(path, value)
    return value


@kind
def array_aggregate(path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    ocp.Checkpointer(ocp.ArrayCheckpointHandler()).save(path, value, save_args=ocp.SaveArgs(aggregate=True))
    return value


@kind
def named_pytree_aggregate(path):
    return save(path, tree_with_empty_nodes(), aggregate=lambda _: True, use_ocdbt=False, aggregate_filename="leaves")


@kind
def named_array_aggregate(path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    ocp.Checkpointer(ocp.ArrayCheckpointHandler("weights")).save(path, value, save_args=ocp.SaveArgs(aggregate=True))
    return value


@kind
def jax_random_key(path):
    key = jax.random.PRNGKey(7)
    ocp.Checkpointer(ocp.JaxRandomKeyCheckpointHandler()).save(path, args=ocp.args.JaxRandomKeySave(key))
    return key


@kind
def jax_random_key_typed(path):
    key = jax.random.key(7)
    ocp.Checkpointer(ocp.JaxRandomKeyCheckpointHandler()).save(path, args=ocp.args.JaxRandomKeySave(key))
    return jax.random.key_data(key)


@kind
def numpy_random_key(path):
    state = np.random.RandomState(7).get_state()
    ocp.Checkpointer(ocp.NumpyRandomKeyCheckpointHandler()).save(path, args=ocp.args.NumpyRandomKeySave(state))
    return list(state)


@kind
def json_file(path):
    item = {"a": [1, 2.5, None, True], "größe": "x"}
    ocp.Checkpointer(ocp.JsonCheckpointHandler()).save(path, item)
    return item


@kind
def composite(path):
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(tree()), more=ocp.args.PyTreeSave(tree_with_empty_nodes()), data=ocp.args.JsonSave({"a": [1]})
    )
    ocp.Checkpointer(ocp.CompositeCheckpointHandler("state", "more", "data")).save(path, args)
    return {"state": tree(), "more": tree_with_empty_nodes(), "data": {"a": [1]}}


@kind
def manager_default_item(path):
    handler = ocp.StandardCheckpointHandler() if hasattr(ocp, "StandardCheckpointHandler") else ocp.PyTreeCheckpointHandler()
    manager = ocp.CheckpointManager(path, ocp.Checkpointer(handler))
    manager.save(3, tree(), metrics={"loss": 0.5})
    getattr(manager, "wait_until_finished", lambda: None)()
    return {"default": tree()}


@kind
def manager_items(path):
    checkpointers = {
        "state": ocp.Checkpointer(ocp.PyTreeCheckpointHandler()),
        "data": ocp.Checkpointer(ocp.JsonCheckpointHandler()),
    }
    manager = ocp.CheckpointManager(path, checkpointers)
    manager.save(3, {"state": tree(), "data": {"a": [1]}})
    getattr(manager, "wait_until_finished", lambda: None)()
    return {"state": tree(), "data": {"a": [1]}}


@kind
def manager_args(path):
    with ocp.CheckpointManager(path, item_names=("state", "data")) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(tree()), data=ocp.args.JsonSave({"a": [1]})))
        manager.wait_until_finished()
    return {"state": tree(), "data": {"a": [1]}}


@kind
def manager_args_default_item(path):
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.StandardSave(tree()))
        manager.wait_until_finished()
    return {"default": tree()}


@kind
def v1_pytree(path):
    from orbax.checkpoint.experimental import v1

    v1.save_pytree(path, tree_with_empty_nodes())
    return tree_with_empty_nodes()


@kind
def v1_checkpointables(path):
    from orbax.checkpoint.experimental import v1

    v1.save_checkpointables(path, {"state": tree(), "data": {"a": jnp.ones(2)}})
    return {"state": tree(), "data": {"a": jnp.ones(2)}}


def described(value):
    """The value as JSON: containers as they are, leaves with their type, dtype and numbers."""
    if isinstance(value, dict):
        return {"type": "dict", "items": {name: described(item) for name, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"type": "list", "items": [described(item) for item in value]}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        array = np.asarray(value)
        name = "jax.Array" if isinstance(value, jax.Array) else "scalar" if isinstance(value, np.generic) else "np.ndarray"
        plain = array.astype(np.float64) if array.dtype.name in ("bfloat16", "float16") else array
        return {"type": name, "dtype": array.dtype.name, "shape": array.shape, "values": plain.reshape(-1).tolist()}
    return {"type": "plain", "value": value}


def main(out, *kinds):
    written, refused = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in kinds or WRITERS:
            try:
                written[name] = described(WRITERS[name](Path(folder, name)))
            except Exception as error:
                refused[name] = f"{type(error).__name__}: {error}"[:200]
        versions = {package: importlib.metadata.version(package) for package in ("orbax-checkpoint", "jax", "tensorstore")}
        document = {"versions": versions, "written": written, "refused": refused}
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("expected.json", json.dumps(document, indent=1))
            for file in sorted(Path(folder).rglob("*")):
                parts = file.relative_to(folder).parts
                if parts[0] in written and (file.is_file() or not any(file.iterdir())):
                    archive.write(file, "/".join(parts))
    print(json.dumps(document["versions"]), "wrote", ", ".join(written))
    for name, reason in refused.items():
        print(f"  refused {name}: {reason}")


if __name__ == "__main__":
    main(*sys.argv[1:])
