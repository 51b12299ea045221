"""What comes with ckptkit keeps the promises of every storage backend."""

from __future__ import annotations

import pytest

from ckptkit.storage.ocdbt import OcdbtBackend
from ckptkit.storage.zarr import ZarrBackend
from ckptkit.testing import StorageBackendTests


class TestOcdbt(StorageBackendTests):
    @pytest.fixture
    def backend(self):
        return OcdbtBackend()


class TestZarr(StorageBackendTests):
    many = 2_000  # each is a directory, which a disk makes in a millisecond and removes in another

    @pytest.fixture
    def backend(self):
        return ZarrBackend()


class _Zarr3:
    """Whichever version of zarr the handler asks for, version 3 is written."""

    def writer(self, location, arrays, options, job):
        from ckptkit.options import StorageOptions

        return super().writer(location, arrays, StorageOptions(use_zarr3=True), job)


class OcdbtZarr3(_Zarr3, OcdbtBackend):
    pass


class Zarr3(_Zarr3, ZarrBackend):
    pass


class TestOcdbtZarr3(StorageBackendTests):
    @pytest.fixture
    def backend(self):
        return OcdbtZarr3()


class TestZarr3(StorageBackendTests):
    many = 2_000

    @pytest.fixture
    def backend(self):
        return Zarr3()
