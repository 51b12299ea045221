"""Bounds of host memory are true: what is staged, or read and not yet assembled, is counted all through a save and a restore."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckptkit
from ckptkit.leaves.jax_array import JaxArrayHandler
from ckptkit.leaves.numpy import NumpyHandler
from ckptkit.registry import Registry
from ckptkit.storage import Reader, StorageBackend, Writer
from ckptkit.storage.ocdbt import OcdbtBackend
from ckptkit.testing import assert_same

LEAF = 1 << 20  # bytes
LEAVES = 24
BOUND = 6 << 20


class _Meter:
    """Bytes held now, and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        with self._lock:
            self.now += size
            self.peak = max(self.peak, self.now)


class _MeteredWriter(Writer):
    def __init__(self, writer: Writer, meter: _Meter) -> None:
        self._writer = writer
        self._meter = meter

    def write(self, chunks: Sequence[Any]) -> Future[None]:
        future = self._writer.write(chunks)
        size = sum(chunk.data.nbytes for chunk in chunks)
        future.add_done_callback(lambda _: self._meter.add(-size))
        return future

    def commit(self) -> None:
        self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()


class _MeteredReader(Reader):
    def __init__(self, reader: Reader, meter: _Meter) -> None:
        self._reader = reader
        self._meter = meter

    def arrays(self) -> Any:
        return self._reader.arrays()

    def read(self, requests: Sequence[Any]) -> Future[None]:
        self._meter.add(sum(out.nbytes for _, _, out in requests))
        return self._reader.read(requests)

    def close(self) -> None:
        self._reader.close()


def _registry(meter: _Meter) -> Registry:
    """The built-ins, with a meter at every place where host memory is taken or let go."""

    class Backend(OcdbtBackend):
        def writer(self, *args: Any) -> Writer:
            return _MeteredWriter(super().writer(*args), meter)

        def reader(self, location: Any) -> Reader:
            return _MeteredReader(super().reader(location), meter)

    class Metered:
        def stage(self, pieces: Any) -> Any:
            staged = super().stage(pieces)  # type: ignore[misc]
            meter.add(sum(data.nbytes for data in staged))
            return staged

        def assemble(self, specs: Any, requests: Any, parts: Any) -> Any:
            made = super().assemble(specs, requests, parts)  # type: ignore[misc]
            meter.add(-sum(part.nbytes for its_parts in parts for part in its_parts.values()))
            return made

    class Numpy(Metered, NumpyHandler):
        pass

    class Jax(Metered, JaxArrayHandler):
        pass

    registry = Registry.with_builtins()
    backend: StorageBackend = Backend()
    registry.add_storage(backend, override=True)
    registry.add_type_handler(Numpy(), np.ndarray, override=True)
    registry.add_type_handler(Jax(pinned_host=True), jax.Array, override=True)  # so that staging makes copies, as on a GPU
    return registry


@pytest.mark.parametrize("full", [np.full, jnp.full], ids=["numpy", "jax"])
def test_no_more_host_memory_is_in_flight_than_allowed(tmp_path: Path, full: Any) -> None:
    tree = {str(i): full(LEAF // 4, i, np.float32) for i in range(LEAVES)}
    meter = _Meter()
    bounds = {"save_concurrent_gb": BOUND / 10**9, "restore_concurrent_gb": BOUND / 10**9}
    with ckptkit.StandardCheckpointer(registry=_registry(meter), **bounds) as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
        checkpointer.wait_until_finished()
        assert 2 * LEAF <= meter.peak <= BOUND
        assert meter.now == 0
        meter.peak = 0
        assert_same(checkpointer.restore(tmp_path / "c"), tree)
    assert 2 * LEAF <= meter.peak <= BOUND
    assert meter.now == 0


@pytest.mark.parametrize("full", [np.full, jnp.full], ids=["numpy", "jax"])
def test_one_cell_or_leaf_may_exceed_a_bound_that_is_lower_still(tmp_path: Path, full: Any) -> None:
    tree = {str(i): full(LEAF // 4, i, np.float32) for i in range(4)}
    meter = _Meter()
    bounds = {"save_concurrent_gb": 1e-9, "restore_concurrent_gb": 1e-9}
    with ckptkit.StandardCheckpointer(registry=_registry(meter), **bounds) as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
        checkpointer.wait_until_finished()
        assert meter.peak == LEAF
        meter.peak = 0
        checkpointer.restore(tmp_path / "c")
    assert meter.peak <= 2 * LEAF  # one is read while another is assembled
