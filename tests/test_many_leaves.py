"""What keeps trees of many leaves cheap: what is alike is asked about once, and the call is spared what can wait."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import ckptkit
from ckptkit import tree
from ckptkit.grid import ArraySpec
from ckptkit.leaves import _placing
from ckptkit.leaves._goals import goals_of
from ckptkit.leaves._numbers import ShardingNumbers
from ckptkit.leaves.base import ArrayRestoreArgs, LeafSpec
from ckptkit.leaves.jax_array import JaxArrayHandler
from ckptkit.metadata.sharding import ShardingMetadata
from ckptkit.options import RestoreDefaults

DEFAULTS = RestoreDefaults()


@pytest.fixture
def stepped() -> list[jax.Array]:
    """What a training step returns: arrays whose shardings are equal, each of them another object."""
    leaves: list[jax.Array] = jax.jit(lambda x: [x + i for i in range(5)])(jnp.zeros(3))
    assert len({id(leaf.sharding) for leaf in leaves}) == 5
    return leaves


def test_arrays_of_equal_shardings_are_of_one_kind(stepped: list[jax.Array]) -> None:
    kinds = JaxArrayHandler().kinds([*stepped, jnp.zeros(4), jnp.zeros(3)])
    assert kinds is not None
    assert kinds.numbers == (0, 0, 0, 0, 0, 1, 0)
    assert len(kinds.keys) == 2


def test_arrays_of_equal_shapes_and_other_shardings_are_of_other_kinds() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    arrays = [jax.device_put(np.zeros(4), NamedSharding(mesh, PartitionSpec(axis))) for axis in ("x", None, "x")]
    kinds = JaxArrayHandler().kinds(arrays)
    assert kinds is not None
    assert kinds.numbers == (0, 1, 0)


def test_targets_of_equal_shardings_have_one_goal(stepped: list[jax.Array]) -> None:
    spec = LeafSpec("jax.Array", ArraySpec("a", (3,), np.dtype(np.float32), (3,)))
    requests = [ArrayRestoreArgs(sharding=leaf.sharding, global_shape=(3,), defaults=DEFAULTS) for leaf in stepped]
    assert len({id(goal) for goal in goals_of([spec] * 5, requests)}) == 1


def test_only_shardings_are_compared(stepped: list[jax.Array]) -> None:
    numbers = ShardingNumbers()
    records = [ShardingMetadata({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"}) for _ in range(2)]
    shardings = [stepped[0].sharding, stepped[1].sharding, None, *records, None]
    assert [numbers.of(each) for each in shardings] == [0, 0, 1, 2, 3, 1]


@pytest.mark.parametrize("item", [7, {"b": {"x": 1, "y": [2, 3]}, "a": (4, {}), "c": 5}, [[[6]]]])
def test_paths_of_some_leaves_are_those_of_all(item: object) -> None:
    _, structure = tree.flatten(item)
    paths = structure.paths
    assert len(paths) == len(structure.names)
    for skipped in range(len(paths)):
        positions = [i for i in range(len(paths)) if i != skipped]
        assert structure.shared.paths_of(positions) == [paths[i] for i in positions]
    assert len(structure.shared.deepest()) == max(map(len, structure.keys))


def test_no_garbage_is_collected_while_the_caller_waits(tmp_path: Path) -> None:
    item = {str(i): jnp.full(3, i) for i in range(3000)}
    count = 0

    def note(_: str, __: object) -> None:
        nonlocal count
        count += threading.current_thread() is threading.main_thread()

    with ckptkit.StandardCheckpointer() as checkpointer:
        gc.collect()
        gc.callbacks.append(note)
        try:
            checkpointer.save(tmp_path / "c", item)
            found = count  # the next object would set one off
        finally:
            gc.callbacks.remove(note)
        assert gc.isenabled()
    assert found == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", [None, "unpinned_host", "mesh"])
@pytest.mark.parametrize("public", [False, True])
def test_arrays_are_placed_as_the_public_function_places_them(
    monkeypatch: pytest.MonkeyPatch, dtype: str, kind: str | None, public: bool
) -> None:
    """Also where jax no longer has what it uses inside; that it has it now is what the speed of a restore rests on."""
    assert _placing._PUT is not None
    if public:
        monkeypatch.setattr(_placing, "_PUT", None)
    device = jax.devices()[1]
    sharding = (
        NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec("x"))
        if kind == "mesh"
        else SingleDeviceSharding(device, memory_kind=kind)
    )
    data = np.arange(6).reshape(2, 3).astype(dtype)
    found = _placing.placed(data, sharding)
    expected = jax.make_array_from_callback(data.shape, sharding, lambda _: data)
    assert found.sharding == sharding
    assert (found.aval, found.committed, found.format) == (expected.aval, expected.committed, expected.format)
    np.testing.assert_array_equal(np.asarray(found), data)


class _Noting(ckptkit.AsyncCheckpointHandler):
    """A plugin's handler, which notes whether garbage is collected while it saves."""

    async def async_save(self, directory: Any, args: Any) -> list[Future[None]]:
        args.seen.append(gc.isenabled())
        return []

    def restore(self, directory: Any, args: Any = None) -> None:
        return None


class _NotingNow(ckptkit.CheckpointHandler):
    """As `_Noting`, in the call."""

    def save(self, directory: Any, args: Any) -> None:
        args.seen.append(gc.isenabled())

    def restore(self, directory: Any, args: Any = None) -> None:
        return None


@attrs.define
class _Note(ckptkit.args.CheckpointArgs):
    seen: list[bool]


@pytest.mark.parametrize("handler", [_Noting, _NotingNow])
@pytest.mark.parametrize("item", [False, True], ids=["alone", "item"])
def test_garbage_is_collected_while_the_handler_of_a_plugin_saves(
    tmp_path: Path, registry: ckptkit.Registry, handler: Any, item: bool
) -> None:
    seen: list[bool] = []
    registry.add_args(_Note, handler, for_save=True, for_restore=True)
    made = ckptkit.CompositeCheckpointHandler() if item else handler()
    made.registry = registry
    args = ckptkit.args.Composite(note=_Note(seen)) if item else _Note(seen)
    with ckptkit.AsyncCheckpointer(made, registry=registry) as checkpointer:
        checkpointer.save(tmp_path / "c", args=args)
    assert seen == [True]
