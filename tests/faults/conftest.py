"""The servers that faults are injected into, the same for all tests here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from faults import injection


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[injection.Server]]:
    """Each forks a child per fault; two, since one and the test that waits for it keep one core busy."""
    shim = injection.built_shim(tmp_path_factory.mktemp("shim"))
    with contextlib.ExitStack() as running:
        started = [injection.Server(shim) for _ in range(2)]
        for server in started:
            running.callback(server.close)
        yield started


@pytest.fixture
def server(servers: list[injection.Server]) -> injection.Server:
    """Forks a child per fault."""
    return servers[0]
