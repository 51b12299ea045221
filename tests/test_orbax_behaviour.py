"""Behaviour of Orbax's Standard and PyTree handlers that callers rely on, one test each, where no other file has it."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint._src.metadata.pytree_metadata_options import PyTreeMetadataOptions as OrbaxMetadataOptions

import ckptkit
from ckptkit import args, errors
from ckptkit.file_list import FILE_LIST
from ckptkit.testing import assert_same, strategies

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:orbax", "ignore::DeprecationWarning:orbax")


def _standard(**options: Any) -> ckptkit.Checkpointer:
    return ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler(**options))


def _pytree(**options: Any) -> ckptkit.Checkpointer:
    return ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler(**options))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


# The handlers' arguments.


def test_use_ocdbt_false_writes_plain_zarr_that_orbax_restores(path: Path) -> None:
    _standard(use_ocdbt=False).save(path, {"a": {"b": np.arange(3)}})
    assert (path / "a.b" / ".zarray").is_file()
    assert_same(ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(path), {"a": {"b": np.arange(3)}})


@pytest.mark.parametrize("handler", [ckptkit.StandardCheckpointHandler, ckptkit.PyTreeCheckpointHandler])
@pytest.mark.parametrize("name", ["save_concurrent_gb", "restore_concurrent_gb"])
def test_bounds_of_memory_are_above_zero(handler: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=0\): expected a number above 0"):
        handler(**{name: 0})


@pytest.mark.parametrize("handler", [ckptkit.StandardCheckpointHandler, ckptkit.PyTreeCheckpointHandler])
def test_trees_come_back_within_small_bounds_of_memory(path: Path, handler: Any) -> None:
    tree = {str(i): np.full(1000, i) for i in range(20)}
    checkpointer = ckptkit.Checkpointer(handler(save_concurrent_gb=1e-5, restore_concurrent_gb=1e-5))
    checkpointer.save(path, tree)
    assert_same(checkpointer.restore(path), tree)


_Processes = ckptkit.options.MultiprocessingOptions


@pytest.mark.parametrize(
    "fields",
    [{}, {"primary_host": None}, {"active_processes": {0}}, {"barrier_sync_key_prefix": "train"}],
    ids=str,
)
def test_multiprocessing_options_that_mean_this_process_save(path: Path, fields: dict[str, Any]) -> None:
    options = _Processes(**fields)
    handler = ckptkit.StandardCheckpointHandler(multiprocessing_options=options)
    checkpointer = ckptkit.Checkpointer(handler, multiprocessing_options=options)
    checkpointer.save(path, {"a": 1})
    assert checkpointer.restore(path) == {"a": 1}


@pytest.mark.parametrize(
    "options", [_Processes(primary_host=1), _Processes(active_processes={0, 1}), _Processes(primary_host=1, active_processes={1})]
)
@pytest.mark.parametrize("given_to", ["handler", "checkpointer"])
def test_multiprocessing_options_that_mean_other_processes_are_refused(tmp_path: Path, options: Any, given_to: str) -> None:
    checkpointer = (
        _standard(multiprocessing_options=options)
        if given_to == "handler"
        else ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler(), multiprocessing_options=options)
    )
    with pytest.raises(ValueError, match=r"the job has 1 processes, and none of index \[1\]; nobody would commit"):
        checkpointer.save(tmp_path / "c", {"a": 1})
    assert not list(tmp_path.iterdir())


def test_a_primary_that_takes_no_part_is_refused() -> None:
    with pytest.raises(ValueError, match="the primary process must be one of those that take part"):
        _Processes(active_processes={1, 2})


@pytest.mark.parametrize("bound", [None, 1e-5, "auto"])
def test_copies_off_devices_may_have_a_bound_of_their_own(path: Path, bound: Any) -> None:
    tree = {str(i): jnp.full(1000, i) for i in range(20)}
    checkpointer = _pytree(save_device_host_concurrent_gb=bound, enable_pinned_host_transfer=True)
    checkpointer.save(path, tree)
    assert_same(checkpointer.restore(path), tree)


_PINNED_TREE = {
    "one": jnp.arange(6.0).reshape(2, 3),
    "number": jnp.float32(2),
    "bfloat16": jnp.arange(4, dtype=jnp.bfloat16),
    "int4": jnp.arange(4, dtype=jnp.int4),
    "sharded": jax.device_put(
        np.arange(64.0, dtype=np.float32).reshape(8, 8), NamedSharding(strategies.mesh(), PartitionSpec("data"))
    ),
    "key": jax.random.key(3),
    "empty": jnp.zeros((0, 2)),
    "on the host": jax.device_put(jnp.ones(3), SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")),
    "numpy": np.arange(3),
}


@pytest.mark.parametrize("chunk_byte_size", [None, 16])
def test_arrays_by_way_of_pinned_host_memory_come_back(path: Path, chunk_byte_size: int | None) -> None:
    checkpointer = _pytree(enable_pinned_host_transfer=True)
    save_args = jax.tree.map(lambda _: ckptkit.SaveArgs(chunk_byte_size=chunk_byte_size), _PINNED_TREE)
    checkpointer.save(path, args=args.PyTreeSave(_PINNED_TREE, save_args))
    expected = {**_PINNED_TREE, "on the host": jax.device_put(jnp.ones(3), jax.devices()[0])}
    assert_same(checkpointer.restore(path), expected)


def test_data_files_end_near_the_size_asked_for(path: Path) -> None:
    tree = {str(i): np.full(100_000, i, np.uint8) for i in range(20)}
    _pytree().save(path, args=args.PyTreeSave(tree, ocdbt_target_data_file_size=300_000))
    assert len(list((path / "d").iterdir())) >= 5


# Tuples and named tuples without a target.


class _Typed(NamedTuple):
    left: Any
    right: Any


_RICH = {
    "tuple": (np.arange(2), (), [1, (2.5,)]),
    "pair": strategies.Pair(np.ones(2), _Typed(1, None)),
    "empty": optax.EmptyState(),
    "dict": {"1": 2, "z": {"y": []}},
}


def test_rich_types_are_recorded_as_orbax_records_them(path: Path, tmp_path: Path) -> None:
    ckptkit_options = ckptkit.options.PyTreeMetadataOptions(support_rich_types=True)
    _pytree(pytree_metadata_options=ckptkit_options).save(path, _RICH)
    handler = ocp.PyTreeCheckpointHandler(pytree_metadata_options=OrbaxMetadataOptions(support_rich_types=True))
    ocp.Checkpointer(handler).save(tmp_path / "orbax", _RICH)
    ours, theirs = (json.loads((each / "_METADATA").read_text()) for each in (path, tmp_path / "orbax"))
    assert json.loads(ours["value_metadata_tree"]) == json.loads(theirs["value_metadata_tree"])


@pytest.mark.parametrize("writer", [ckptkit, ocp])
def test_rich_types_come_back_without_a_target(path: Path, writer: Any) -> None:
    options = {ckptkit: ckptkit.options.PyTreeMetadataOptions, ocp: OrbaxMetadataOptions}[writer](support_rich_types=True)
    writer.Checkpointer(writer.StandardCheckpointHandler(pytree_metadata_options=options)).save(
        path, args=writer.args.StandardSave(_RICH)
    )

    ckptkit_options = ckptkit.options.PyTreeMetadataOptions(support_rich_types=True)
    restored = _standard(pytree_metadata_options=ckptkit_options).restore(path)

    assert type(restored["pair"]).__name__ == "ckptkit_testing_strategies_Pair_2"
    assert (restored["pair"]._fields, restored["pair"].second.left) == (("first", "second"), 1)
    assert (type(restored["tuple"]), restored["tuple"][2], restored["empty"]._fields) == (tuple, [1, (2.5,)], ())
    again = _standard(pytree_metadata_options=ckptkit_options).restore(path)
    assert jax.tree.structure(again) == jax.tree.structure(restored)


def test_rich_types_are_lists_and_dicts_unless_asked_for(path: Path) -> None:
    options = ckptkit.options.PyTreeMetadataOptions(support_rich_types=True)
    _standard(pytree_metadata_options=options).save(path, {"a": (1, strategies.Pair(2, 3))})
    assert _standard().restore(path) == {"a": [1, {"first": 2, "second": 3}]}


def test_metadata_has_rich_types_too(path: Path) -> None:
    checkpointer = _standard(pytree_metadata_options=ckptkit.options.PyTreeMetadataOptions(support_rich_types=True))
    checkpointer.save(path, _RICH)
    described = checkpointer.metadata(path).item_metadata.tree
    assert described["pair"].first.shape == (2,)
    assert isinstance(described["tuple"], tuple)


_LEAF = {"category": "custom", "clazz": "ValueMetadataEntry", "data": {}}


@pytest.mark.parametrize(
    "document",
    [
        {"a": [_LEAF]},
        {"a": _LEAF, "b": _LEAF},
        {},
        {"a": {"category": "custom", "clazz": "os.system", "entries": []}},
        {"a": {"category": "namedtuple", "module": "os", "clazz": "x; import os", "entries": [{"key": "b", "value": _LEAF}]}},
        {"a": {"category": "namedtuple", "module": "m", "clazz": "C", "entries": [{"key": "__class__", "value": _LEAF}]}},
        {"a": {"category": "namedtuple", "module": "m", "clazz": "C", "entries": {"key": "b"}}},
        {"a": 5},
        [],
        None,
    ],
)
def test_hostile_rich_types_are_a_format_error(path: Path, document: Any) -> None:
    checkpointer = _pytree(pytree_metadata_options=ckptkit.options.PyTreeMetadataOptions(support_rich_types=True))
    checkpointer.save(path, {"a": 1})
    found = json.loads((path / "_METADATA").read_text())
    (path / "_METADATA").write_text(json.dumps({**found, "value_metadata_tree": json.dumps(document)}))
    (path / FILE_LIST).unlink()
    with pytest.raises(errors.FormatError, match=r"value_metadata_tree|namedtuple|entries|an object"):
        checkpointer.restore(path)


# What is saved.


def test_empty_containers_beside_leaves_come_back(path: Path) -> None:
    tree = {"a": {}, "b": None, "c": [], "d": ()}
    _standard().save(path, tree)
    assert _standard().restore(path) == tree


def test_without_a_target_containers_become_dicts_and_lists(path: Path) -> None:
    state = flax.struct.dataclass(type("State", (), {"__annotations__": {"w": Any}}))(w=4)
    _standard().save(path, {"tuple": (1, 2), "pair": strategies.Pair(1, 2), "class": state, "numbers": {3: 5}})
    expected = {"tuple": [1, 2], "pair": {"first": 1, "second": 2}, "class": {"w": 4}, "numbers": {"3": 5}}
    assert _standard().restore(path) == expected


def test_masked_nodes_come_back_as_none_without_a_target(path: Path) -> None:
    _standard().save(path, {"a": optax.MaskedNode(), "b": 1})
    assert _standard().restore(path) == {"a": None, "b": 1}


def test_masked_nodes_come_back_with_a_target(path: Path) -> None:
    tree = {"a": optax.MaskedNode(), "b": 1}
    _standard().save(path, tree)
    assert _standard().restore(path, tree) == tree


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(7), np.bool_(True)])
def test_standard_saves_numpy_scalars_as_arrays(path: Path, value: Any) -> None:
    _standard().save(path, {"a": value})
    assert_same(_standard().restore(path), {"a": np.asarray(value)})


def test_standard_saves_whatever_has_an_array(path: Path) -> None:
    class Table:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.arange(3)

    _standard().save(path, {"a": Table()})
    assert_same(_standard().restore(path), {"a": np.arange(3)})


@pytest.mark.parametrize(
    "array", [np.array([None]), np.array(["a"]), np.array(["2020"], "datetime64[Y]"), np.zeros(1, [("a", "i4")])], ids=str
)
def test_dtypes_that_hold_no_numbers_are_refused_before_anything_is_written(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\('bad',\).*dtype"):
        _standard().save(tmp_path / "c", {"bad": array, "good": 1})
    assert not list(tmp_path.iterdir())


def test_an_array_without_elements_comes_back(path: Path) -> None:
    tree = {"a": np.zeros((0, 3), np.float32)}
    _standard().save(path, tree)
    assert_same(_standard().restore(path), tree)


@pytest.mark.parametrize("handler", ["Standard", "PyTree"])
def test_python_complex_numbers_come_back(path: Path, handler: str) -> None:
    checkpointer = {"Standard": _standard, "PyTree": _pytree}[handler]()
    checkpointer.save(path, {"a": 1 + 2j})
    assert checkpointer.restore(path) == {"a": 1 + 2j}
    assert ocp.PyTreeCheckpointer().restore(path) == {"a": 1 + 2j}
    with ocp.StandardCheckpointer() as theirs:
        assert theirs.restore(path, {"a": np.zeros((), complex)}) == {"a": 1 + 2j}
        with pytest.raises(ValueError, match="complex"):
            theirs.restore(path)


def test_swapped_bytes_come_back_in_the_machines_order(path: Path) -> None:
    _standard().save(path, {"a": np.arange(3, dtype=">i4")})
    assert_same(_standard().restore(path), {"a": np.arange(3, dtype="int32")})


def test_a_target_of_swapped_bytes_is_met(path: Path) -> None:
    _standard().save(path, {"a": np.arange(3, dtype="int32")})
    assert _standard().restore(path, {"a": np.zeros(3, ">i4")})["a"].dtype == np.dtype(">i4")


def test_two_trees_that_differ_in_empty_containers_alone_keep_their_own(tmp_path: Path) -> None:
    for i, tree in enumerate([{"a": (), "b": []}, {"a": [], "b": ()}, {"a": {}, "b": None}]):
        _standard().save(tmp_path / str(i), tree)
        assert _standard().restore(tmp_path / str(i)) == tree


def test_two_trees_that_differ_in_the_order_of_kinds_keep_their_own(tmp_path: Path) -> None:
    host, device = np.ones(2, np.float32), jnp.ones(2)
    for i, tree in enumerate([[host, device, host], [host, host, device]]):
        _standard().save(tmp_path / str(i), tree)
        assert_same(_standard().restore(tmp_path / str(i)), tree)


def test_save_args_cut_the_axes_asked_for(path: Path) -> None:
    save_args = {"a": ckptkit.SaveArgs(chunk_byte_size=64, shard_axes=(1,))}
    _standard().save(path, args=args.StandardSave({"a": jnp.zeros((4, 16))}, save_args))
    assert _standard().metadata(path).item_metadata["a"].storage.chunk_shape == (4, 4)


# How handlers are called.


@pytest.mark.parametrize(
    ("handler", "given"),
    [
        (ckptkit.StandardCheckpointHandler(), args.StandardSave({"a": 1})),
        (ckptkit.PyTreeCheckpointHandler(), args.PyTreeSave({"a": 1})),
        (ckptkit.JsonCheckpointHandler(), args.JsonSave({"a": 1})),
    ],
)
def test_args_given_to_a_handler_by_position_are_told_their_name(tmp_path: Path, handler: Any, given: Any) -> None:
    with pytest.raises(ValueError, match=f"specify kwarg name `args=` when providing `{type(given).__name__}`"):
        handler.save(epath.Path(tmp_path), given)


@pytest.mark.parametrize(
    "handler", [ckptkit.StandardCheckpointHandler(), ckptkit.PyTreeCheckpointHandler(), ckptkit.JsonCheckpointHandler()]
)
def test_an_item_without_args_is_taken_with_a_warning(tmp_path: Path, handler: Any) -> None:
    with pytest.warns(DeprecationWarning, match=r"item of a handler's save and restore are deprecated; pass args=\w+Save"):
        handler.save(epath.Path(tmp_path), {"a": 1})
    assert handler.restore(epath.Path(tmp_path)) == {"a": 1}


def test_save_args_without_args_are_taken_with_a_warning(tmp_path: Path) -> None:
    handler = ckptkit.StandardCheckpointHandler()
    with pytest.warns(DeprecationWarning, match="item, save_args"):
        handler.save(epath.Path(tmp_path), {"a": np.ones(2)}, {"a": ckptkit.SaveArgs(dtype=np.int8)})
    assert handler.metadata(epath.Path(tmp_path))["a"].dtype == np.int8


def test_a_target_without_args_is_taken_with_a_warning(tmp_path: Path) -> None:
    handler = ckptkit.StandardCheckpointHandler()
    handler.save(epath.Path(tmp_path), args=args.StandardSave({"a": 1}))
    with pytest.warns(DeprecationWarning, match="pass args=StandardRestore"):
        assert handler.restore(epath.Path(tmp_path), {"a": 0.0}) == {"a": 1.0}


def test_args_beside_the_arguments_before_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already says everything; leave out item"):
        ckptkit.StandardCheckpointHandler().save(epath.Path(tmp_path), {"a": 1}, args=args.StandardSave({"a": 1}))


# What is restored.


def test_an_abstract_array_becomes_numpy_where_no_sharding_was_saved(path: Path) -> None:
    _standard().save(path, {"host": np.ones(2, np.float32), "device": jnp.ones(2)})
    restored = _standard().restore(path, {name: jax.ShapeDtypeStruct((2,), np.float32) for name in ("host", "device")})
    assert isinstance(restored["host"], np.ndarray)
    assert isinstance(restored["device"], jax.Array)


def test_a_fallback_leaves_what_was_saved_from_numpy_in_numpy(path: Path) -> None:
    _standard().save(path, {"host": np.ones(2, np.float32)})
    fallback = SingleDeviceSharding(jax.devices()[1])
    target = {"host": jax.ShapeDtypeStruct((2,), np.float32)}
    restored = _standard().restore(path, args=args.StandardRestore(target, fallback_sharding=fallback))
    assert isinstance(restored["host"], np.ndarray)


def test_a_fallback_takes_the_place_of_devices_that_are_not_here(path: Path) -> None:
    _standard().save(path, {"a": jnp.ones(2)})
    file = path / "_sharding"
    file.write_text(file.read_text().replace("cpu:0", "tpu:7"))
    (path / FILE_LIST).unlink()
    fallback = SingleDeviceSharding(jax.devices()[3])
    restored = _standard().restore(path, args=args.StandardRestore(fallback_sharding=fallback))
    assert restored["a"].sharding == fallback


def test_layouts_are_honoured_where_asked_for(path: Path) -> None:
    _standard().save(path, {"a": jnp.arange(6.0).reshape(2, 3)})
    wanted = Format(Layout(major_to_minor=(1, 0)), SingleDeviceSharding(jax.devices()[0]))
    target = {"a": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=wanted)}
    restored = _standard().restore(path, args=args.StandardRestore(target, support_layout=True))
    assert restored["a"].format.layout.major_to_minor == (1, 0)
    np.testing.assert_array_equal(restored["a"], np.arange(6.0).reshape(2, 3))


def test_layouts_are_ignored_where_not_asked_for(path: Path) -> None:
    _standard().save(path, {"a": jnp.arange(6.0).reshape(2, 3)})
    wanted = Format(Layout(major_to_minor=(1, 0)), SingleDeviceSharding(jax.devices()[0]))
    target = {"a": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=wanted)}
    assert _standard().restore(path, target)["a"].format.layout.major_to_minor == (0, 1)


def test_layouts_may_be_asked_for_where_a_target_has_none(path: Path) -> None:
    _standard().save(path, {"a": jnp.ones(2)})
    target = {"a": jax.ShapeDtypeStruct((2,), np.float32)}
    assert isinstance(_standard().restore(path, args=args.StandardRestore(target, support_layout=True))["a"], jax.Array)


@pytest.mark.parametrize("strict", [True, False])
def test_numpy_targets_have_their_shape_checked(path: Path, strict: bool) -> None:
    _standard().save(path, {"a": np.arange(3)})
    with pytest.raises(ValueError, match=r"\('a',\): stored .*requested"):
        _standard().restore(path, args=args.StandardRestore({"a": np.zeros((2, 2), int)}, strict=strict))


def test_numpy_targets_are_padded_and_truncated(path: Path) -> None:
    _standard().save(path, {"a": np.arange(3), "b": np.arange(3)})
    target = {"a": np.zeros(5, int), "b": np.zeros(2, int)}
    restored = _standard().restore(path, args=args.StandardRestore(target, strict=False))
    assert_same(restored, {"a": np.array([0, 1, 2, 0, 0]), "b": np.array([0, 1])})


@pytest.mark.parametrize("handler", ["Standard", "PyTree"])
def test_tree_metadata_is_a_target(path: Path, handler: str) -> None:
    tree = {"a": jnp.ones(2), "b": [np.arange(3), 2.5], "c": jax.random.key(0), "d": None, "e": 1 + 2j}
    checkpointer = {"Standard": _standard, "PyTree": _pytree}[handler]()
    checkpointer.save(path, tree)
    metadata = checkpointer.metadata(path).item_metadata
    restore = {"Standard": args.StandardRestore, "PyTree": args.PyTreeRestore}[handler]
    assert_same(checkpointer.restore(path, args=restore(metadata)), tree)
    assert_same(checkpointer.restore(path, args=restore(metadata.tree)), tree)


def test_metadata_of_a_str_is_a_target(path: Path) -> None:
    _pytree().save(path, {"a": "text"})
    target = _pytree().metadata(path).item_metadata.tree
    assert _standard().restore(path, target) == {"a": "text"}


def test_metadata_leaves_cannot_be_saved(path: Path, tmp_path: Path) -> None:
    _pytree().save(path, {"a": "text", "b": 1, "c": np.ones(1)})
    with pytest.raises(errors.TreeError, match="3 of 3 leaves cannot be saved"):
        _pytree().save(tmp_path / "again", _pytree().metadata(path).item_metadata.tree)


def test_a_numpy_scalar_is_a_target(path: Path) -> None:
    _standard().save(path, {"a": 7})
    assert_same(_standard().restore(path, {"a": np.float32(0)}), {"a": np.float32(7)})


def test_a_target_of_text_or_objects_is_refused(path: Path) -> None:
    _standard().save(path, {"a": np.ones(1)})
    with pytest.raises(ValueError, match=r"\('a',\).*holds no numbers"):
        _standard().restore(path, args=args.StandardRestore({"a": np.array(["x"])}))


def test_keys_are_made_of_key_data_alone(path: Path) -> None:
    _standard().save(path, {"a": np.ones(3), "b": jax.random.key_data(jax.random.key(5))})
    with pytest.raises(ValueError, match=r"\('a',\): a PRNG key was requested, but what is stored"):
        _standard().restore(path, {"a": jax.random.key(0), "b": jax.random.key(0)})
    target = {"a": np.zeros(3), "b": jax.random.key(0)}
    assert_same(_standard().restore(path, target)["b"], jax.random.key(5))


@pytest.mark.parametrize("kind", ["device", "pinned_host", "unpinned_host"])
def test_memory_kinds_of_a_target_are_honoured(path: Path, kind: str) -> None:
    sharding = SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
    tree = {"a": jax.device_put(jnp.arange(4.0), sharding)}
    _standard().save(path, tree)
    restored = _standard().restore(path, {"a": jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding)})
    assert restored["a"].sharding.memory_kind == kind
    np.testing.assert_array_equal(np.asarray(restored["a"]), np.arange(4.0))


# Foreign nodes.


@flax.struct.dataclass
class _State:
    params: Any
    step: int
    name: str = flax.struct.field(pytree_node=False)


class _Module:
    """As equinox registers modules: children without keys."""

    def __init__(self, weight: Any, bias: Any) -> None:
        self.weight, self.bias = weight, bias


jax.tree_util.register_pytree_node(_Module, lambda m: ((m.weight, m.bias), None), lambda _, children: _Module(*children))


def test_a_dict_is_restored_into_a_flax_class(path: Path) -> None:
    _standard().save(path, {"params": {"w": jnp.ones(2)}, "step": 3})
    restored = _standard().restore(path, _State(params={"w": jnp.zeros(2)}, step=0, name="run"))
    assert (type(restored), restored.step, restored.name) == (_State, 3, "run")
    np.testing.assert_array_equal(restored.params["w"], np.ones(2))


@pytest.mark.parametrize(("writer", "reader"), [(ckptkit, ocp), (ocp, ckptkit), (ckptkit, ckptkit)])
def test_nodes_without_keys_come_back_with_their_class(path: Path, writer: Any, reader: Any) -> None:
    tree = {"layer": _Module(jnp.ones(2), np.arange(3))}
    writer.Checkpointer(writer.StandardCheckpointHandler()).save(path, args=writer.args.StandardSave(tree))
    target = {"layer": _Module(jnp.zeros(2), np.zeros(3, int))}
    checkpointer = reader.Checkpointer(reader.StandardCheckpointHandler())
    layer = checkpointer.restore(path, args=reader.args.StandardRestore(target))["layer"]
    assert_same([layer.weight, layer.bias], [jnp.ones(2), np.arange(3)])


@pytest.mark.parametrize(("writer", "reader"), [(ckptkit, ocp), (ocp, ckptkit), (ckptkit, ckptkit)])
def test_an_nnx_state_comes_back(path: Path, writer: Any, reader: Any) -> None:
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    writer.Checkpointer(writer.StandardCheckpointHandler()).save(path, args=writer.args.StandardSave(state))
    target = jax.tree.map(jnp.zeros_like, state)
    restored = reader.Checkpointer(reader.StandardCheckpointHandler()).restore(path, args=reader.args.StandardRestore(target))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


# Restore args.


def test_array_restore_args_make_a_jax_array_of_whatever_was_saved(path: Path) -> None:
    sharding = NamedSharding(strategies.mesh(), PartitionSpec("data"))
    _pytree().save(path, {"a": np.arange(8, dtype=np.int32), "b": jnp.arange(8.0)})
    restore_args = {name: ckptkit.ArrayRestoreArgs(sharding=sharding) for name in "ab"}
    restored = _pytree().restore(path, args=args.PyTreeRestore(restore_args=restore_args))
    assert all(isinstance(leaf, jax.Array) and leaf.sharding == sharding for leaf in restored.values())


def test_array_restore_args_take_a_mesh_and_axes(path: Path) -> None:
    _pytree().save(path, {"a": jnp.arange(8.0)})
    restore_args = {"a": ckptkit.ArrayRestoreArgs(mesh=strategies.mesh(), mesh_axes=PartitionSpec("data"))}
    restored = _pytree().restore(path, args=args.PyTreeRestore(restore_args=restore_args))
    assert restored["a"].sharding == NamedSharding(strategies.mesh(), PartitionSpec("data"))


def test_array_restore_args_pad_where_they_are_not_strict(path: Path) -> None:
    _pytree().save(path, {"a": np.arange(2, dtype=np.int32)})
    sharding = SingleDeviceSharding(jax.devices()[0])
    restore_args = {"a": ckptkit.ArrayRestoreArgs(sharding=sharding, global_shape=(3,), strict=False)}
    restored = _pytree().restore(path, args=args.PyTreeRestore(restore_args=restore_args))
    np.testing.assert_array_equal(restored["a"], [0, 1, 0])


def test_shape_and_global_shape_are_one_thing() -> None:
    with pytest.raises(ValueError, match=r"shape=\(1,\) and global_shape=\(2,\) differ"):
        ckptkit.ArrayRestoreArgs(shape=(1,), global_shape=(2,))


@pytest.mark.parametrize("wrong", ["text", 5, ocp.RestoreArgs()], ids=["str", "int", "of another library"])
def test_restore_args_that_are_none_are_named(path: Path, wrong: Any) -> None:
    _pytree().save(path, {"a": 1})
    with pytest.raises(ValueError, match=r"\('a',\): restore_args holds a \w+ here; expected RestoreArgs"):
        _pytree().restore(path, args=args.PyTreeRestore(restore_args={"a": wrong}))


def test_a_restore_type_that_nobody_restores_is_named(path: Path) -> None:
    _pytree().save(path, {"a": 1})
    with pytest.raises(ValueError, match=r"\('a',\): no type handler is registered for restore_type=<class 'object'>"):
        _pytree().restore(path, args=args.PyTreeRestore(restore_args={"a": ckptkit.RestoreArgs(restore_type=object)}))


def test_restore_args_obey_casting(path: Path) -> None:
    _pytree().save(path, {"a": np.ones(1)})
    restore_args = {"a": ckptkit.RestoreArgs(dtype=np.int8)}
    with pytest.raises(ValueError, match="casting='same_kind' forbids it"):
        _pytree().restore(path, args=args.PyTreeRestore(restore_args=restore_args, casting="same_kind"))


def test_an_empty_container_among_restore_args_comes_back(path: Path) -> None:
    _pytree().save(path, {"a": {}, "b": 1})
    restored = _pytree().restore(path, args=args.PyTreeRestore(restore_args={"a": {}, "b": ckptkit.RestoreArgs()}))
    assert restored == {"a": {}, "b": 1}


# The names of Orbax's tutorials.


def _plain(restore_args: Any) -> Any:
    """The type of restore args, and those fields that both libraries have."""
    names = ("restore_type", "dtype", "sharding", "global_shape", "shape", "strict")
    return jax.tree.map(lambda each: (type(each).__name__, [getattr(each, name, None) for name in names]), restore_args)


_TARGET = {
    "jax": jnp.ones(2),
    "abstract": jax.ShapeDtypeStruct((2,), np.float32),
    "numpy": [np.ones(3), 2, 2.5, True, "text"],
    "none": None,
}


def test_construct_restore_args_is_orbaxs() -> None:
    ours = ckptkit.checkpoint_utils.construct_restore_args(_TARGET)
    theirs = ocp.checkpoint_utils.construct_restore_args(_TARGET)
    assert _plain(ours) == _plain(theirs)


def test_construct_restore_args_takes_shardings_and_options() -> None:
    sharding = NamedSharding(strategies.mesh(), PartitionSpec())
    target, shardings = {"a": jnp.ones(2), "b": np.ones(2)}, {"a": sharding, "b": None}
    ours = ckptkit.construct_restore_args(target, shardings, set_global_shape=False, strict=False)
    theirs = ocp.checkpoint_utils.construct_restore_args(target, shardings, set_global_shape=False, strict=False)
    assert _plain(ours) == _plain(theirs)


def test_construct_restore_args_takes_metadata(path: Path) -> None:
    tree = {"a": jnp.ones(2), "b": np.ones(2), "c": "text", "d": 3}
    _pytree().save(path, tree)
    restore_args = ckptkit.construct_restore_args(_pytree().metadata(path).item_metadata)
    assert_same(_pytree().restore(path, args=args.PyTreeRestore(restore_args=restore_args)), tree)


def test_construct_restore_args_names_a_leaf_that_it_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"Unsupported type: <class 'bytes'> for key: \('a',\)"):
        ckptkit.construct_restore_args({"a": b"x"})


@pytest.mark.parametrize("leaf", [jnp.ones(2), np.ones(3), 3, 2.5, jax.ShapeDtypeStruct((2,), np.int8)], ids=repr)
def test_to_shape_dtype_struct_is_orbaxs(leaf: Any) -> None:
    assert ckptkit.utils.to_shape_dtype_struct(leaf) == ocp.utils.to_shape_dtype_struct(leaf)
    assert ckptkit.utils.to_shape_dtype_struct(leaf, np.int16, np.float32) == ocp.utils.to_shape_dtype_struct(
        leaf, np.int16, np.float32
    )


def test_to_shape_dtype_struct_refuses_what_is_no_array() -> None:
    with pytest.raises(ValueError, match="has no shape and dtype"):
        ckptkit.utils.to_shape_dtype_struct("text")


def test_type_handlers_are_those_of_the_default_registry() -> None:
    known = ckptkit.type_handlers.get_type_handler(np.ndarray)
    assert known is ckptkit.default_registry().type_handler_for(np.ndarray)
    assert ckptkit.type_handlers.has_type_handler(np.ndarray)
    assert not ckptkit.type_handlers.has_type_handler(collections.Counter)
    with pytest.raises(ValueError, match="No type handler is registered"):
        ckptkit.type_handlers.get_type_handler(collections.Counter)


def test_a_type_registered_twice_is_a_value_error() -> None:
    handler = ckptkit.type_handlers.get_type_handler(str)
    with pytest.raises(ValueError, match="leaf type"):
        ckptkit.type_handlers.register_type_handler(np.ndarray, handler)


def test_placeholder_is_orbaxs() -> None:
    assert ckptkit.PLACEHOLDER is ocp.PLACEHOLDER


# Options of checkpointers, and sizes.


def test_the_callback_comes_after_the_commit(path: Path) -> None:
    seen: list[bool] = []
    options = ckptkit.AsyncOptions(post_finalization_callback=lambda: seen.append(path.exists()))
    with ckptkit.StandardCheckpointer(async_options=options) as checkpointer:
        checkpointer.save(path, {"a": 1})
    assert seen == [True]


def _files(directory: Path) -> list[Path]:
    return [file for file in directory.rglob("*") if file.is_file()]


def test_a_thousand_leaves_take_few_files_and_little_more_than_their_bytes(path: Path) -> None:
    tree = {str(i): np.full(256, i, np.float32) for i in range(1000)}
    _standard().save(path, tree)
    assert len(_files(path)) < 20
    assert sum(file.stat().st_size for file in _files(path)) < 2 * sum(leaf.nbytes for leaf in tree.values())


def test_a_small_checkpoint_has_no_more_files_than_orbaxs(tmp_path: Path) -> None:
    for library in (ckptkit, ocp):
        checkpointer = library.Checkpointer(library.StandardCheckpointHandler())
        checkpointer.save(tmp_path / library.__name__, args=library.args.StandardSave({"a": jnp.ones(2)}))
    assert len(_files(tmp_path / "ckptkit")) <= len(_files(tmp_path / "orbax.checkpoint"))


# Details of what is refused, and of what is taken that Orbax refuses.


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**70])
def test_integers_beyond_64_bits_are_refused(path: Path, number: int) -> None:
    with pytest.raises(ValueError, match=r"\('a',\): .*64"):
        _standard().save(path, {"a": number})


def test_a_dtype_to_save_in_leaves_keys_alone(path: Path) -> None:
    tree = {"a": jax.random.split(jax.random.key(1), 3)}
    _standard().save(path, args=args.StandardSave(tree, {"a": ckptkit.SaveArgs(dtype=np.float32)}))
    assert_same(_standard().restore(path), tree)


@pytest.mark.parametrize("save_args", [{"b": ckptkit.SaveArgs()}, {"a": {"b": ckptkit.SaveArgs()}}, {"a": 5}])
def test_save_args_of_another_structure_are_refused(path: Path, save_args: Any) -> None:
    with pytest.raises(ValueError, match="save_args"):
        _standard().save(path, args=args.StandardSave({"a": np.ones(2)}, save_args))


@pytest.mark.parametrize("handler", ["Standard", "PyTree"])
def test_a_placeholder_in_a_target_is_left_alone(path: Path, handler: str) -> None:
    checkpointer = {"Standard": _standard, "PyTree": _pytree}[handler]()
    checkpointer.save(path, {"a": np.ones(2), "b": 2})
    assert checkpointer.restore(path, {"a": ..., "b": 0}) == {"a": ..., "b": 2}


def test_str_and_objects_in_a_target_are_refused_at_once(path: Path) -> None:
    _standard().save(path, {"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"(?s)2 that do not fit:.*\('b',\): Unsupported type.*\('a',\)"):
        _standard().restore(path, {"a": "text", "b": object()})


def test_a_str_is_restored_where_one_was_saved(path: Path) -> None:
    _pytree().save(path, {"a": "text"})
    assert _standard().restore(path, {"a": ""}) == {"a": "text"}


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.float32])
def test_casts_are_numpys(path: Path, dtype: Any) -> None:
    saved = np.array([0, 1.5 + 2j, 2j], np.complex64)
    _standard().save(path, {"a": saved})
    with pytest.warns(UserWarning, match="change their kind of number"):
        restored = _standard().restore(path, {"a": np.zeros(3, dtype)})["a"]
    assert_same(restored, (saved if dtype == np.bool_ else saved.real).astype(dtype))


def test_another_number_of_axes_is_refused_though_not_strict(path: Path) -> None:
    _standard().save(path, {"a": jnp.ones((2, 3))})
    target = {"a": jax.ShapeDtypeStruct((6,), np.float32)}
    with pytest.raises(ValueError, match="stored with 2 axes, requested with 1; strict=False changes lengths only"):
        _standard().restore(path, args=args.StandardRestore(target, strict=False))


def test_a_leaf_asked_for_where_an_empty_node_is_stored_is_refused(path: Path) -> None:
    _standard().save(path, {"a": {}, "b": 1})
    with pytest.raises(ValueError, match=r"\('a',\): a int was asked for, but an empty node \(Dict\) is stored"):
        _standard().restore(path, {"a": 3, "b": 1})


@pytest.mark.parametrize("tree", [{}, [], ()])
def test_an_empty_tree_comes_back_under_pytree(path: Path, tree: Any) -> None:
    _pytree().save(path, tree)
    assert _pytree().restore(path) == tree


def test_pytree_refuses_to_aggregate(path: Path) -> None:
    with pytest.raises(ValueError, match="Unsupported option `aggregate`"):
        _pytree().save(path, args=args.PyTreeSave({"a": 1}, {"a": ckptkit.SaveArgs(aggregate=True)}))


def test_a_partial_restore_of_a_tree_that_differs_is_refused(path: Path) -> None:
    _pytree().save(path, {"a": {"b": 1}})
    with pytest.raises(ValueError, match=r"\('a', '0'\)"):
        _pytree().restore(path, args=args.PyTreeRestore({"a": [1]}, partial_restore=True))


def test_restore_args_without_an_item_may_be_of_the_classes_that_were_saved(path: Path) -> None:
    _pytree().save(path, {"a": strategies.Pair(1, 2), "b": 3})
    restore_args = {"a": strategies.Pair(ckptkit.RestoreArgs(restore_type=float), None), "b": None}
    assert _pytree().restore(path, args=args.PyTreeRestore(restore_args=restore_args)) == {"a": strategies.Pair(1.0, 2), "b": 3}


def test_an_array_without_a_sharding_goes_to_the_default_device(path: Path) -> None:
    _pytree().save(path, {"a": np.ones(2, np.float32)})
    restored = _pytree().restore(path, args=args.PyTreeRestore(restore_args={"a": ckptkit.ArrayRestoreArgs()}))
    assert_same(restored, {"a": jnp.ones(2)})


def test_the_shape_asked_of_keys_is_the_keys(path: Path) -> None:
    keys = jax.random.split(jax.random.key(1), 3)
    _pytree().save(path, {"a": keys})

    def restored(shape: tuple[int, ...]) -> Any:
        restore_args = {"a": ckptkit.ArrayRestoreArgs(global_shape=shape, sharding=keys.sharding)}
        return _pytree().restore(path, args=args.PyTreeRestore(restore_args=restore_args))

    assert_same(restored((3,)), {"a": keys})
    with pytest.raises(ValueError, match="requested"):
        restored((3, 2))


class _CallingHandler(ocp.CheckpointHandler):  # type: ignore[misc]  # Orbax has no types
    """Calls a function while Orbax saves."""

    def save(self, directory: epath.Path, args: _Meanwhile) -> None:
        (directory / "data").write_text("theirs")
        args.call()

    def restore(self, directory: epath.Path, args: Any = None) -> str:
        return (directory / "data").read_text()


@ocp.args.register_with_handler(_CallingHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Meanwhile(ocp.args.CheckpointArgs):  # type: ignore[misc]  # Orbax has no types
    call: Callable[[], None] = lambda: None


def test_a_path_that_orbax_is_saving_to_is_busy(path: Path) -> None:
    def save() -> None:
        with pytest.raises(errors.BusyError, match="such as Orbax, is saving to this path"):
            ckptkit.save(path, {"a": 1})

    with ocp.Checkpointer(_CallingHandler()) as theirs:
        theirs.save(path, args=_Meanwhile(save))
        assert theirs.restore(path) == "theirs"


def test_what_orbax_left_some_time_ago_is_tidied(path: Path) -> None:
    temporary = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
    with ocp.Checkpointer(_CallingHandler()) as theirs:
        theirs.save(path, args=_Meanwhile(lambda: shutil.copytree(temporary, path.with_name("killed"))))
    shutil.rmtree(path)
    os.rename(path.with_name("killed"), temporary)
    for each in (temporary, *temporary.rglob("*")):
        os.utime(each, (0, 0))
    ckptkit.save(path, {"a": 1})
    assert os.listdir(path.parent) == ["checkpoint"]


def test_what_an_overwrite_of_orbaxs_checkpoint_left_is_tidied_at_once(path: Path) -> None:
    with ocp.Checkpointer(_CallingHandler()) as theirs:
        theirs.save(path, args=_Meanwhile())
    os.rename(path, path.with_name(f"{path.name}.orbax-checkpoint-tmp"))
    ckptkit.save(path, {"a": 1})
    assert os.listdir(path.parent) == ["checkpoint"]
