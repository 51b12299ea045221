"""Fixtures for tests of plugins: `pytest_plugins = ["ckptkit.testing.fixtures"]` in the topmost conftest.py.

Importing this module asks jax for eight CPU devices, so that sharding is tested on any machine; subprocesses of tests inherit
them. It must come before anything starts jax: `pytest -p ckptkit.testing.fixtures` comes before any conftest.py.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import jax

    from ckptkit.registry import Registry
    from ckptkit.storage import Location

__all__ = ["devices", "location", "new_location", "registry"]

DEVICE_COUNT = 8
_FLAG = "--xla_force_host_platform_device_count"

os.environ["JAX_PLATFORMS"] = "cpu"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}={DEVICE_COUNT}".strip()
if "jax" in sys.modules:  # it has read JAX_PLATFORMS already, XLA_FLAGS only once it starts
    sys.modules["jax"].config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session")
def devices() -> list[jax.Device]:
    """The eight CPU devices.

    Raises:
      pytest.UsageError: jax was started with others before this module was imported.
    """
    import jax  # noqa: PLC0415 - not before the environment says what it is to start with

    found = jax.devices()
    if [device.platform for device in found] != ["cpu"] * DEVICE_COUNT:
        raise pytest.UsageError(
            f"ckptkit.testing needs {DEVICE_COUNT} CPU devices, jax has {found}: it was started before ckptkit.testing.fixtures "
            "was imported. Name that in pytest_plugins of the topmost conftest.py, use jax in none at import, "
            f"run `pytest -p ckptkit.testing.fixtures`, or set XLA_FLAGS={_FLAG}={DEVICE_COUNT} JAX_PLATFORMS=cpu."
        )
    return found


@pytest.fixture
def registry(devices: list[jax.Device]) -> Registry:
    """A registry with what comes with ckptkit, and nothing that a plugin or another test registered."""
    from ckptkit import Registry  # noqa: PLC0415 - it imports jax

    return Registry.with_builtins()


@pytest.fixture
def new_location(tmp_path: Path, registry: Registry) -> Callable[[], Location]:
    """Makes empty directories: each call another one. Override it to try a backend in another place."""
    numbers = itertools.count()

    def make() -> Location:
        directory = tmp_path / f"place-{next(numbers)}" / "inside"
        directory.mkdir(parents=True)
        return registry.location(directory)

    return make


@pytest.fixture
def location(new_location: Callable[[], Location]) -> Location:
    """An empty directory of the test's own."""
    return new_location()
