"""What every test shares: the fixtures of ckptkit's conformance suite, eight CPU devices among them."""

from __future__ import annotations

import hypothesis
import pytest

hypothesis.settings.register_profile("ckptkit-safetensors", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ckptkit-safetensors")


def pytest_configure(config):
    # Not by `pytest_plugins`, which pytest takes from the topmost conftest.py alone: this suite may be run with others.
    config.pluginmanager.import_plugin("ckptkit.testing.fixtures")


@pytest.fixture
def mesh(devices):
    """The eight devices as 4 x 2, axes 'x' and 'y'."""
    import jax

    return jax.make_mesh((4, 2), ("x", "y"))
