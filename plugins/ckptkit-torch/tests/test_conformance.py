"""The type handler keeps the promises of every type handler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ckptkit.testing import TypeHandlerTests, assert_same
from ckptkit_torch import TorchHandler

torch = pytest.importorskip("torch", reason="torch is not installed")

SHAPES = [(), (3,), (4, 6), (0, 3), (2, 3, 4), (1,)]
DTYPES = ["float32", "bfloat16", "int64", "bool", "float64", "uint8", "complex64", "float8_e4m3fn", "float16", "int32", "uint16"]


def tensor(seed):
    """Small numbers, as every dtype has them, in memory that every second one holds in another order."""
    shape, dtype = SHAPES[seed % len(SHAPES)], getattr(torch, DTYPES[seed % len(DTYPES)])
    values = np.random.default_rng(seed).integers(0, 8, shape[::-1] if seed % 2 else shape)
    made = torch.from_numpy(np.asarray(values)).to(dtype)
    return made.permute(*reversed(range(made.ndim))) if seed % 2 else made


def shown(leaf):
    """A tensor as what `assert_same` can compare, bit by bit."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    values = leaf.detach().contiguous().flatten().view(torch.uint8).tolist()
    return repr((type(leaf), leaf.dtype, leaf.shape, leaf.requires_grad, values))


class TestTensors(TypeHandlerTests):
    leaf_types = "torch.Tensor"

    @pytest.fixture
    def handler(self):
        return TorchHandler()

    @pytest.fixture
    def make_leaf(self):
        return tensor

    def assert_same(self, found, expected):
        assert_same(*[jax.tree.map(shown, tree) for tree in (found, expected)])

    def spoil(self, leaf):
        torch.empty(0, dtype=torch.uint8).set_(leaf.untyped_storage()).bitwise_not_()

    def targets(self, leaf):
        abstract = torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
        double = torch.empty(leaf.shape, dtype=torch.complex128)
        array = np.zeros(tuple(leaf.shape), np.complex64)
        on_device = jnp.zeros(tuple(leaf.shape), jnp.complex64)
        values = leaf.to(torch.complex64).numpy()
        return [
            (leaf, leaf),
            (abstract, leaf),
            (double, leaf.to(torch.complex128)),
            (array, np.ascontiguousarray(values).reshape(values.shape)),
            (on_device, jnp.asarray(values)),
        ]
