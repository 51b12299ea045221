"""The server that faults are injected into, one for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faults import injection


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[injection.Server]:
    """Forks a child per fault."""
    running = injection.Server(injection.built_shim(tmp_path_factory.mktemp("shim")))
    yield running
    running.close()
