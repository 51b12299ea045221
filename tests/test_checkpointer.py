"""Checkpointers as users call them: paths, args, handlers, and what happens when something is wrong."""

from __future__ import annotations

import enum
import functools
import gc
import json
import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import ckptkit
from ckptkit import args, errors
from ckptkit.file_list import FILE_LIST
from ckptkit.testing import abstract, assert_same

TREE = {"w": np.arange(6.0).reshape(2, 3), "step": 7}


@pytest.mark.parametrize("kind", [str, Path, epath.Path, os.path.relpath, lambda path: f"file://{path}"])
def test_every_kind_of_path_is_taken(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ckptkit.save(kind(tmp_path / "deep" / "er" / "c"), TREE)
    assert_same(ckptkit.restore(tmp_path / "deep" / "er" / "c"), TREE)


@pytest.mark.parametrize(
    "save",
    [
        lambda path: ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler()).save(path, TREE),
        lambda path: ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler()).save(path, args.StandardSave(TREE)),
        lambda path: ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler()).save(path, args=args.StandardSave(TREE)),
        lambda path: ckptkit.Checkpointer().save(path, args.StandardSaveArgs(TREE)),
        lambda path: ckptkit.Checkpointer().save(path, args.PyTreeSave(TREE)),
        lambda path: ckptkit.PyTreeCheckpointer().save(path, TREE),
        lambda path: ckptkit.PyTreeCheckpointer().save(
            path, item=TREE, save_args=jax.tree.map(lambda _: ckptkit.SaveArgs(), TREE)
        ),
        lambda path: ckptkit.save(path, args.PyTreeSave(TREE)),
        lambda path: ckptkit.save_async(path, TREE).result(60),
    ],
)
def test_every_way_to_save(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "c")
    assert_same(ckptkit.Checkpointer().restore(tmp_path / "c"), TREE)


def test_save_args_cast_at_save_and_bound_chunks(tmp_path: Path) -> None:
    with ckptkit.StandardCheckpointer() as checkpointer:
        save_args = {"w": ckptkit.SaveArgs(dtype=np.float32, chunk_byte_size=12), "step": None}
        checkpointer.save(tmp_path / "c", TREE, save_args=save_args)
    metadata = ckptkit.Checkpointer().metadata(tmp_path / "c").item_metadata["w"]
    assert (metadata.dtype, metadata.storage.chunk_shape) == (np.float32, (1, 3))
    np.testing.assert_array_equal(ckptkit.restore(tmp_path / "c")["w"], TREE["w"])


def test_args_that_do_not_belong_to_the_handler_are_refused_before_any_file_is_made(tmp_path: Path) -> None:
    checkpointer = ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler())
    with pytest.raises(errors.ArgsError, match=r"StandardCheckpointHandler cannot save with .*JsonSave.*StandardSave"):
        checkpointer.save(tmp_path / "c", args.JsonSave({"a": 1}))
    assert not list(tmp_path.iterdir())


def test_every_bad_leaf_is_named_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    deleted = jnp.ones(2)
    deleted.delete()
    tree = {
        "good": np.ones(2),
        "text": "abc",
        "bytes": b"abc",
        "object": np.array([None]),
        "time": np.array("2024-01-01", "datetime64[D]"),
        "huge": 2**64,
        "deleted": deleted,
        "abstract": jax.ShapeDtypeStruct((2,), np.float32),
        "f8": np.ones(2, ml_dtypes.float8_e4m3),
        "u4": np.ones(2, ml_dtypes.uint4),
        "masked": np.ma.masked_array([1, 2], [0, 1]),
        "deep": [{"set": {1, 2}}],
    }
    with pytest.raises(errors.TreeError) as caught, ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
    message = str(caught.value)
    assert "11 of 12 leaves" in message
    for key in tree.keys() - {"good", "deep"}:
        assert f"('{key}',)" in message
    assert "('deep', '0', 'set')" in message
    assert not list(tmp_path.iterdir())


def test_a_traced_value_is_refused(tmp_path: Path) -> None:
    @jax.jit
    def step(x: Any) -> Any:
        ckptkit.save(tmp_path / "c", {"x": x})
        return x

    with pytest.raises(errors.TreeError, match=r"\('x',\).*outside of jit"):
        step(jnp.ones(2))


@pytest.mark.parametrize("tree", [None, {}, [], np.ones(2), 3, jnp.ones(2)])
def test_standard_refuses_what_is_no_tree_with_leaves(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(ValueError, match=r"Must provide item|empty item|single arrays"):
        ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler()).save(tmp_path / "c", args.StandardSave(tree))


def test_names_that_collide_are_refused_naming_both(tmp_path: Path) -> None:
    with pytest.raises(errors.TreeError, match=r"\('a', 'b'\) and \('a.b',\)|\('a.b',\) and \('a', 'b'\)"):
        ckptkit.save(tmp_path / "c", {"a.b": np.ones(1), "a": {"b": np.zeros(1)}})


def test_an_aggregate_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unsupported option `aggregate`"), ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"a": np.ones(1)}, save_args={"a": ckptkit.SaveArgs(aggregate=True)})


def test_an_existing_checkpoint_is_kept_unless_forced(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", TREE)
    with pytest.raises(ValueError, match=r"Destination .* already exists.*force=True"):
        ckptkit.save(tmp_path / "c", {"other": 1})
    assert_same(ckptkit.restore(tmp_path / "c"), TREE)
    ckptkit.save(tmp_path / "c", {"other": 1}, force=True)
    assert ckptkit.restore(tmp_path / "c") == {"other": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("held", ["checkpoints", "old checkpoints", "files"])
@pytest.mark.parametrize("checkpointer_class", [ckptkit.PyTreeCheckpointer, ckptkit.StandardCheckpointer])
def test_force_never_deletes_what_is_no_checkpoint(tmp_path: Path, checkpointer_class: Any, held: str) -> None:
    runs = tmp_path / "runs"
    (runs / "100").mkdir(parents=True)
    (runs / "precious").write_text("precious")
    if held != "files":
        ckptkit.PyTreeCheckpointer(storage="zarr").save(runs / "100", TREE, force=True)  # over an empty directory
    if held == "old checkpoints":
        (runs / "100" / "ckptkit_files.json").unlink()
    with checkpointer_class() as checkpointer, pytest.raises(errors.ExistsError, match=r"no checkpoint.*100.*delete it first"):
        checkpointer.save(runs, {"a": 1}, force=True)
    assert (runs / "precious").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    if held != "files":
        assert_same(ckptkit.restore(runs / "100"), TREE)


@pytest.mark.parametrize(
    "names",
    [
        ["data/metadata"],
        ["run/checkpoint"],
        ["model/model.safetensors"],
        ["data.zarr/x/.zarray"],
        ["metadata"],
        ["checkpoint"],
        ["model.safetensors"],
        ["notes.ocdbt"],
        ["model.ocdbt/precious"],
        ["step_1/_METADATA", "step_2/_METADATA"],
        ["_METADATA", "step_1/_CHECKPOINT_METADATA"],
    ],
    ids=str,
)
def test_force_never_deletes_a_directory_for_a_name_in_it_that_others_use_too(tmp_path: Path, names: list[str]) -> None:
    for name in [*names, "src/main.py"]:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(errors.ExistsError, match="no checkpoint"):
        ckptkit.save(tmp_path / "run", TREE, force=True)
    assert all((tmp_path / "run" / name).exists() for name in [*names, "src/main.py"])


def test_force_never_deletes_what_came_while_the_save_was_writing(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()

    class Handler(ckptkit.JsonCheckpointHandler):
        def save(self, directory: Any, *positional: Any, **named: Any) -> None:
            (tmp_path / "c" / "log").write_text("precious")
            super().save(directory, *positional, **named)

    with ckptkit.Checkpointer(Handler()) as checkpointer, pytest.raises(errors.ExistsError, match=r"no checkpoint.*log"):
        checkpointer.save(tmp_path / "c", {"a": 1}, force=True)
    assert [(tmp_path / "c" / "log").read_text(), len(list(tmp_path.iterdir()))] == ["precious", 1]


@pytest.mark.parametrize("left", ["_METADATA", "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt", "ocdbt.process_0"])
def test_force_replaces_what_is_left_of_a_checkpoint(tmp_path: Path, left: str) -> None:
    ocp.PyTreeCheckpointer().save(tmp_path / "whole", {"a": jnp.ones(3)})
    (tmp_path / "c").mkdir()
    (tmp_path / "whole" / left).rename(tmp_path / "c" / left)
    ckptkit.save(tmp_path / "c", {"a": 1}, force=True)
    assert ckptkit.restore(tmp_path / "c") == {"a": 1}


def test_force_replaces_a_file_and_a_link_but_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("data")
    for name in ("file", "link"):
        ckptkit.save(tmp_path / name, {"a": 1}, force=True)
        assert ckptkit.restore(tmp_path / name) == {"a": 1}
    assert (tmp_path / "data" / "precious").read_text() == "precious"


def test_a_missing_checkpoint_says_what_is_there(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "step_10", TREE)
    with pytest.raises(FileNotFoundError, match="step_10"):
        ckptkit.restore(tmp_path / "step_11")


def test_an_unfinished_checkpoint_is_refused(tmp_path: Path) -> None:
    unfinished = tmp_path / f"c{'.orbax-checkpoint-tmp'}"
    unfinished.mkdir()
    with pytest.raises(ValueError, match="Found incomplete checkpoint at"):
        ckptkit.restore(unfinished)
    with pytest.raises(FileNotFoundError, match="never finished"):
        ckptkit.restore(tmp_path / "c")


def test_what_a_killed_save_left_is_tidied_by_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / "c.orbax-checkpoint-tmp"
    (leftover / "d").mkdir(parents=True)
    (leftover / "d" / "junk").write_text("junk")
    ckptkit.save(tmp_path / "c", TREE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    assert not list((tmp_path / "c").rglob("junk"))


def test_a_directory_that_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_text("hello")
    with pytest.raises(errors.FormatError, match=r"no checkpoint.*notes.txt"):
        ckptkit.restore(tmp_path / "c")


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_missing_required_file_is_named(tmp_path: Path, name: str) -> None:
    ckptkit.save(tmp_path / "c", TREE)
    (tmp_path / "c" / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        ckptkit.restore(tmp_path / "c", TREE)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "_sharding", "array_metadatas/process_0", "ckptkit_index.json"])
def test_a_missing_optional_file_is_no_error_where_nothing_lists_it(tmp_path: Path, name: str) -> None:
    tree = {"w": jnp.arange(4.0)}
    ckptkit.save(tmp_path / "c", tree)
    (tmp_path / "c" / name).unlink()
    with pytest.raises(errors.NotFoundError, match=f"1 of 6 files are missing:\n  {name}: missing"):
        ckptkit.restore(tmp_path / "c")
    (tmp_path / "c" / FILE_LIST).unlink()
    assert_same(ckptkit.restore(tmp_path / "c"), tree)


def test_a_flipped_byte_is_noticed_and_located(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"layer": {"w": np.zeros(100_000)}})
    data = max((tmp_path / "c" / "d").iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(errors.CorruptCheckpointError, match=r"\('layer', 'w'\)"):
        ckptkit.restore(tmp_path / "c")


def test_a_target_that_differs_is_described_from_both_sides(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.ones((2, 3)), "b": {"c": 1}, "d": np.ones(2)})
    with pytest.raises(ValueError, match="differ") as caught:
        ckptkit.restore(tmp_path / "c", {"a": np.ones((2, 3)), "b": {"x": 1}})
    assert "1 in the target, but not in the checkpoint:\n  ('b', 'x')" in str(caught.value)
    assert "2 in the checkpoint, but not in the target" in str(caught.value)


def test_every_shape_that_differs_is_named(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.ones((2, 3)), "b": jnp.ones(4), "c": 1})
    with pytest.raises(errors.TargetError) as caught:
        ckptkit.restore(tmp_path / "c", {"a": np.ones((3, 2)), "b": jax.ShapeDtypeStruct((5,), np.float32), "c": 1})
    assert "('a',): stored shape (2, 3), requested shape (3, 2)" in str(caught.value)
    assert "('b',): stored shape (4,), requested shape (5,)" in str(caught.value)


def test_strict_false_pads_and_truncates(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.arange(6.0).reshape(2, 3), "b": jnp.arange(4.0)})
    with ckptkit.StandardCheckpointer() as checkpointer:
        target = {
            "a": np.empty((3, 2)),
            "b": jax.ShapeDtypeStruct((6,), np.float32, sharding=abstract(jnp.ones(1)).sharding),
        }
        restored = checkpointer.restore(tmp_path / "c", target, strict=False)
    np.testing.assert_array_equal(restored["a"], [[0, 1], [3, 4], [0, 0]])
    np.testing.assert_array_equal(restored["b"], [0, 1, 2, 3, 0, 0])


def test_a_target_decides_type_dtype_and_sharding(tmp_path: Path, mesh: jax.sharding.Mesh) -> None:
    ckptkit.save(tmp_path / "c", {"a": jnp.arange(8.0), "b": np.arange(8), "c": 3, "d": np.ones(()), "e": jnp.arange(8)})
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    target = {
        "a": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=sharding),
        "b": jax.ShapeDtypeStruct((8,), np.int32, sharding=sharding),
        "c": 0.0,
        "d": 1.0,
        "e": np.empty(8, np.int64),
    }
    expected = {
        "a": jax.device_put(jnp.arange(8, dtype=jnp.bfloat16), sharding),
        "b": jax.device_put(jnp.arange(8, dtype=np.int32), sharding),
        "c": 3.0,
        "d": 1.0,
        "e": np.arange(8),
    }
    assert_same(ckptkit.restore(tmp_path / "c", target), expected)


def test_a_target_without_sharding_takes_the_saved_one(tmp_path: Path) -> None:
    array = jax.device_put(jnp.arange(4.0), jax.devices()[5])
    ckptkit.save(tmp_path / "c", {"a": array, "b": np.arange(3)})
    restored = ckptkit.restore(
        tmp_path / "c", {"a": jax.ShapeDtypeStruct((4,), np.float32), "b": jax.ShapeDtypeStruct((3,), np.int64)}
    )
    assert_same(restored, {"a": array, "b": np.arange(3)})


def test_a_64_bit_array_bound_for_jax_without_x64_is_an_error_with_the_ways_out(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.array([2**40 + 1])})
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match=r"jax_enable_x64 is off.*np.ndarray"):
        ckptkit.restore(tmp_path / "c", {"a": jax.ShapeDtypeStruct((1,), np.int64, sharding=sharding)})


def test_warnings_are_of_the_line_that_called(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.array([1.5])})
    target = {"a": np.zeros(1, np.int32)}
    with ckptkit.StandardCheckpointer() as checkpointer, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ckptkit.restore(tmp_path / "c", target)
        checkpointer.restore(tmp_path / "c", target)
        checkpointer.restore(tmp_path / "c", args=args.StandardRestore(target))
    assert [warning.filename for warning in caught] == [__file__] * 3


def test_a_cast_that_changes_kind_warns_and_casting_forbids_it(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.array([1.5])})
    with pytest.warns(UserWarning, match=r"\('a',\): float64 -> int32"):
        assert ckptkit.restore(tmp_path / "c", {"a": np.empty(1, np.int32)})["a"] == 1
    with pytest.raises(errors.TargetError, match="casting='same_kind' forbids it"):
        ckptkit.restore(tmp_path / "c", args.StandardRestore({"a": np.empty(1, np.int32)}, casting="same_kind"))


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "int4"), ("complex64", "bfloat16"), ("int8", "uint4"), ("int2", "bool")]
)
def test_a_cast_that_changes_kind_warns_and_is_forbidden_for_dtypes_that_numpy_knows_little_of(
    tmp_path: Path, stored: str, wanted: str
) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.ones(2, jnp.dtype(stored))})
    target = {"a": np.empty(2, jnp.dtype(wanted))}
    with pytest.warns(UserWarning, match=rf"\('a',\): {stored} -> {wanted}"):
        assert_same(ckptkit.restore(tmp_path / "c", target), {"a": np.ones(2, jnp.dtype(wanted))})
    with pytest.raises(errors.TargetError, match="casting='same_kind' forbids it"):
        ckptkit.restore(tmp_path / "c", args.StandardRestore(target, casting="same_kind"))


@pytest.mark.parametrize(
    ("stored", "wanted"), [("bfloat16", "float16"), ("float8_e4m3fn", "float8_e5m2"), ("int4", "int2"), ("int8", "bfloat16")]
)
def test_a_cast_within_a_kind_is_done_for_dtypes_that_numpy_knows_little_of(tmp_path: Path, stored: str, wanted: str) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.ones(2, jnp.dtype(stored))})
    restored = ckptkit.restore(tmp_path / "c", args.StandardRestore({"a": np.empty(2, jnp.dtype(wanted))}, casting="same_kind"))
    assert_same(restored, {"a": np.ones(2, jnp.dtype(wanted))})


@pytest.mark.parametrize(
    ("stored", "wanted", "is_safe"),
    [
        ("bfloat16", "float32", True),
        ("bfloat16", "float16", False),
        ("float8_e5m2", "float16", True),
        ("float8_e8m0fnu", "float16", False),
        ("float16", "bfloat16", False),
        ("int4", "int8", True),
        ("int4", "uint8", False),
        ("uint8", "bfloat16", True),
        ("int16", "bfloat16", False),
    ],
)
def test_a_safe_cast_keeps_every_value(tmp_path: Path, stored: str, wanted: str, is_safe: bool) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.ones(2, jnp.dtype(stored))})
    request = args.StandardRestore({"a": np.empty(2, jnp.dtype(wanted))}, casting="safe")
    if is_safe:
        assert_same(ckptkit.restore(tmp_path / "c", request), {"a": np.ones(2, jnp.dtype(wanted))})
        return
    with pytest.raises(errors.TargetError, match=f"stored dtype {stored}, requested dtype {wanted}; casting='safe' forbids it"):
        ckptkit.restore(tmp_path / "c", request)


def _int4s(*numbers: int) -> np.ndarray:
    return np.array(numbers, ml_dtypes.int4)


@pytest.mark.parametrize(
    ("stored", "target", "told"),
    [
        (3_000_000_000, jnp.int32(0), "int64 -> int32, of which the first is 3000000000"),
        (np.array([1, -(2**40), 2**40]), jnp.zeros(3, jnp.int32), f"int64 -> int32, of which the first is {-(2**40)}"),
        (np.array([[1, 2**31]], np.uint32), np.zeros((1, 2), np.int32), "uint32 -> int32, of which the first is 2147483648"),
        (_int4s(1, -3), np.zeros(2, ml_dtypes.int2), "int4 -> int2, of which the first is -3"),
    ],
)
def test_integers_that_the_requested_dtype_cannot_hold_warn_and_casting_forbids_them(
    tmp_path: Path, stored: Any, target: Any, told: str
) -> None:
    ckptkit.save(tmp_path / "c", {"a": stored, "b": 1})
    with pytest.warns(UserWarning, match=rf"^1 leaves hold integers beyond .*\n  \('a',\): {told}"):
        ckptkit.restore(tmp_path / "c", {"a": target, "b": 0})
    with pytest.raises(errors.TargetError, match=r"\('a',\): the number -?\d+ is stored, which \w+ cannot hold"):
        ckptkit.restore(tmp_path / "c", args.StandardRestore({"a": target, "b": 0}, casting="same_kind"))


@pytest.mark.parametrize(
    ("stored", "target"),
    [
        (2**31 - 1, jnp.int32(0)),
        (np.array([-(2**31), 2**31 - 1]), np.zeros(2, np.int32)),
        (np.array([2**31 - 1], np.uint64), np.zeros(1, np.int32)),
        (np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int8)),
        (_int4s(1, -2), np.zeros(2, ml_dtypes.int2)),
        (_int4s(7, -8), np.zeros(2, np.int16)),
    ],
)
def test_integers_that_the_requested_dtype_holds_are_cast_without_a_word(tmp_path: Path, stored: Any, target: Any) -> None:
    ckptkit.save(tmp_path / "c", {"a": stored})
    restored = ckptkit.restore(tmp_path / "c", args.StandardRestore({"a": target}, casting="same_kind"))["a"]
    assert restored.dtype == target.dtype
    assert np.asarray(restored, np.int64).tolist() == np.asarray(stored, np.int64).tolist()


NUMBERS = {"lr": 0.7, "z": 1 + 2j, "n": -1, "wide": 2**62 + 1}


def test_numbers_in_a_target_obey_casting_and_warn(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", NUMBERS)
    target = {"lr": 0, "z": 0.0, "n": True, "wide": np.uint64(0)}
    with pytest.warns(UserWarning, match=r"4 leaves change their kind of number.*\n  \('lr',\): float64 -> int64"):
        restored = ckptkit.restore(tmp_path / "c", target)
    assert_same(restored, {"lr": 0, "z": 1.0, "n": True, "wide": np.uint64(2**62 + 1)})
    with pytest.raises(errors.TargetError, match="4 of 4 leaves") as caught:
        ckptkit.restore(tmp_path / "c", args.StandardRestore(target, casting="same_kind"))
    assert "('z',): stored dtype complex128, requested dtype float64; casting='same_kind' forbids it" in str(caught.value)
    as_saved = args.StandardRestore(dict.fromkeys(NUMBERS, 0) | {"lr": 0.0, "z": 0j}, casting="no")
    assert_same(ckptkit.restore(tmp_path / "c", as_saved), NUMBERS)


def test_pythons_types_hold_numbers_of_every_width(tmp_path: Path) -> None:
    numbers = {"u": np.array(2**64 - 1, np.uint64), "f": np.array(1.5, np.float32), "b": np.array(2.5, jnp.bfloat16)}
    ckptkit.save(tmp_path / "c", numbers)
    restored = ckptkit.restore(tmp_path / "c", args.StandardRestore({"u": 0, "f": 0.0, "b": 0.0}, casting="no"))
    assert_same(restored, {"u": 2**64 - 1, "f": 1.5, "b": 2.5})


@pytest.mark.filterwarnings("ignore:.*change their kind of number")
@pytest.mark.parametrize(
    ("stored", "target"),
    [
        (float("nan"), 0),
        (float("-inf"), 0),
        (1e300, 0),
        (complex("nan+1j"), 0),
        (-1, np.uint8(0)),
        (300, np.int8(0)),
        (8, ml_dtypes.int4(0)),
        (1e300, np.float32(0)),
        (1e6, ml_dtypes.float8_e4m3fn(0)),
    ],
)
def test_a_number_that_the_targets_type_cannot_hold_is_an_error_that_names_it(tmp_path: Path, stored: Any, target: Any) -> None:
    ckptkit.save(tmp_path / "c", {"a": {"loss": stored, "b": 1}})
    with pytest.raises(errors.TargetError, match=r"1 of 2 leaves.*\n  \('a', 'loss'\): .* is stored, which \w+ cannot hold"):
        ckptkit.restore(tmp_path / "c", {"a": {"loss": target, "b": 0}})


@pytest.mark.parametrize(
    "kind", [ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ml_dtypes.int4, np.longlong, np.float16, np.longdouble]
)
def test_numpys_scalars_in_a_target_keep_their_type(tmp_path: Path, kind: Any) -> None:
    ckptkit.save(tmp_path / "c", {"a": 3})
    restored = ckptkit.restore(tmp_path / "c", {"a": kind(0)})["a"]
    assert type(restored) is kind
    assert restored == 3


def test_restore_args_that_name_a_type_of_numbers_obey_casting(tmp_path: Path) -> None:
    path = tmp_path / "c"
    ckptkit.save(path, args.PyTreeSave({"a": 2.5}))
    whole = {"a": ckptkit.RestoreArgs(restore_type=int)}
    assert_same(ckptkit.restore(path, args.PyTreeRestore(restore_args=whole)), {"a": 2})
    through = {"a": ckptkit.RestoreArgs(restore_type=int, dtype=np.float64)}
    for each in (whole, through):
        with pytest.raises(errors.TargetError, match="casting='same_kind' forbids it"):
            ckptkit.restore(path, args.PyTreeRestore(restore_args=each, casting="same_kind"))


def test_a_sharding_that_does_not_divide_the_shape_is_an_error_that_names_the_leaf(
    tmp_path: Path, mesh: jax.sharding.Mesh
) -> None:
    ckptkit.save(tmp_path / "c", {"a": jnp.arange(6.0)})
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    with pytest.raises(errors.TargetError, match=r"\('a',\): shape \(6,\) cannot be laid out"):
        ckptkit.restore(tmp_path / "c", {"a": jax.ShapeDtypeStruct((6,), np.float32, sharding=sharding)})


def test_a_dtype_to_save_in_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="float33"):
        ckptkit.SaveArgs(dtype="float33")


def _with_devices_of_another_machine(path: Path) -> None:
    file = path / "_sharding"
    file.write_text(file.read_text().replace("cpu:0", "tpu:42"))
    (path / FILE_LIST).unlink()


def test_absent_devices_are_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": jnp.ones(2)})
    _with_devices_of_another_machine(tmp_path / "c")
    with pytest.raises(ValueError, match=r"^Topology mismatch detected\..*fallback_sharding"):
        ckptkit.restore(tmp_path / "c")
    fallback = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    with ckptkit.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "c", fallback_sharding=fallback)
    assert_same(restored, {"a": jax.device_put(jnp.ones(2), fallback)})


def test_empty_nodes_are_recorded_by_what_they_are(tmp_path: Path) -> None:
    class Named(NamedTuple):
        pass

    class History(list[Any]):
        pass

    tree = {"None": None, "Dict": {}, "List": [], "Tuple": (), "NamedTuple": Named(), "List too": History(), "w": 1}
    ckptkit.save(tmp_path / "c", tree)
    recorded = json.loads((tmp_path / "c" / "_METADATA").read_bytes())["tree_metadata"]
    words = {entry["key_metadata"][0]["key"]: entry["value_metadata"]["value_type"] for entry in recorded.values()}
    assert words == {name: name.removesuffix(" too") for name in tree if name != "w"} | {"w": "scalar"}


def test_a_save_keeps_no_container_of_the_tree_alive(tmp_path: Path) -> None:
    class Large:
        pass

    large = Large()
    alive = weakref.ref(large)
    tree: Any = {"list": [], "dict": {}, "w": np.ones(3)}
    ckptkit.save(tmp_path / "c", tree)
    tree["list"].append(large)
    tree["dict"]["large"] = large
    del large, tree
    gc.collect()
    assert alive() is None


def test_none_in_the_target_leaves_a_leaf_unread(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.ones(2), "b": np.ones(3)})
    assert_same(ckptkit.restore(tmp_path / "c", {"a": None, "b": np.empty(3)}), {"a": None, "b": np.ones(3)})


def test_placeholders_and_partial_restore_leave_leaves_out(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.ones(2), "b": np.ones(3)})
    restored = ckptkit.restore(tmp_path / "c", args.PyTreeRestore({"a": ..., "b": 0}))
    assert_same(restored, {"a": ..., "b": np.ones(3)})
    assert_same(ckptkit.restore(tmp_path / "c", args.PyTreeRestore({"b": 0}, partial_restore=True)), {"b": np.ones(3)})


def test_restore_args_say_how_each_leaf_is_restored(tmp_path: Path, mesh: jax.sharding.Mesh) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.arange(8, dtype=np.float32), "b": np.ones(3), "c": np.ones(2)})
    spec = jax.sharding.PartitionSpec("x")
    restore_args = {
        "a": ckptkit.ArrayRestoreArgs(restore_type=jax.Array, mesh=mesh, mesh_axes=spec),
        "b": ckptkit.RestoreArgs(restore_type=np.ndarray, dtype=np.float16),
        "c": ckptkit.RestoreArgs(),
    }
    expected = {
        "a": jax.device_put(jnp.arange(8.0), jax.sharding.NamedSharding(mesh, spec)),
        "b": np.ones(3, np.float16),
        "c": np.ones(2),
    }
    assert_same(ckptkit.restore(tmp_path / "c", args.PyTreeRestore(restore_args=restore_args)), expected)
    assert_same(ckptkit.PyTreeCheckpointer().restore(tmp_path / "c", restore_args=restore_args), expected)


@pytest.mark.parametrize("base", ["", "memory://text/"])
def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = base + os.fsdecode(b"caf\xe9")
    for use in (lambda: ckptkit.save(path, TREE), lambda: ckptkit.restore(path), lambda: ckptkit.verify(path)):
        with pytest.raises(errors.ArgsError, match=r"'.*caf\\udce9' is not UTF-8"):
            use()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_relative_path_in_a_directory_that_is_not_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = os.path.join(tmp_path, os.fsdecode(b"caf\xe9"))
    os.mkdir(directory)
    monkeypatch.chdir(directory)
    with pytest.raises(errors.ArgsError, match="is not UTF-8"):
        ckptkit.save("c", TREE)
    assert os.listdir(directory) == []


def test_a_tree_too_deep_to_be_restored_is_refused(tmp_path: Path) -> None:
    tree = functools.reduce(lambda below, _: [below], range(901), np.ones(2))
    with pytest.raises(errors.TreeError, match=r"below 901 keys \(0.0.0 ...\)"):
        ckptkit.save(tmp_path / "c", tree)
    assert os.listdir(tmp_path) == []


def test_large_arrays_are_cut_into_chunks_and_come_back(tmp_path: Path, mesh: jax.sharding.Mesh) -> None:
    big = np.arange(12_000_001, dtype=np.float32)
    wide = np.arange(9_000_000, dtype=np.float64).reshape(3, 3_000_000)
    sharded = jax.device_put(
        big[:12_000_000].reshape(4000, 3000), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    )
    tree = {"big": big, "wide": wide, "sharded": sharded, "fortran": np.asfortranarray(wide[:, :1000])}
    ckptkit.save(tmp_path / "c", tree)
    other = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("y", "x"), None))
    target = {**abstract(tree), "sharded": jax.ShapeDtypeStruct((4000, 3000), np.float32, sharding=other)}
    restored = ckptkit.restore(tmp_path / "c", target)
    for name in ("big", "wide", "fortran"):
        np.testing.assert_array_equal(restored[name], tree[name])
    assert_same(restored["sharded"], jax.device_put(sharded, other))


def test_custom_metadata_and_leaf_metadata_are_returned(tmp_path: Path) -> None:
    with ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"a": np.ones((2, 3)), "n": 1}, custom_metadata={"epoch": 3})
        checkpointer.wait_until_finished()
        metadata = checkpointer.metadata(tmp_path / "c")
    assert metadata.custom_metadata == {"epoch": 3}
    assert metadata.item_handlers == ckptkit.StandardCheckpointHandler.typestr()
    assert (metadata.item_metadata["a"].shape, metadata.item_metadata["a"].dtype) == ((2, 3), np.float64)
    assert metadata.init_timestamp_nsecs < metadata.commit_timestamp_nsecs


def test_custom_metadata_that_json_cannot_hold_is_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="custom_metadata"), ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", TREE, custom_metadata={"a": {1, 2}})


def test_a_closed_checkpointer_says_so(tmp_path: Path) -> None:
    checkpointer = ckptkit.Checkpointer()
    checkpointer.close()
    with pytest.raises(errors.ClosedError, match="closed"):
        checkpointer.restore(tmp_path)


@pytest.mark.parametrize("name", ["a/b", "a b", "50%", "größe", "..", "\0", "x" * 300, ""])
def test_every_key_is_stored_unchanged(tmp_path: Path, name: str) -> None:
    tree = {name: np.arange(3), "other": {name: jnp.ones(2)}}
    ckptkit.save(tmp_path / "c", tree)
    assert_same(ckptkit.restore(tmp_path / "c"), tree)


def test_unreadable_directories_give_one_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError, match="file"):
        ckptkit.save(tmp_path / "file" / "c", TREE)


def test_permission_bits_are_set(tmp_path: Path) -> None:
    options = ckptkit.options.FileOptions(path_permission_mode=0o750)
    ckptkit.Checkpointer(file_options=options).save(tmp_path / "c", args.StandardSave(TREE))
    assert {oct(d.stat().st_mode & 0o777) for d in [tmp_path / "c", tmp_path / "c" / "d"]} == {"0o750"}


def test_bits_that_a_value_does_not_use_are_not_stored(tmp_path: Path) -> None:
    tree = {
        "bool": np.array([0, 1, 2, 255], np.uint8).view(bool),
        "int4": np.array([0x0F, 0xFF, 0x10], np.uint8).view(ml_dtypes.int4),
    }
    ckptkit.save(tmp_path / "c", tree)
    restored = ckptkit.restore(tmp_path / "c")
    np.testing.assert_array_equal(restored["bool"], [False, True, True, True])
    np.testing.assert_array_equal(restored["int4"].astype(int), tree["int4"].astype(int))


def test_keys_that_compare_equal_keep_their_own_names(tmp_path: Path) -> None:
    for name, key in (("int", 1), ("bool", True)):
        ckptkit.save(tmp_path / name, {key: np.ones(2)})
        assert list(ckptkit.restore(tmp_path / name)) == [str(key)]


@pytest.mark.parametrize("empty", [{}, ()])
def test_an_empty_node_in_the_target_where_a_leaf_is_stored_does_not_fit(tmp_path: Path, empty: Any) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.ones(2)})
    with pytest.raises(errors.TargetError, match="an empty"):
        ckptkit.restore(tmp_path / "c", {"a": empty})


class _Raises:
    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("no data")


def test_leaves_and_nodes_that_raise_are_named_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(errors.TreeError, match=r"2 of 2 leaves[\s\S]*\('a',\).*no data[\s\S]*\('b',\)"):
        ckptkit.save(tmp_path / "c", {"a": _Raises(), "b": "text"})


def test_a_name_for_unfinished_saves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgsError, match="unfinished saves"):
        ckptkit.save(tmp_path / "c.orbax-checkpoint-tmp", TREE)


def test_metadata_waits_for_a_save_in_flight(tmp_path: Path) -> None:
    with ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", state=TREE)
        assert checkpointer.metadata(tmp_path / "c").item_metadata["w"].shape == (2, 3)


def test_one_word_opens_a_checkpoint_on_whatever_devices_are_here(tmp_path: Path) -> None:
    tree = {"a": jnp.arange(4.0), "k": jax.random.key(3), "n": np.ones(2), "s": 7}
    ckptkit.save(tmp_path / "c", tree)
    _with_devices_of_another_machine(tmp_path / "c")
    with pytest.raises(errors.TopologyError, match=r"devices='local'.*devices='numpy'"):
        ckptkit.restore(tmp_path / "c")
    assert_same(ckptkit.restore(tmp_path / "c", devices="local"), tree)
    host = {**tree, "a": np.arange(4, dtype=np.float32), "k": np.asarray(jax.random.key_data(tree["k"]))}
    assert_same(ckptkit.restore(tmp_path / "c", devices="numpy"), host)
    target = {**tree, "a": jax.ShapeDtypeStruct((4,), np.float16)}
    assert_same(ckptkit.restore(tmp_path / "c", target, devices="numpy"), {**tree, "a": np.arange(4, dtype=np.float16)})
    with pytest.raises(errors.ArgsError, match="one of local, numpy or None"):
        ckptkit.restore(tmp_path / "c", devices="gpu")


class _Color(str, enum.Enum):  # noqa: UP042 - whose str() is not its value
    RED = "red"


class _CaseInsensitive(str):
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and self.lower() == other.lower()

    def __hash__(self) -> int:
        return hash(self.lower())


@pytest.mark.parametrize("texts", [(_Color.RED, "red"), ("red", _Color.RED), (_CaseInsensitive("a"), _CaseInsensitive("A"))])
def test_texts_that_are_equal_and_not_the_same_stay_what_they_are(tmp_path: Path, texts: tuple[str, str]) -> None:
    with ckptkit.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", dict(zip("ab", texts, strict=True)))
        assert list(checkpointer.restore(tmp_path / "c").values()) == list(map(str, texts))


def test_arrays_of_keys_keep_their_own_shardings(tmp_path: Path, mesh: jax.sharding.Mesh) -> None:
    keys = jax.random.split(jax.random.key(2), 8)
    specs = [jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()]
    placed = [jax.device_put(keys, jax.sharding.NamedSharding(mesh, spec)) for spec in specs]
    tree = {f"k{i}": placed[i % 2] for i in range(12)}
    ckptkit.save(tmp_path / "c", tree)
    restored = ckptkit.restore(tmp_path / "c")
    for name, key in tree.items():
        assert restored[name].sharding.is_equivalent_to(key.sharding, 1), name
    assert_same(restored, tree)
