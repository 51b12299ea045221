"""Several at one path: readers beside a writer that replaces, and two writers at once."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults.injection import Server, version_at

import ckptkit
from ckptkit import errors


@pytest.mark.parametrize("reads", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_reader_beside_a_forced_overwriter_always_finds_one_whole_checkpoint(
    server: Server, tmp_path: Path, reads: int
) -> None:
    path, end = tmp_path / "c", tmp_path / "end"
    ckptkit.save(path, {"a": 0})
    versions: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(server.run, "overwrite_until", path=str(path), end=str(end))
        try:
            while len(versions) < reads or len(set(versions)) < 10:
                versions.append(version_at(path))
        finally:
            end.touch()
    assert writing.result()["error"] is None
    assert versions == sorted(versions)


@pytest.mark.parametrize("rounds", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_of_two_writers_one_wins_and_the_result_is_whole(server: Server, tmp_path: Path, rounds: int, force: bool) -> None:
    start = threading.Barrier(2, timeout=60)

    def other(path: Path) -> str | None:
        start.wait()
        error = server.run("save_alone", path=str(path), version=1, force=force)["error"]
        return error and error["type"]

    def ours(path: Path) -> str | None:
        start.wait()
        try:
            ckptkit.save(path, {"a": 2, "b": 2}, force=force)
        except (errors.BusyError, errors.ExistsError) as error:
            return type(error).__name__
        return None

    with ThreadPoolExecutor(1) as pool:
        for n in range(rounds):
            path = tmp_path / str(n)
            told = pool.submit(other, path)
            refusals = {2: ours(path), 1: told.result()}
            winners = [version for version, refusal in refusals.items() if refusal is None]
            assert set(refusals.values()) <= {None, "BusyError", "ExistsError"}
            assert len(winners) == 1 or force  # forced ones may come one after the other
            assert version_at(path) in winners
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, range(rounds)))
