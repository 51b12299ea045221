"""What every test shares: eight CPU devices, so that sharding is tested everywhere, and registries of its own."""

from __future__ import annotations

import hypothesis
import pytest

pytest_plugins = ["ckptkit.testing.fixtures"]

# Saving takes milliseconds to seconds depending on the disk, so no single example is held to a deadline. The same
# examples are drawn in every run: a failure that a change did not cause would stop that change. None is made smaller, for which
# the suites that are tried on what is broken would take half a minute: `pytest --hypothesis-profile=shrink` does that.
hypothesis.settings.register_profile("shrink", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.register_profile("ckptkit", hypothesis.settings.get_profile("shrink"), phases=[hypothesis.Phase.generate])


def pytest_configure(config):
    hypothesis.settings.load_profile("ckptkit")  # now, so that it holds whichever suites of plugins have loaded one of their own


@pytest.fixture
def mesh(devices):
    """The eight devices as 4 x 2, axes 'x' and 'y'."""
    import jax

    return jax.make_mesh((4, 2), ("x", "y"))
