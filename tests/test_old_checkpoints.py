"""Checkpoints that older releases of Orbax wrote: kept in data/old_checkpoints, with the script that had them written."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint.msgpack_utils as orbax_msgpack
import pytest

import ckptkit
from ckptkit import args, choosing, errors
from ckptkit.handlers import ArrayCheckpointHandler
from ckptkit.location import FileLocation

ARCHIVES = {path.stem: path for path in sorted((Path(__file__).parent / "data" / "old_checkpoints").glob("*.zip"))}


def _written(archive: Path) -> dict[str, Any]:
    with zipfile.ZipFile(archive) as files:
        written: dict[str, Any] = json.loads(files.read("expected.json"))["written"]
        return written


EXPECTED = {(release, kind): tree for release, path in ARCHIVES.items() for kind, tree in _written(path).items()}
COMPOSITES = ("composite", "manager_", "v1_")
TREES = [case for case in EXPECTED if case[1].startswith(("pytree_", "standard"))]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kept checkpoints, as `<release>/<kind>`."""
    folder = tmp_path_factory.mktemp("old")
    for release, archive in ARCHIVES.items():
        with zipfile.ZipFile(archive) as files:
            files.extractall(folder / release)
    return folder


@pytest.fixture
def copied(kept: Path, tmp_path: Path) -> Any:
    """A copy of a kept checkpoint that a test may damage."""
    return lambda release, kind: shutil.copytree(kept / release / kind, tmp_path / kind)


def _value(described: dict[str, Any]) -> Any:
    """What was saved, from its description."""
    match described:
        case {"type": "dict", "items": items}:
            return {name: _value(item) for name, item in items.items()}
        case {"type": "list", "items": items}:
            return [_value(item) for item in items]
        case {"type": "plain", "value": value}:
            return value
    dtype = np.dtype(getattr(ml_dtypes, described["dtype"], described["dtype"]))
    array = np.array(described["values"]).astype(dtype).reshape(described["shape"])
    return jnp.asarray(array) if described["type"] == "jax.Array" else array[()] if described["type"] == "scalar" else array


def _expected(release: str, kind: str) -> Any:
    return _value(EXPECTED[release, kind])


def _types_recorded(directory: Path) -> bool:
    """Whether the checkpoint says which arrays were numpy's, which jax's and which mere numbers."""
    return (directory / "_METADATA").exists()


def _assert_equal(found: Any, expected: Any, *, typed: bool, where: str = "") -> None:
    """The same containers and values; the same types of leaves too where the checkpoint records them."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            _assert_equal(found[name], expected[name], typed=typed, where=f"{where}[{name!r}]")
    elif isinstance(expected, list):
        assert (type(found), len(found)) == (list, len(expected)), (where, found)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            _assert_equal(a, b, typed=typed, where=f"{where}[{i}]")
    elif isinstance(expected, jax.Array | np.ndarray):
        assert isinstance(found, jax.Array if typed and isinstance(expected, jax.Array) else np.ndarray), (where, found)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (where, found)
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes(), (where, found)
    else:
        assert found == expected, where
        kinds = {type(expected), type(expected.item())} if isinstance(expected, np.generic) else {type(expected)}
        assert type(found) in kinds or not typed, (where, found)


def _target(expected: Any) -> Any:
    """A target that asks for every leaf as it was saved."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[3])

    def leaf(value: Any) -> Any:
        if isinstance(value, jax.Array):
            return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=device)
        return np.zeros_like(value) if isinstance(value, np.ndarray) else value if value is None else type(value)()

    return jax.tree.map(leaf, expected)


def test_checkpoints_of_every_minor_release_are_kept() -> None:
    releases = {release.rsplit(".", 1)[0] for release in ARCHIVES}
    assert releases == {f"0.{minor}" for minor in range(2, 13)}


@pytest.mark.parametrize(("release", "kind"), TREES)
def test_a_tree_comes_back_value_for_value(kept: Path, release: str, kind: str) -> None:
    directory = kept / release / kind
    found = ckptkit.restore(directory)
    _assert_equal(found, _expected(release, kind), typed=_types_recorded(directory))


@pytest.mark.parametrize(("release", "kind"), TREES)
def test_a_tree_comes_back_as_its_target_wants_it(kept: Path, release: str, kind: str) -> None:
    expected = _expected(release, kind)
    found = ckptkit.StandardCheckpointer().restore(kept / release / kind, _target(expected))
    _assert_equal(found, expected, typed=True)
    devices = {device for leaf in jax.tree.leaves(found) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    assert devices <= {jax.devices()[3]}


@pytest.mark.parametrize(("release", "kind"), [case for case in EXPECTED if case[1].startswith("array")])
def test_an_array_comes_back_without_its_handler(kept: Path, release: str, kind: str) -> None:
    found = ckptkit.Checkpointer().restore(kept / release / kind, args.PyTreeRestore())
    (array,) = found.values()
    np.testing.assert_array_equal(array, _expected(release, kind), strict=True)


@pytest.mark.parametrize("release", [release for release, kind in EXPECTED if kind == "named_array_aggregate"])
def test_aggregate_files_of_other_names_come_back(kept: Path, release: str) -> None:
    array = ckptkit.Checkpointer(ArrayCheckpointHandler("weights")).restore(kept / release / "named_array_aggregate")
    np.testing.assert_array_equal(array, _expected(release, "named_array_aggregate"), strict=True)
    handler = ckptkit.PyTreeCheckpointHandler(aggregate_filename="leaves")
    tree = ckptkit.Checkpointer(handler).restore(kept / release / "named_pytree_aggregate")
    _assert_equal(tree, _expected(release, "named_pytree_aggregate"), typed=False)


@pytest.mark.parametrize("release", ARCHIVES)
def test_an_array_comes_back_to_its_handler(kept: Path, release: str) -> None:
    found = ckptkit.Checkpointer(ArrayCheckpointHandler()).restore(kept / release / "array")
    np.testing.assert_array_equal(found, _expected(release, "array"))
    assert found.dtype == np.float32


@pytest.mark.parametrize("release", [release for release, kind in EXPECTED if kind == "jax_random_key"])
def test_random_keys_come_back(kept: Path, release: str) -> None:
    checkpointer = ckptkit.Checkpointer()
    raw = checkpointer.restore(kept / release / "jax_random_key", args.JaxRandomKeyRestore())
    typed = checkpointer.restore(kept / release / "jax_random_key_typed", args.JaxRandomKeyRestore())
    state = checkpointer.restore(kept / release / "numpy_random_key", args.NumpyRandomKeyRestore())
    np.testing.assert_array_equal(raw, jax.random.PRNGKey(7))
    np.testing.assert_array_equal(jax.random.key_data(typed), jax.random.key_data(jax.random.key(7)))
    assert typed.dtype == jax.random.key(7).dtype
    np.testing.assert_equal(state, np.random.RandomState(7).get_state())


@pytest.mark.parametrize(("release", "kind"), TREES)
def test_the_leaves_of_a_tree_are_described(kept: Path, release: str, kind: str) -> None:
    described = ckptkit.Checkpointer().metadata(kept / release / kind).item_metadata.tree
    expected = _expected(release, kind)
    assert jax.tree.structure(described) == jax.tree.structure(expected)
    for found, saved in zip(jax.tree.leaves(described), jax.tree.leaves(expected), strict=True):
        assert getattr(found, "shape", ()) == np.shape(saved)


@pytest.mark.parametrize("release", ARCHIVES)
def test_json_comes_back(kept: Path, release: str) -> None:
    assert ckptkit.restore(kept / release / "json_file") == _expected(release, "json_file")


def _step(kept: Path, release: str, kind: str) -> Path:
    return kept / release / kind / "3" if kind.startswith("manager_") else kept / release / kind


def _items(kept: Path, release: str, kind: str) -> tuple[Path, dict[str, Any]]:
    """The directory of a composite, and what its items are."""
    directory, expected = _step(kept, release, kind), _expected(release, kind)
    if kind == "v1_pytree":  # the one item has had two names
        return directory, {name: expected for name in ("state", "pytree") if (directory / name).exists()}
    return directory, expected


@pytest.mark.parametrize(("release", "kind"), [case for case in EXPECTED if case[1].startswith(COMPOSITES)])
def test_a_composite_comes_back_item_by_item(kept: Path, release: str, kind: str) -> None:
    directory, expected = _items(kept, release, kind)
    found = ckptkit.restore(directory)
    assert dict(found).keys() == expected.keys()
    for name, item in expected.items():
        _assert_equal(found[name], item, typed=_types_recorded(directory / name))


@pytest.mark.parametrize(("release", "kind"), [case for case in EXPECTED if case[1].startswith(COMPOSITES)])
def test_one_item_of_a_composite_comes_back_as_its_target_wants_it(kept: Path, release: str, kind: str) -> None:
    directory, expected = _items(kept, release, kind)
    name = "default" if "default" in expected else "pytree" if "pytree" in expected else "state"
    found = ckptkit.Checkpointer().restore(directory, args.Composite(**{name: args.StandardRestore(_target(expected[name]))}))
    assert list(found) == [name]
    _assert_equal(found[name], expected[name], typed=True)


@pytest.mark.parametrize("release", ["0.4.8", "0.5.23", "0.6.4", "0.10.3", "0.11.25", "0.12.8"])
@pytest.mark.parametrize("kind", ["pytree_sharded_zarr", "pytree_sharded_ocdbt"])
def test_arrays_come_back_on_the_sharding_they_were_saved_with(kept: Path, release: str, kind: str) -> None:
    found = ckptkit.restore(kept / release / kind)
    specs = {name: tuple(leaf.sharding.spec) for name, leaf in found.items()}
    assert specs == {"xy": ("x", "y"), "both": (("x", "y"), None), "y": (None, "y"), "replicated": ()}
    assert all(len(leaf.sharding.device_set) == 8 for leaf in found.values())


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "_sharding", "array_metadatas", "commit_success.txt"])
@pytest.mark.parametrize("kind", ["pytree_ocdbt", "pytree_zarr"])
def test_what_is_optional_may_be_missing(copied: Any, kind: str, name: str) -> None:
    directory = copied("0.12.8", kind)
    _remove(directory / name)
    _assert_equal(ckptkit.restore(directory), _expected("0.12.8", kind), typed=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


@pytest.mark.parametrize("field", ["item_handlers", "metrics", "performance_metrics", "init_timestamp_nsecs", "custom_metadata"])
def test_any_field_of_the_checkpoint_metadata_may_be_missing(copied: Any, field: str) -> None:
    directory = copied("0.12.8", "composite")
    document = json.loads((directory / "_CHECKPOINT_METADATA").read_text())
    del document[field]
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(document))
    assert dict(ckptkit.restore(directory)).keys() == {"state", "more", "data"}


@pytest.mark.parametrize(
    ("release", "kind", "gone", "named"),
    [
        ("0.12.8", "pytree_ocdbt", "_METADATA", "_METADATA"),
        ("0.12.8", "pytree_ocdbt", "manifest.ocdbt", r"manifest\.ocdbt"),
        ("0.12.8", "pytree_ocdbt", "d", "/d/"),
        ("0.12.8", "pytree_zarr", "params.w", r"params\.w"),
        ("0.4.8", "pytree_ocdbt", "manifest.ocdbt", r"manifest\.ocdbt"),
        ("0.4.8", "pytree_aggregate", "checkpoint", "'checkpoint'"),
        ("0.4.8", "pytree_partly_aggregate_ocdbt", "checkpoint", "'checkpoint'"),
        ("0.2.7", "pytree_ocdbt", "params.w", r"params\.w"),
    ],
)
def test_what_is_required_is_named_where_it_is_missing(copied: Any, release: str, kind: str, gone: str, named: str) -> None:
    directory = copied(release, kind)
    _remove(directory / gone)
    with pytest.raises(errors.NotFoundError, match=named):
        ckptkit.restore(directory)


def test_directories_without_metadata_become_nested_dicts(copied: Any) -> None:
    directory = copied("0.12.8", "pytree_zarr")
    _remove(directory / "_METADATA")
    found = ckptkit.restore(directory)
    saved = _expected("0.12.8", "pytree_zarr")
    assert found.keys() == {"lr", "nested", "numpy", "opt", "params", "step"}
    np.testing.assert_array_equal(found["params"]["w"], np.asarray(saved["params"]["w"]), strict=True)
    np.testing.assert_array_equal(found["opt"]["1"]["nu"], np.asarray(saved["opt"][1]["nu"]), strict=True)


def test_directories_without_metadata_take_the_structure_of_a_target(copied: Any) -> None:
    directory = copied("0.2.7", "pytree_list")
    _remove(directory / "checkpoint")
    expected = _expected("0.2.7", "pytree_list")
    _assert_equal(ckptkit.StandardCheckpointer().restore(directory, _target(expected)), expected, typed=True)


def test_a_checkpoint_of_ckptkit_without_its_metadata_is_damaged(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"w": np.arange(3.0)})
    (tmp_path / "c" / "_METADATA").unlink()
    with pytest.raises(errors.NotFoundError, match="_METADATA"):
        ckptkit.restore(tmp_path / "c")


def test_the_folders_of_a_database_are_no_items(copied: Any) -> None:
    directory = copied("0.12.8", "pytree_ocdbt")
    for name in ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"):
        _remove(directory / name)
    with pytest.raises(errors.FormatError, match="no checkpoint"):
        ckptkit.restore(directory)


@pytest.mark.parametrize("kind", ["pytree_aggregate", "pytree_partly_aggregate_ocdbt", "pytree_default"])
def test_a_damaged_aggregate_file_is_an_error(copied: Any, kind: str) -> None:
    directory = copied("0.2.7", kind)
    (directory / "checkpoint").write_bytes((directory / "checkpoint").read_bytes()[:-1])
    with pytest.raises(errors.FormatError, match="checkpoint: "):
        ckptkit.restore(directory)


def test_items_without_any_metadata_are_no_arrays_of_one_tree(kept: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(kept / "0.2.7" / "array", tmp_path / "step" / name)
    found = ckptkit.restore(tmp_path / "step")
    assert sorted(found) == ["one", "two"]
    assert list(found["one"]) == ["checkpoint"]


@pytest.mark.parametrize("release", ["0.2.7", "0.4.8", "0.10.3"])
def test_restore_args_of_a_tree_for_a_composite_are_told_how_to_name_the_item(kept: Path, release: str) -> None:
    with pytest.raises(errors.CheckpointError, match=r"Composite\(default="):
        ckptkit.StandardCheckpointer().restore(kept / release / "manager_default_item" / "3")


@pytest.mark.parametrize(("release", "kind"), EXPECTED)
def test_force_replaces_a_checkpoint_with_a_mark_and_no_directory_of_steps(kept: Path, release: str, kind: str) -> None:
    """Items and aggregate files of releases before 0.5 could as well be a run's steps, or a file of TensorFlow's."""
    directory = _step(kept, release, kind)
    marks = {"_CHECKPOINT_METADATA", "_METADATA", "_sharding", "manifest.ocdbt", "array_metadatas"}
    if marks.isdisjoint([path.name for path in directory.iterdir()]):
        assert tuple(map(int, release.split("."))) < (0, 5)
        with pytest.raises(errors.ExistsError, match="no checkpoint"):
            choosing.check_replaceable(FileLocation(directory))
    else:
        choosing.check_replaceable(FileLocation(directory))
    if kind.startswith("manager_"):
        with pytest.raises(errors.ExistsError, match="no checkpoint"):
            choosing.check_replaceable(FileLocation(kept / release / kind))


@pytest.mark.parametrize("release", ["0.2.7", "0.12.8"])
def test_the_directory_of_all_steps_is_no_checkpoint(kept: Path, release: str) -> None:
    with pytest.raises(errors.FormatError, match="no checkpoint"):
        ckptkit.restore(kept / release / "manager_default_item")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "", "\0"])
def test_a_hostile_reference_leads_nowhere(copied: Any, name: str) -> None:
    directory = copied("0.2.7", "pytree_zarr")
    (directory / "checkpoint").write_bytes(msgpack.packb({"a": f"PLACEHOLDER://{name}"}))
    with pytest.raises(errors.NotFoundError, match="no array"):
        ckptkit.restore(directory)


def test_a_leaf_of_an_aggregate_file_that_is_no_leaf_is_an_error(copied: Any) -> None:
    directory = copied("0.2.7", "pytree_aggregate")
    (directory / "checkpoint").write_bytes(msgpack.packb({"a": {"b": b"bytes"}}))
    with pytest.raises(errors.FormatError, match=r"\('a', 'b'\)"):
        ckptkit.restore(directory)


def test_names_that_differ_only_in_where_their_dots_are_are_told_apart(copied: Any) -> None:
    directory = copied("0.2.7", "pytree_aggregate")
    (directory / "checkpoint").write_bytes(msgpack.packb({"a.b": 1, "a": {"b": 2}}))
    assert ckptkit.restore(directory) == {"a.b": 1, "a": {"b": 2}}


def test_the_older_spelling_of_a_reference_is_read(copied: Any) -> None:
    directory = copied("0.2.7", "pytree_zarr")
    (directory / "checkpoint").write_bytes(msgpack.packb({"renamed": "AGGREGATED://params.w"}))
    (array,) = ckptkit.restore(directory).values()
    np.testing.assert_array_equal(array, np.asarray(_expected("0.2.7", "pytree_zarr")["params"]["w"]), strict=True)


def test_an_array_in_pieces_is_restored(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_msgpack, "MAX_CHUNK_SIZE", 16)
    directory = copied("0.2.7", "pytree_aggregate")
    array = np.arange(30, dtype=np.float32).reshape(5, 6)
    (directory / "checkpoint").write_bytes(orbax_msgpack.msgpack_serialize({"a": array}))
    np.testing.assert_array_equal(ckptkit.restore(directory)["a"], array, strict=True)
    target = {"a": jax.ShapeDtypeStruct((5, 6), jnp.bfloat16)}
    restored = ckptkit.StandardCheckpointer().restore(directory, target)["a"]
    assert restored.dtype == jnp.bfloat16
