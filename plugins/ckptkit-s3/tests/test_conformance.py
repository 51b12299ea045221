"""Storage backends and handlers keep their promises where there are objects instead of files."""

from __future__ import annotations

import numpy as np
import pytest

from ckptkit import args, handlers
from ckptkit.testing import CheckpointHandlerTests, StorageBackendTests


@pytest.fixture(autouse=True)
def _endpoint(server, monkeypatch):
    """Another process finds the server too."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)


class TestOcdbt(StorageBackendTests):
    many = 2_000

    @pytest.fixture
    def backend(self, registry):
        return registry.storage("ocdbt")


@pytest.mark.slow
class TestZarr(StorageBackendTests):
    many = 500  # each is an object

    @pytest.fixture
    def backend(self, registry):
        return registry.storage("zarr")


@pytest.mark.slow
class TestJson(CheckpointHandlerTests):
    @pytest.fixture
    def handler(self):
        return handlers.JsonCheckpointHandler()

    @pytest.fixture
    def make_item(self):
        return lambda seed: {"seed": seed}

    @pytest.fixture
    def make_args(self):
        return args.JsonSave

    def spoil(self, item):
        item.clear()


@pytest.mark.slow
class TestPyTree(CheckpointHandlerTests):
    @pytest.fixture
    def handler(self):
        return handlers.PyTreeCheckpointHandler()

    @pytest.fixture
    def make_item(self):
        return lambda seed: {"w": np.arange(12.0) + seed, "name": f"run {seed}"}

    @pytest.fixture
    def make_args(self):
        return args.PyTreeSave

    def spoil(self, item):
        item["w"][...] = -1
