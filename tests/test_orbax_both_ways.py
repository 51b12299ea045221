"""The real Orbax as the judge: it restores what ckptkit saved, and the other way round."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptkit
from ckptkit.testing import abstract, assert_same, strategies

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:orbax", "ignore::DeprecationWarning:orbax")
_paths = (Path(f"example{i}") for i in range(10**9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("both-ways")


def _saved(library: Any, folder: Path, tree: Any) -> Path:
    path = folder / next(_paths)
    with library.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def _restored(library: Any, path: Path, target: Any = None) -> Any:
    with library.StandardCheckpointer() as checkpointer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpointer.restore(path, target)


def _has_empty_array(tree: Any) -> bool:
    return any(getattr(leaf, "size", 1) == 0 for leaf in jax.tree.leaves(tree))


COUNTS = pytest.mark.parametrize("count", [15, pytest.param(60, marks=pytest.mark.slow)])


@COUNTS
def test_orbax_restores_what_ckptkit_saved(folder: Path, count: int) -> None:
    @given(tree=strategies.trees())
    @settings(max_examples=count)
    def examples(tree: Any) -> None:
        path = _saved(ckptkit, folder, tree)
        assert_same(_restored(ocp, path, abstract(tree)), tree)
        assert_same(_restored(ocp, path), _restored(ckptkit, path))

    examples()


@COUNTS
def test_ckptkit_restores_what_orbax_saved(folder: Path, count: int) -> None:
    @given(tree=strategies.trees().filter(lambda tree: not _has_empty_array(tree)))
    @settings(max_examples=count)
    def examples(tree: Any) -> None:
        path = _saved(ocp, folder, tree)
        assert_same(_restored(ckptkit, path, abstract(tree)), tree)
        assert_same(_restored(ckptkit, path), _restored(ocp, path))

    examples()


@COUNTS
def test_ckptkit_restores_what_ckptkit_saved(folder: Path, count: int) -> None:
    @given(tree=strategies.trees())
    @settings(max_examples=count)
    def examples(tree: Any) -> None:
        path = _saved(ckptkit, folder, tree)
        assert_same(_restored(ckptkit, path, abstract(tree)), tree)
        assert_same(_restored(ckptkit, path, tree), tree)

    examples()


def _train_state() -> TrainState:
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.chain(optax.clip(1.0), optax.adamw(1e-3)))


@pytest.mark.parametrize(("writer", "reader"), [(ckptkit, ocp), (ocp, ckptkit), (ckptkit, ckptkit)])
def test_a_flax_train_state_comes_back_with_its_classes(tmp_path: Path, writer: Any, reader: Any) -> None:
    state = _train_state()
    path = _saved(writer, tmp_path, state)
    restored = _restored(reader, path, jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(1e-2, momentum=0.9),
        optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
        optax.masked(optax.adam(1e-3), {"w": True, "b": False}),
        optax.multi_transform({"x": optax.adam(1e-3), "y": optax.set_to_zero()}, {"w": "x", "b": "y"}),
        optax.MultiSteps(optax.lamb(1e-3), 2),
    ],
    ids=["sgd", "adamw", "masked", "multi_transform", "MultiSteps"],
)
@pytest.mark.parametrize(("writer", "reader"), [(ckptkit, ocp), (ocp, ckptkit)])
def test_optax_states_come_back_with_their_classes(tmp_path: Path, optimizer: Any, writer: Any, reader: Any) -> None:
    state = getattr(optimizer, "gradient_transformation", lambda: optimizer)().init({"w": jnp.ones((4, 2)), "b": jnp.ones(2)})
    tree = {"opt": state}
    path = _saved(writer, tmp_path, tree)
    restored = _restored(reader, path, jax.tree.map(lambda leaf: leaf, tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


def test_orbax_v1_loads_what_ckptkit_saved(tmp_path: Path) -> None:
    from orbax.checkpoint.experimental import v1 as ocp_v1

    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [np.arange(3), 7]}
    path = _saved(ckptkit, tmp_path, tree)
    loaded = ocp_v1.load(path)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)


def test_ckptkit_restores_a_pytree_checkpoint_with_strings_and_zarr3_from_orbax(tmp_path: Path) -> None:
    tree = {"name": "run 7", "w": jnp.arange(6.0), "n": np.float32(2.5), "step": 3}
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)).save(tmp_path / "c", tree)
    restored = ckptkit.Checkpointer().restore(tmp_path / "c")
    expected = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(tmp_path / "c")
    assert_same(restored, expected)


def test_orbax_restores_strings_and_zarr3_from_ckptkit(tmp_path: Path) -> None:
    tree = {"name": "run 7", "a/b": {"c": "x"}, "w": jnp.arange(6.0), "n": np.float32(2.5), "step": 3}
    ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler(use_zarr3=True)).save(tmp_path / "c", tree)
    restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(tmp_path / "c")
    assert_same(restored, ckptkit.Checkpointer().restore(tmp_path / "c"))


@given(dtype=st.sampled_from(strategies.NUMPY_DTYPES), shape=st.sampled_from([(), (0,), (3, 0, 2), (5,), (2, 3)]))
def test_every_dtype_and_degenerate_shape_reaches_orbax(folder: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    tree = {"x": strategies.values(shape, dtype, 1)}
    assert_same(_restored(ocp, _saved(ckptkit, folder, tree)), tree)


@pytest.mark.parametrize("writer", [ckptkit, ocp])
def test_numpy_scalars_come_back_as_orbax_returns_them(tmp_path: Path, writer: Any) -> None:
    tree = {"f": np.float32(1.5), "d": np.float64(2.5), "i": np.int8(-3), "b": np.bool_(True), "c": np.complex64(1j)}
    path = _saved(writer, tmp_path, tree)
    assert_same(_restored(ckptkit, path), _restored(ocp, path))
    assert_same(_restored(ckptkit, path), jax.tree.map(np.asarray, tree))


def test_only_large_arrays_that_shrink_are_compressed_unless_told_otherwise(tmp_path):
    random = np.random.default_rng(0)
    tree = {
        "zeros": jnp.zeros((1024, 1024)),
        "one_hot": jnp.eye(1500, dtype=jnp.bfloat16),
        "floats": jnp.asarray(random.standard_normal((1024, 1024), dtype=np.float32)),
        "small": jnp.zeros(1000),
    }
    sizes = {}
    for compression in ("auto", "zstd", None):
        path = tmp_path / str(compression)
        with ckptkit.StandardCheckpointer(compression=compression) as checkpointer:
            checkpointer.save(path, tree)
        assert_same(ckptkit.restore(path, tree), tree)
        assert_same(ocp.StandardCheckpointer().restore(path, tree), tree)
        sizes[compression] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    data = {name: array.nbytes for name, array in tree.items()}
    assert sum(data.values()) < sizes[None]
    assert data["floats"] + data["small"] < sizes["auto"] < 1.05 * (data["floats"] + data["small"]) + 100_000
    assert sizes["zstd"] < sizes["auto"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Stateless:
    """A node without children."""


_RICH = ckptkit.options.PyTreeMetadataOptions(support_rich_types=True)


@pytest.mark.parametrize("options", [{}, {"pytree_metadata_options": _RICH}], ids=["plain", "rich"])
@pytest.mark.parametrize(
    ("tree", "bare"),
    [
        ({"opt": _Stateless()}, {"opt": None}),
        (_Stateless(), None),
        ([np.ones(1), _Stateless(), [_Stateless(), {}, 1]], [np.ones(1), None, [None, {}, 1]]),
    ],
)
def test_nodes_without_children_are_none_to_both(tmp_path: Path, tree: Any, bare: Any, options: dict[str, Any]) -> None:
    with ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
    for path in (tmp_path / "c", _saved(ocp, tmp_path, tree)):
        assert_same(_restored(ckptkit, path), bare)
        assert_same(_restored(ckptkit, path, tree), tree)
        assert_same(_restored(ocp, path, tree), tree)


def test_a_tree_of_600_levels_comes_back(tmp_path: Path) -> None:
    tree = functools.reduce(lambda below, _: [below], range(600), {"a": np.ones(2)})
    for library in (ckptkit, ocp):
        found = _restored(ckptkit, _saved(library, tmp_path, tree))
        assert jax.tree.structure(found) == jax.tree.structure(tree)


_BACKENDS = [{}, {"use_zarr3": True}, {"use_ocdbt": False}, {"use_ocdbt": False, "use_zarr3": True}]


def _on(shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    """Random floats on a mesh of 4 x 2 devices."""
    values = np.random.default_rng(7).random(shape, np.float32)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return jax.device_put(values, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))


@pytest.mark.parametrize("options", _BACKENDS)
def test_arrays_of_prime_lengths_are_cut_unevenly_and_come_back(tmp_path: Path, options: dict[str, bool]) -> None:
    tree = {
        "host": np.random.default_rng(3).random(100_003),
        "device": jnp.asarray(np.random.default_rng(4).random((211, 307), np.float32)),
        "everywhere": _on((100_003,)),
        "columns": _on((1009, 64), None, ("x", "y")),
        "both": _on((8 * 10_007, 3), ("x", "y")),
    }
    save_args = jax.tree.map(lambda _: ckptkit.SaveArgs(chunk_byte_size=16_000), tree)
    with ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(tmp_path / "c", tree, save_args=save_args)
    assert ckptkit.verify(tmp_path / "c").state == "whole"
    elsewhere = abstract({**tree, "columns": _on((1009, 64), None, "y"), "device": _on((211, 307))})
    for library in (ckptkit, ocp):
        assert_same(_restored(library, tmp_path / "c", abstract(tree)), tree)
        found = _restored(library, tmp_path / "c", elsewhere)
        assert found["columns"].sharding == elsewhere["columns"].sharding
        jax.tree.map(np.testing.assert_array_equal, found, tree)


def test_an_array_of_a_prime_length_above_32_mib_is_cut_into_two(tmp_path: Path) -> None:
    tree = {"a": np.random.default_rng(5).random(8_388_617, np.float32)}
    with ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
        checkpointer.wait_until_finished()
        assert checkpointer.metadata(tmp_path / "c").item_metadata["a"].storage.chunk_shape == (4_194_309,)
    for library in (ckptkit, ocp):
        assert_same(_restored(library, tmp_path / "c", tree), tree)
