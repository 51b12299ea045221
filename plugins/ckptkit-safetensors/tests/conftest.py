"""The fixtures of ckptkit's conformance suite: eight CPU devices among them, so that sharding is tested everywhere."""

from __future__ import annotations

import hypothesis
import pytest

# Imported rather than named in pytest_plugins, which pytest takes from the topmost conftest.py alone: this suite may be run with
# others. It comes before jax, since it says which devices jax starts with.
from ckptkit.testing.fixtures import devices, location, new_location, registry

__all__ = ["devices", "location", "mesh", "new_location", "registry"]

hypothesis.settings.register_profile("ckptkit-safetensors", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ckptkit-safetensors")


@pytest.fixture
def mesh(devices):
    """The eight devices as 4 x 2, axes 'x' and 'y'."""
    import jax

    return jax.make_mesh((4, 2), ("x", "y"))
