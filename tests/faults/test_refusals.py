"""What real file systems refuse: full ones, read-only ones, other users' ones, and those without locks."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.injection import Action, Fault, Server, version_at

NOBODY = 65534
root = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux, to mount")

SAVE: dict[str, Any] = {"version": 2, "kind": "numpy", "storage": "ocdbt", "background": False}


@pytest.fixture
def mounted(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A tmpfs with the options of the test's parameter."""
    target = tmp_path / "mounted"
    target.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", request.param, "none", target], capture_output=True, text=True, timeout=60, check=False
    )
    if made.returncode:
        pytest.skip(f"nothing can be mounted here: {made.stderr}")
    yield target
    subprocess.run(["umount", "-l", target], check=True, timeout=60)


@root
@pytest.mark.parametrize("mounted", ["size=24k", "size=4m,nr_inodes=8"], indirect=True)
@pytest.mark.parametrize("storage", ["ocdbt", "zarr"])
def test_a_full_disk_is_one_typed_error_and_stays_as_it_was(server: Server, mounted: Path, storage: str) -> None:
    answer = server.run("save", path=str(mounted / "c"), **SAVE | {"storage": storage})
    assert (answer["error"]["type"], answer["error"]["errno"]) == ("StorageError", errno.ENOSPC), answer
    assert str(mounted) in answer["error"]["text"]
    assert os.listdir(mounted) == []


@root
@pytest.mark.parametrize("mounted", ["size=8m"], indirect=True)
def test_a_disk_that_became_read_only_still_holds_the_old_checkpoint(server: Server, mounted: Path) -> None:
    assert server.run("save", path=str(mounted / "c"), **SAVE)["error"] is None
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True, timeout=60)
    answer = server.run("save", path=str(mounted / "c"), **SAVE | {"version": 3})
    assert (answer["error"]["type"], answer["error"]["errno"]) == ("StorageError", errno.EROFS), answer
    assert version_at(mounted / "c") == 2


@root
def test_an_immutable_checkpoint_is_not_replaced_and_nothing_is_left_beside_it(server: Server, tmp_path: Path) -> None:
    assert server.run("save", path=str(tmp_path / "c"), **SAVE)["error"] is None
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", tmp_path / "c"], timeout=60, check=False).returncode:
        pytest.skip("no chattr, or a file system without immutable files")
    try:
        answer = server.run("save", path=str(tmp_path / "c"), **SAVE | {"version": 3})
    finally:
        subprocess.run(["chattr", "-i", tmp_path / "c"], check=True, timeout=60)
    assert (answer["error"]["type"], answer["error"]["errno"]) == ("StorageError", errno.EPERM), answer
    assert os.listdir(tmp_path) == ["c"]
    assert version_at(tmp_path / "c") == 2


@root
def test_another_users_directory_is_refused_and_stays_as_it_was(server: Server, tmp_path: Path) -> None:
    home = _home(tmp_path)
    answer = server.run("save", path=str(tmp_path / "c"), user=NOBODY, **SAVE)
    assert (answer["error"]["type"], answer["error"]["errno"]) == ("StorageError", errno.EACCES), answer
    assert os.listdir(tmp_path) == [home.name]


def _home(tmp_path: Path) -> Path:
    """A directory of a user without rights, reachable for that user."""
    for above in [tmp_path, *tmp_path.parents]:
        if not stat.S_IMODE(above.stat().st_mode) & stat.S_IXOTH:
            above.chmod(above.stat().st_mode | stat.S_IXOTH)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, NOBODY, NOBODY)
    return home


def _modes(path: Path) -> tuple[set[int], set[int]]:
    """The permission bits of the directories, and of the files, of a checkpoint."""
    entries = [path, *path.rglob("*")]
    return tuple({stat.S_IMODE(e.stat().st_mode) for e in entries if e.is_dir() is is_dir} for is_dir in (True, False))  # type: ignore[return-value]


@pytest.mark.parametrize("storage", ["ocdbt", "zarr"])
@pytest.mark.parametrize("umask", [0o077, 0o027, 0o002])
def test_the_umask_is_respected(server: Server, tmp_path: Path, storage: str, umask: int) -> None:
    assert server.run("save", path=str(tmp_path / "c"), umask=umask, **SAVE | {"storage": storage})["error"] is None
    assert _modes(tmp_path / "c") == ({0o777 & ~umask}, {0o666 & ~umask})


@pytest.mark.parametrize("mode", [0o750, 0o2775, 0o700])
def test_directories_get_the_mode_that_was_asked_for(server: Server, tmp_path: Path, mode: int) -> None:
    assert server.run("save", path=str(tmp_path / "c"), mode=mode, **SAVE)["error"] is None
    assert _modes(tmp_path / "c")[0] == {mode}


@root
@pytest.mark.parametrize("mode", [0o550, 0o500])
def test_a_mode_without_writing_does_not_stop_the_next_save(server: Server, tmp_path: Path, mode: int) -> None:
    path = _home(tmp_path) / "c"
    for version in (1, 2, 3):
        answer = server.run("save", path=str(path), user=NOBODY, mode=mode, **SAVE | {"version": version})
        assert answer["error"] is None
    assert _modes(path)[0] == {mode}
    assert os.listdir(path.parent) == ["c"]
    assert version_at(path) == 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_saved_to(server: Server, tmp_path: Path, number: int) -> None:
    fault = Fault(f"{tmp_path}/", Action.FAIL_FROM, at=1, value=number, kinds="flock")
    answer = server.run("save", path=str(tmp_path / "c"), fault=fault, **SAVE)
    assert (answer["error"], answer["count"]) == (None, 1)
    assert version_at(tmp_path / "c") == 2


def test_a_lock_that_cannot_be_taken_for_another_reason_is_an_error(server: Server, tmp_path: Path) -> None:
    fault = Fault(f"{tmp_path}/", Action.FAIL, at=1, value=errno.EIO, kinds="flock")
    answer = server.run("save", path=str(tmp_path / "c"), fault=fault, **SAVE)
    assert (answer["error"]["type"], answer["error"]["errno"]) == ("StorageError", errno.EIO)


def _replaced(server: Server, tmp_path: Path, fault: Fault) -> dict[str, Any]:
    """How a save over version 1 ended; zarr makes the same files each time, so its calls can be counted before."""
    path = str(tmp_path / "c")
    arguments = SAVE | {"storage": "zarr"}
    assert server.run("save", path=path, **arguments | {"version": 1})["error"] is None
    return server.run("save", path=path, fault=fault, **arguments)


def test_an_exchange_that_cannot_be_synced_is_undone(server: Server, tmp_path: Path) -> None:
    last = _replaced(server, tmp_path, Fault(str(tmp_path), kinds="fsync"))["count"]  # which is of the directory above
    fault = Fault(str(tmp_path), Action.FAIL, at=last, value=errno.EIO, kinds="fsync")
    answer = _replaced(server, tmp_path, fault)
    assert (answer["error"]["type"], answer["error"]["errno"]) == ("StorageError", errno.EIO)
    assert os.listdir(tmp_path) == ["c"]
    assert version_at(tmp_path / "c") == 1


def test_an_exchange_that_can_neither_be_synced_nor_undone_keeps_both_checkpoints(server: Server, tmp_path: Path) -> None:
    kinds = "fsync rename2"
    last = _replaced(server, tmp_path, Fault(str(tmp_path), kinds=kinds))["count"]
    fault = Fault(str(tmp_path), Action.FAIL_FROM, at=last, value=errno.EIO, kinds=kinds)
    answer = _replaced(server, tmp_path, fault)
    assert (answer["error"]["type"], answer["error"]["errno"]) == ("StorageError", errno.EIO)
    assert version_at(tmp_path / "c") == 2
    os.rename(tmp_path / "c.orbax-checkpoint-tmp", tmp_path / "d")
    assert version_at(tmp_path / "d") == 1


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
def test_where_nothing_can_be_exchanged_two_renames_replace(server: Server, tmp_path: Path, number: int) -> None:
    answer = _replaced(server, tmp_path, Fault(str(tmp_path), Action.FAIL, at=1, value=number, kinds="rename2"))
    assert (answer["error"], answer["count"]) == (None, 1)
    assert os.listdir(tmp_path) == ["c"]
    assert version_at(tmp_path / "c") == 2
