"""Eight CPU devices, so that sharding is tested everywhere, and the plugin loaded as a package that is installed."""

from __future__ import annotations

import os

# jax reads these when it starts, so they come before anything imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("ckptkit-safetensors", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ckptkit-safetensors")


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    """The eight devices as 4 x 2, axes 'x' and 'y'."""
    return jax.make_mesh((4, 2), ("x", "y"))
