"""The storage backends in a place that is no directory of this machine: the same promises."""

from __future__ import annotations

import itertools
import uuid

import pytest

from ckptkit.storage.ocdbt import OcdbtBackend
from ckptkit.storage.zarr import ZarrBackend
from ckptkit.testing import StorageBackendTests


class InMemory(StorageBackendTests):
    fresh_process = False

    @pytest.fixture
    def new_location(self, registry):
        place = registry.location(f"memory://{uuid.uuid4().hex}")
        numbers = itertools.count()
        yield lambda: place.child(str(next(numbers)))
        place.delete()


class TestOcdbtInMemory(InMemory):
    @pytest.fixture
    def backend(self):
        return OcdbtBackend()


class TestZarrInMemory(InMemory):
    many = 1000

    @pytest.fixture
    def backend(self):
        return ZarrBackend()
