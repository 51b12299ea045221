"""The backend keeps the promises of every storage backend."""

import pytest

from ckptkit.options import StorageOptions
from ckptkit.testing import StorageBackendTests
from ckptkit_safetensors import SafetensorsBackend


class TestSafetensors(StorageBackendTests):
    @pytest.fixture
    def backend(self):
        return SafetensorsBackend()


class ManyFiles(SafetensorsBackend):
    """Almost every array in a file of its own."""

    def writer(self, location, arrays, options, job):
        return super().writer(location, arrays, StorageOptions(target_data_file_size=100), job)


class TestSeveralFiles(StorageBackendTests):
    many = 1000

    @pytest.fixture
    def backend(self):
        return ManyFiles()
