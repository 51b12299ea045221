"""What comes with ckptkit keeps the promises of every type handler."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from ckptkit.leaves.jax_array import JaxArrayHandler
from ckptkit.leaves.numpy import NumpyHandler
from ckptkit.leaves.scalar import ScalarHandler
from ckptkit.leaves.string import StringHandler
from ckptkit.testing import TypeHandlerTests, abstract
from ckptkit.testing.strategies import JAX_DTYPES, NUMPY_DTYPES, mesh, values

SHAPES = [(), (8,), (4, 2), (0, 3), (8, 2, 3), (5, 1)]


def shardings(shape):
    """What can hold an array of the shape: one device, a mesh in each way that divides it."""
    found = [SingleDeviceSharding(jax.devices()[3]), NamedSharding(mesh(), PartitionSpec())]
    if shape and shape[0] % 4 == 0:
        found.append(NamedSharding(mesh(), PartitionSpec("data")))
    if shape and shape[-1] % 2 == 0:
        found.append(NamedSharding(mesh(), PartitionSpec(*[None] * (len(shape) - 1), "model")))
    return found


class TestJaxArray(TypeHandlerTests):
    leaf_types = jax.Array
    many = 2_000

    @pytest.fixture
    def handler(self):
        return JaxArrayHandler()

    @pytest.fixture
    def make_leaf(self, devices):
        def make(seed):
            shape = SHAPES[seed % len(SHAPES)]
            places = shardings(shape)
            return jax.device_put(values(shape, JAX_DTYPES[seed % len(JAX_DTYPES)], seed), places[seed % len(places)])

        return make

    def spoil(self, leaf):
        leaf.delete()

    def targets(self, leaf):
        moved = [jax.device_put(leaf, sharding) for sharding in shardings(leaf.shape)]
        return [(leaf, leaf), (np.asarray(leaf), np.asarray(leaf)), *((abstract(array), array) for array in moved)]


@pytest.mark.slow
class TestManyJaxArrays(TestJaxArray):
    many = 10_000


class TestTypedKeys(TypeHandlerTests):
    leaf_types = jax.Array
    many = 1_000  # jax takes a millisecond for each

    @pytest.fixture
    def handler(self):
        return JaxArrayHandler()

    @pytest.fixture
    def make_leaf(self, devices):
        def make(seed):
            key = jax.random.key(seed, impl=["threefry2x32", "rbg", "unsafe_rbg"][seed % 3])
            return key if seed % 2 else jax.random.split(key, 4)

        return make

    def spoil(self, leaf):
        leaf.delete()


class TestNumpy(TypeHandlerTests):
    leaf_types = np.ndarray

    @pytest.fixture
    def handler(self):
        return NumpyHandler()

    @pytest.fixture
    def make_leaf(self):
        return lambda seed: values(SHAPES[seed % len(SHAPES)], NUMPY_DTYPES[seed % len(NUMPY_DTYPES)], seed)

    def spoil(self, leaf):
        leaf[...] = 1 - leaf

    def targets(self, leaf):
        return [(leaf, leaf), (np.zeros_like(leaf), leaf)]


class TestScalars(TypeHandlerTests):
    leaf_types = (int, float, bool, complex)

    @pytest.fixture
    def handler(self):
        return ScalarHandler()

    @pytest.fixture
    def make_leaf(self):
        return lambda seed: [seed, -seed * 2**40, seed / 7, seed % 3 == 0, complex(seed, -1)][seed % 5]

    def targets(self, leaf):
        return [(leaf, leaf), (type(leaf)(), leaf), (np.zeros((), np.asarray(leaf).dtype), np.asarray(leaf))]


class TestStrings(TypeHandlerTests):
    leaf_types = str

    @pytest.fixture
    def handler(self):
        return StringHandler()

    @pytest.fixture
    def make_leaf(self):
        return lambda seed: ["", "größe", "日本\n", "a\0b", "x" * 1000][seed % 5] + str(seed)

    def targets(self, leaf):
        return [(leaf, leaf), ("", leaf)]


class TestBFloat16(TestNumpy):
    """Every dtype alone, since a dtype of its own is what ml_dtypes brings."""

    @pytest.fixture
    def make_leaf(self):
        return lambda seed: values((seed % 5, 3), jnp.bfloat16, seed)
