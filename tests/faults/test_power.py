"""The power cut at every call that changes a file, and right after a save returned, on disks of their own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.injection import Action, Disk, Fault, Server, version_at

import ckptkit

OLD, NEW = 1, 2


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    mounted = Disk(request.param, tmp_path)
    yield mounted
    mounted.close()


def _begin_with_old(disk: Disk, server: Server, storage: str) -> Callable[[Fault | None], dict[str, Any]]:
    """Puts an old checkpoint on the disk, for good; the new one is saved by what this returns."""
    path = disk.path / "c"
    for entry in os.listdir(disk.path):
        if entry != "lost+found":
            shutil.rmtree(disk.path / entry)
    arguments = {"path": str(path), "kind": "numpy", "storage": storage, "background": False}
    assert server.run("save", version=OLD, **arguments)["error"] is None
    disk.sync()
    return lambda fault: server.run("save", version=NEW, fault=fault, **arguments)


def _after_power_cut(disk: Disk, server: Server, storage: str, fault: Fault | None, *, keep_journal: bool) -> Path:
    """The path of the checkpoint on a disk that lost its power at a fault, or after the save returned."""
    answer = _begin_with_old(disk, server, storage)(fault)
    if "error" in answer:
        assert answer["error"] is None
        disk.cut_power(keep_journal=keep_journal)
    disk.remount()
    return disk.path / "c"


JOURNAL = pytest.mark.parametrize("keep_journal", [True, False], ids=["journal kept", "journal lost"])
STORAGE = pytest.mark.parametrize("storage", ["ocdbt", pytest.param("zarr", marks=pytest.mark.slow)])


@JOURNAL
@STORAGE
def test_what_was_saved_is_there_when_the_power_fails_right_after(
    disk: Disk, server: Server, storage: str, keep_journal: bool
) -> None:
    assert version_at(_after_power_cut(disk, server, storage, None, keep_journal=keep_journal)) == NEW


@STORAGE
def test_without_syncing_it_is_not(disk: Disk, server: Server, storage: str) -> None:
    """The control: were every fsync left out, these tests would notice."""
    fault = Fault(f"{disk.path}/", Action.UNSYNCED)
    found = []
    for keep_journal in (True, False):
        path = _after_power_cut(disk, server, storage, fault, keep_journal=keep_journal)
        try:
            found.append(version_at(path))
        except ckptkit.errors.CheckpointError as error:
            found.append(error)
    assert found != [NEW, NEW]


@pytest.mark.slow
@JOURNAL
@STORAGE
def test_the_old_or_the_new_checkpoint_is_whole_whenever_the_power_fails(
    disk: Disk, server: Server, storage: str, keep_journal: bool
) -> None:
    below = f"{disk.path}/"
    count = _begin_with_old(disk, server, storage)(Fault(below))["count"]
    assert count > 20
    found = []
    for at in range(1, count + 1):
        fault = Fault(below, Action.SHUTDOWN, at=at, value=1 if keep_journal else 2)
        found.append(version_at(_after_power_cut(disk, server, storage, fault, keep_journal=keep_journal)))
        ckptkit.save(disk.path / "c", {"a": 3}, force=True)
        assert set(os.listdir(disk.path)) - {"lost+found"} == {"c"}
    assert set(found) == {OLD, NEW}
