"""Disks that are slow, tear writes, keep unsynced changes in any order, cut writes short, or fail a sync and forget the data."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.injection import Action, Fault, RecordedDisk, Server, version_at
from faults.survival import ROOT, Dropped, Event, Fate, Named, Synced, Written, lay_out, survivor

import ckptkit
from ckptkit import errors

OLD, NEW, NEXT = 1, 2, 3
FATES = [Fate.NOTHING, Fate.EVERYTHING, Fate.HOLLOW, *[Fate.FIRST] * 2, *[Fate.SOME] * 3]
SAVE: dict[str, Any] = {"kind": "plain", "storage": "ocdbt", "background": False}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[RecordedDisk]:
    mounted = RecordedDisk(tmp_path)
    yield mounted
    mounted.close()


class Saves:
    """Saves to `c` on a recorded disk, by children of a server."""

    def __init__(self, disk: RecordedDisk, server: Server, **arguments: Any) -> None:
        self.path = disk.path / "c"
        self._server = server
        self._arguments = SAVE | arguments

    def __call__(self, version: int, fault: Fault | None = None) -> dict[str, Any]:
        return self._server.run("save", fault=fault, path=str(self.path), version=version, **self._arguments)

    def succeed(self, version: int) -> None:
        answer = self(version)
        assert answer["error"] is None, answer


Outcome = int | errors.CheckpointError | None


def outcomes(
    events: Sequence[Event], positions: Sequence[int], directory: Path, fates: Sequence[Fate] = FATES
) -> Iterator[tuple[str, Outcome]]:
    """What a reader finds after power cuts behind so many events; None where there is nothing. Each state is looked at once.

    After some of them a further save is tried as well, which tidies everything.
    """
    chance = random.Random(0)  # noqa: S311 - the same states in every run
    seen = set()
    for position in positions:
        for fate in fates:
            tree = survivor(events[:position], fate, chance)
            key = hash(pickle.dumps(tree))
            if key in seen:
                continue
            seen.add(key)
            shutil.rmtree(directory, ignore_errors=True)
            lay_out(tree, directory)
            found: Outcome
            try:
                found = version_at(directory / "c")
            except errors.CheckpointError as error:
                found = error if "c" in tree else None
            where = f"{fate} after {position} of {len(events)} events: {sorted(tree)} -> {found!r}"
            yield where, found
            if len(seen) % 10 == 0:  # a save takes longer than the rest
                _age(directory)
                ckptkit.save(directory / "c", {"a": NEXT}, force=True)
                assert os.listdir(directory) == ["c"], where


def _age(directory: Path) -> None:
    """Makes everything five minutes old: leftovers that lost their names may be taken for another program's, for two."""
    then = time.time() - 300
    for parent, _, names in os.walk(directory):
        for path in (parent, *[os.path.join(parent, name) for name in names]):
            os.utime(path, (then, then), follow_symlinks=False)


# Every run takes the harder of both ways to replace, and some of the power cuts.
POWER_CUTS = [
    pytest.param("ocdbt", False, True, 7, id="ocdbt-renames-over-some"),
    pytest.param("ocdbt", False, True, 1, id="ocdbt-renames-over", marks=pytest.mark.slow),
    pytest.param("ocdbt", True, True, 1, id="ocdbt-exchange-over", marks=pytest.mark.slow),
    pytest.param("ocdbt", True, False, 1, id="ocdbt-new", marks=pytest.mark.slow),
    pytest.param("zarr", False, True, 1, id="zarr-renames-over", marks=pytest.mark.slow),
    pytest.param("zarr", True, False, 1, id="zarr-new", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("storage", "exchange", "over", "stride"), POWER_CUTS)
def test_torn_writes_and_lost_names_leave_the_old_or_the_new_checkpoint_whole(
    disk: RecordedDisk, server: Server, tmp_path: Path, storage: str, exchange: bool, over: bool, stride: int
) -> None:
    disk.behave(exchange=exchange)
    saves = Saves(disk, server, storage=storage)
    if over:
        saves.succeed(OLD)
    start = len(disk.events())
    saves.succeed(NEW)
    events = disk.events()
    before = {OLD} if over else {None}
    found = set()
    for where, version in outcomes(events, range(start, len(events), stride), tmp_path / "left"):
        assert version in before | {NEW}, where
        found.add(version)
    assert found == before | {NEW}
    for where, version in outcomes(events, [len(events)], tmp_path / "left", [*FATES, *[Fate.SOME] * 10]):
        assert version == NEW, where


def test_a_disk_that_lies_about_syncs_is_an_error_and_never_a_wrong_value(
    disk: RecordedDisk, server: Server, tmp_path: Path
) -> None:
    """The control: were every sync left out, these tests would notice, and a reader too."""
    saves = Saves(disk, server)
    saves.succeed(OLD)
    disk.behave(lying=True)
    start = len(disk.events())
    saves.succeed(NEW)
    events = disk.events()
    found = [version for _, version in outcomes(events, range(start, len(events) + 1, 5), tmp_path / "left")]
    assert {version for version in found if not isinstance(version, errors.CheckpointError)} <= {OLD, NEW, None}
    assert any(isinstance(version, errors.CheckpointError) for version in found)
    after = [version for _, version in outcomes(events, [len(events)], tmp_path / "left")]
    assert after.count(NEW) < len(after)


@pytest.mark.parametrize(
    ("tidy", "exchange", "stride"),
    [
        pytest.param("save", False, 11, id="save-renames-some"),
        pytest.param("clean", True, 2, id="clean-exchange"),
        pytest.param("clean", False, 1, id="clean-renames", marks=pytest.mark.slow),
        pytest.param("save", True, 2, id="save-exchange", marks=pytest.mark.slow),
        pytest.param("save", False, 2, id="save-renames", marks=pytest.mark.slow),
    ],
)
def test_what_tidies_after_a_killed_save_loses_nothing_to_a_power_cut(
    disk: RecordedDisk, server: Server, tmp_path: Path, tidy: str, exchange: bool, stride: int
) -> None:
    """A killed save's renames may be lost with the power, and what was deleted since be gone: those must not be the old files."""
    disk.behave(exchange=exchange)
    saves = Saves(disk, server)
    kinds = "rename rename2 fsync"
    saves.succeed(OLD)
    calls = saves(NEW, Fault(str(disk.path), kinds=kinds))["count"]
    for at in range(calls - 3, calls + 1):  # the renames, and the sync that makes them durable
        saves.succeed(OLD)
        assert saves(NEW, Fault(str(disk.path), Action.KILL, at=at, kinds=kinds))["status"] == -signal.SIGKILL
        start = len(disk.events())
        if tidy == "save":
            saves.succeed(NEXT)
        else:
            ckptkit.clean(disk.path)
        events = disk.events()
        for where, version in outcomes(events, range(start, len(events) + 1, stride), tmp_path / "left", FATES[-4:]):
            assert version in (OLD, NEW, NEXT), f"killed at {at} of {calls}; {where}"


@pytest.mark.parametrize(
    ("kind", "over"),
    [
        pytest.param("fsync", True, id="fsync-over"),
        pytest.param("fsyncdir", True, id="fsyncdir-over"),
        pytest.param("fsyncdir", False, id="fsyncdir-new"),
        pytest.param("fsync", False, id="fsync-new", marks=pytest.mark.slow),
        pytest.param("close", True, id="close-over", marks=pytest.mark.slow),
        pytest.param("close", False, id="close-new", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_once_and_forgets_the_data_is_one_typed_error(
    disk: RecordedDisk, server: Server, tmp_path: Path, kind: str, over: bool
) -> None:
    saves = Saves(disk, server)
    if over:
        saves.succeed(OLD)
    before = OLD if over else None
    start, at = len(disk.events()), 0
    while True:
        at += 1
        disk.behave(fails={kind: at})
        answer = saves(NEW)
        if disk.counts().get(kind, 0) < at:
            break
        where = f"{kind} {at}: {answer}"
        assert (answer["error"]["type"], answer["error"]["errno"]) == ("StorageError", errno.EIO), where
        assert str(disk.path) in answer["error"]["text"], where
        assert os.listdir(disk.path) == (["c"] if over else []), where
    assert at > 2
    assert answer["error"] is None
    assert version_at(saves.path) == NEW
    events = disk.events()
    stride = max(1, (len(events) - start) // 20)
    for where, version in outcomes(events, range(start, len(events), stride), tmp_path / "left", FATES[-4:]):
        assert version in (before, NEW), where


@pytest.mark.parametrize("storage", ["ocdbt", "zarr"])
def test_writes_that_a_disk_cuts_short_are_continued(disk: RecordedDisk, server: Server, tmp_path: Path, storage: str) -> None:
    disk.behave(short=True)
    Saves(disk, server, storage=storage).succeed(NEW)
    for where, version in outcomes(events := disk.events(), [len(events)], tmp_path / "left"):
        assert version == NEW, where


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("reads", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_reader_beside_an_overwriter_on_a_slow_disk_always_finds_one_whole_checkpoint(
    disk: RecordedDisk, server: Server, tmp_path: Path, exchange: bool, reads: int
) -> None:
    path, end = disk.path / "c", tmp_path / "end"
    disk.behave(exchange=exchange)
    ckptkit.save(path, {"a": 0})
    disk.behave(exchange=exchange, write_secs=0.01, sync_secs=0.01)
    versions: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(server.run, "overwrite_until", path=str(path), end=str(end))
        try:
            while len(versions) < reads or len(set(versions)) < 4:
                versions.append(version_at(path))
        finally:
            end.touch()
    assert writing.result()["error"] is None
    assert versions == sorted(versions)


@pytest.fixture
def started(disk: RecordedDisk, server: Server) -> Iterator[Callable[..., Future[dict[str, Any]]]]:
    """Saves over an old checkpoint on a disk that takes 0.1 s for every write, and returns once that is under way."""
    saves = Saves(disk, server)
    saves.succeed(OLD)
    with ThreadPoolExecutor(1) as pool:

        def start(fault: Fault | None = None) -> Future[dict[str, Any]]:
            disk.behave(write_secs=0.1)
            saving = pool.submit(saves, NEW, fault)
            while not os.path.exists(disk.path / "c.orbax-checkpoint-tmp") and not saving.done():
                time.sleep(0.001)
            return saving

        yield start


def test_a_second_writer_on_a_slow_disk_is_told_at_once(
    disk: RecordedDisk, started: Callable[..., Future[dict[str, Any]]]
) -> None:
    saving = started()
    with pytest.raises(errors.BusyError, match="another save to this path is under way"):
        ckptkit.save(disk.path / "c", {"a": NEXT}, force=True)
    assert not saving.done()
    assert saving.result()["error"] is None
    assert version_at(disk.path / "c") == NEW


def test_ctrl_c_while_a_slow_disk_writes_leaves_the_old_checkpoint_and_nothing_else(
    disk: RecordedDisk, started: Callable[..., Future[dict[str, Any]]]
) -> None:
    answer = started(Fault(f"{disk.path}/", Action.SIGNAL, at=2, value=signal.SIGINT, kinds="write")).result()
    assert answer["error"]["type"] == "KeyboardInterrupt"
    assert os.listdir(disk.path) == ["c"]
    assert version_at(disk.path / "c") == OLD


def test_waiting_for_a_slow_disk_is_bounded_and_the_save_goes_on(disk: RecordedDisk) -> None:
    path = disk.path / "c"
    ckptkit.save(path, {"a": OLD})
    disk.behave(write_secs=0.2)
    with ckptkit.StandardCheckpointer(async_options=ckptkit.AsyncOptions(timeout_secs=0.1)) as checkpointer:
        checkpointer.save(path, {"a": np.full(100, NEW)}, force=True)
        with pytest.raises(errors.TimeoutError, match="it goes on"):
            checkpointer.wait_until_finished()
        assert version_at(path) == OLD
        disk.behave()
        while version_at(path) == OLD:
            time.sleep(0.01)
        checkpointer.wait_until_finished()
    assert os.listdir(disk.path) == ["c"]


def test_what_a_power_cut_leaves_is_what_was_synced_and_any_of_the_rest() -> None:
    """Of the model itself: a synced file of an unsynced directory is lost with its name, and sectors come one by one."""
    made = [Named({(ROOT, "d"): 2}, made=2), Named({(2, "f"): 3}), Written(3, 0, b"x" * 1024), Synced(3)]
    chance = random.Random(0)  # noqa: S311
    assert survivor(made, Fate.NOTHING, chance) == {}
    assert survivor([*made, Synced(ROOT)], Fate.NOTHING, chance) == {"d": {}}
    assert survivor([*made, Synced(ROOT), Synced(2)], Fate.NOTHING, chance) == {"d": {"f": b"x" * 1024}}
    whole = [*made, Synced(ROOT), Synced(2)]
    again = [*whole, Written(3, 512, b"y" * 1024)]
    assert survivor(again, Fate.HOLLOW, chance) == {"d": {"f": b"x" * 1024 + bytes(512)}}
    assert survivor(again, Fate.EVERYTHING, chance) == {"d": {"f": b"x" * 512 + b"y" * 1024}}
    assert survivor([*again, Dropped(3), Synced(3)], Fate.EVERYTHING, chance) == {"d": {"f": b"x" * 1024}}
    torn = {survivor(again, Fate.SOME, chance)["d"]["f"] for _ in range(50)}
    assert b"x" * 1024 + b"y" * 512 in torn
    assert b"x" * 512 + b"y" * 512 in torn
