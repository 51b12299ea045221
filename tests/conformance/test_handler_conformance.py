"""What comes with ckptkit keeps the promises of every checkpoint handler."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from ckptkit import args, errors, handlers
from ckptkit.testing import CheckpointHandlerTests
from ckptkit.testing.strategies import mesh, values


def tree(seed):
    sharding = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec("data"))
    return {
        "params": {"w": jax.device_put(values((8, 4), np.float32, seed), sharding), "b": values((3,), np.float64, seed)},
        "step": seed,
        "key": jax.random.key(seed),
    }


class TestStandard(CheckpointHandlerTests):
    @pytest.fixture
    def handler(self):
        return handlers.StandardCheckpointHandler()

    @pytest.fixture
    def make_item(self, devices):
        return tree

    @pytest.fixture
    def make_args(self):
        return args.StandardSave

    def spoil(self, item):
        item["params"]["w"].delete()
        item["params"]["b"][...] = -1


class TestPyTree(TestStandard):
    @pytest.fixture
    def handler(self):
        return handlers.PyTreeCheckpointHandler(storage="zarr", use_zarr3=True)

    @pytest.fixture
    def make_item(self, devices):
        return lambda seed: {**tree(seed), "text": f"run {seed}"}

    @pytest.fixture
    def make_args(self):
        return args.PyTreeSave


class TestPyTreeInto(TestPyTree):
    """With a target that names one leaf."""

    @pytest.fixture
    def handler(self):
        return handlers.PyTreeCheckpointHandler()

    @pytest.fixture
    def restore_args(self, make_item):
        return args.PyTreeRestore({"step": 0}, partial_restore=True)

    def assert_same(self, found, expected):
        super().assert_same(found["step"], expected["step"])


class TestArray(CheckpointHandlerTests):
    @pytest.fixture
    def handler(self):
        return handlers.ArrayCheckpointHandler()

    @pytest.fixture
    def make_item(self, devices):
        return lambda seed: values((8, 4), np.float32, seed)

    @pytest.fixture
    def make_args(self):
        return args.ArraySave

    def spoil(self, item):
        item[...] = -1


class TestJson(CheckpointHandlerTests):
    @pytest.fixture
    def handler(self):
        return handlers.JsonCheckpointHandler()

    @pytest.fixture
    def make_item(self):
        return lambda seed: {"seed": seed, "names": ["größe", None, True, 0.1 * seed]}

    @pytest.fixture
    def make_args(self):
        return args.JsonSave

    def spoil(self, item):
        item["names"].clear()


class TestJaxRandomKey(CheckpointHandlerTests):
    @pytest.fixture
    def handler(self):
        return handlers.JaxRandomKeyCheckpointHandler()

    @pytest.fixture
    def make_item(self, devices):
        return jax.random.key

    @pytest.fixture
    def make_args(self):
        return args.JaxRandomKeySave


class TestNumpyRandomKey(CheckpointHandlerTests):
    @pytest.fixture
    def handler(self):
        return handlers.NumpyRandomKeyCheckpointHandler()

    @pytest.fixture
    def make_item(self):
        return lambda seed: np.random.RandomState(seed).get_state(legacy=True)

    @pytest.fixture
    def make_args(self):
        return args.NumpyRandomKeySave


class TestComposite(CheckpointHandlerTests):
    @pytest.fixture
    def handler(self):
        return handlers.CompositeCheckpointHandler()

    @pytest.fixture
    def make_item(self):
        return lambda seed: {"seed": seed}

    @pytest.fixture
    def make_args(self):
        return lambda item: args.Composite(config=args.JsonSave(item), state=args.PyTreeSave({"a": item["seed"]}))

    def assert_same(self, found, expected):
        super().assert_same(dict(found), {"config": expected, "state": {"a": expected["seed"]}})

    def test_is_an_item_of_a_composite(self, case):
        with pytest.raises(errors.ArgsTypeError, match="a Composite holds no other"):
            super().test_is_an_item_of_a_composite(case)
