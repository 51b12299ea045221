"""What every test shares: eight CPU devices, so that sharding is tested everywhere, and registries of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# jax reads these when it starts, so they come before anything imports it; subprocesses of tests inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import hypothesis
import jax
import pytest

if TYPE_CHECKING:
    from ckptkit.registry import Registry

# Saving takes milliseconds to seconds depending on the disk, so no single example is held to a deadline. The same
# examples are drawn in every run: a failure that a change did not cause would stop that change.
hypothesis.settings.register_profile("ckptkit", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ckptkit")


@pytest.fixture
def registry() -> Registry:
    """A registry with the built-ins and nothing that another test registered."""
    from ckptkit.registry import Registry

    return Registry.with_builtins()


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    """The eight devices as 4 x 2, axes 'x' and 'y'."""
    return jax.make_mesh((4, 2), ("x", "y"))
