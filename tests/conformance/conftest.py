"""Which checks of the suites are quick: all of them for one class of each suite, and for the others those that take no second."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
WHOLE = {"TestOcdbt", "TestJaxArray", "TestStandard"}
COSTLY = {
    *("test_trees_come_back", "test_a_fresh_process_restores"),
    *("test_many_arrays_in_proportion", "test_many_leaves_in_proportion"),
}


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(items):
    for item in items:
        inherited = item.path.parent == HERE and item.cls is not None
        if inherited and item.cls.__name__ not in WHOLE and item.originalname in COSTLY:
            item.add_marker(pytest.mark.slow)
