"""Conformance suites, fixtures and Hypothesis strategies for the authors of plugins. Needs `ckptkit[testing]`.

A suite is a class of pytest tests. Subclass it, say by fixtures what is under test, and run pytest:

    # tests/conftest.py
    pytest_plugins = ["ckptkit.testing.fixtures"]

    # tests/test_conformance.py
    import pytest
    from ckptkit.testing import CheckpointHandlerTests, StorageBackendTests, TypeHandlerTests

    class TestMyBackend(StorageBackendTests):
        @pytest.fixture
        def backend(self):
            return MyBackend()                                      # a StorageBackend

    class TestMyLeaf(TypeHandlerTests):
        leaf_types = MyLeaf                                         # as add_type_handler takes them

        @pytest.fixture
        def handler(self):
            return MyLeafHandler()                                  # a TypeHandler

        @pytest.fixture
        def make_leaf(self):
            return lambda seed: MyLeaf(seed)                        # another leaf for another seed

    class TestMyHandler(CheckpointHandlerTests):
        @pytest.fixture
        def handler(self):
            return MyHandler()                                      # a CheckpointHandler

        @pytest.fixture
        def make_item(self):
            return lambda seed: ["a line", str(seed)]               # what a restore gives back

        @pytest.fixture
        def make_args(self):
            return MySave                                           # item -> the args that save it

Each class says which of its fixtures and attributes a subclass may override besides; `new_location` of
`ckptkit.testing.fixtures` is where a backend is tried. A test that fails names the promise that was broken and where it is
documented. What a fresh process must find is found by entry point, so install the plugin (`pip install -e .`) before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ckptkit._lazy import lazy_names

_ASSERTING = ("_backends", "_checkpoints", "comparison", "handlers", "leaves", "storage")
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in _ASSERTING))  # so that a failure shows the values

if TYPE_CHECKING:
    from ckptkit.testing.comparison import abstract as abstract
    from ckptkit.testing.comparison import assert_same as assert_same
    from ckptkit.testing.handlers import CheckpointHandlerTests as CheckpointHandlerTests
    from ckptkit.testing.leaves import TypeHandlerTests as TypeHandlerTests
    from ckptkit.testing.storage import StorageBackendTests as StorageBackendTests
else:
    # Not at once, since `ckptkit.testing.fixtures` is to be imported before jax.
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "CheckpointHandlerTests": "ckptkit.testing.handlers",
            "StorageBackendTests": "ckptkit.testing.storage",
            "TypeHandlerTests": "ckptkit.testing.leaves",
            "abstract": "ckptkit.testing.comparison",
            "assert_same": "ckptkit.testing.comparison",
        },
    )
