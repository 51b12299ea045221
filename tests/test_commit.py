"""From a temporary directory to a checkpoint: locks, overwriting, and what killed writers left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ckptkit import _filesystem, commit, errors
from ckptkit.location import FileLocation


def _begin(path: Path, *, force: bool = False) -> commit.Pending:
    pending = commit.begin(FileLocation(path), force=force, mode=None)
    pending.temporary.write_bytes("sub/file", path.name.encode())
    return pending


def test_nothing_is_visible_before_the_commit_and_everything_after(tmp_path: Path) -> None:
    pending = _begin(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    pending.commit()
    assert (tmp_path / "c" / "sub" / "file").read_bytes() == b"c"
    assert os.listdir(tmp_path) == ["c"]


def test_a_second_writer_is_refused_while_the_first_is_at_it(tmp_path: Path) -> None:
    first = _begin(tmp_path / "c")
    with pytest.raises(errors.BusyError, match="under way"):
        _begin(tmp_path / "c")
    first.abandon()
    _begin(tmp_path / "c").commit()


def test_a_destination_that_came_into_being_meanwhile_is_kept(tmp_path: Path) -> None:
    pending = _begin(tmp_path / "c")
    (tmp_path / "c").mkdir()
    with pytest.raises(errors.ExistsError):
        pending.commit()
    pending.abandon()
    assert os.listdir(tmp_path) == ["c"]
    assert not os.listdir(tmp_path / "c")


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_force_replaces_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(_filesystem, "_exchange_function", lambda: None)
    old = _begin(tmp_path / "c")
    old.temporary.write_bytes("old", b"")
    old.commit()
    _begin(tmp_path / "c", force=True).commit()
    assert os.listdir(tmp_path) == ["c"]
    assert os.listdir(tmp_path / "c") == ["sub"]


def test_a_save_that_ends_without_a_commit_gives_a_set_aside_checkpoint_its_name_back(tmp_path: Path) -> None:
    _begin(tmp_path / "c").commit()
    os.rename(tmp_path / "c", f"{tmp_path / 'c'}.ckptkit-old.orbax-checkpoint-tmp")
    _begin(tmp_path / "c", force=True).abandon()
    assert os.listdir(tmp_path) == ["c"]


def test_a_set_aside_checkpoint_counts_as_existing(tmp_path: Path) -> None:
    _begin(tmp_path / "c").commit()
    os.rename(tmp_path / "c", f"{tmp_path / 'c'}.ckptkit-old.orbax-checkpoint-tmp")
    with pytest.raises(errors.ExistsError):
        _begin(tmp_path / "c")


_WRITER = """
import sys, time
from ckptkit import commit
from ckptkit.location import FileLocation
pending = commit.begin(FileLocation(sys.argv[1]), force=True, mode=None)
pending.temporary.write_bytes("half", b"half")
print("ready", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_writer_is_gone_and_its_leftovers_are_tidied(tmp_path: Path) -> None:
    _begin(tmp_path / "c").commit()
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path / "c")], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        with pytest.raises(errors.BusyError):
            _begin(tmp_path / "c", force=True)
        writer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (pending := _try_begin(tmp_path / "c")) is None:
        assert time.monotonic() < deadline
    pending.commit()
    assert os.listdir(tmp_path) == ["c"]
    assert os.listdir(tmp_path / "c") == ["sub"]


def _try_begin(path: Path) -> commit.Pending | None:
    try:
        return _begin(path, force=True)
    except errors.BusyError:
        return None


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\0b", "", "a//b", "."])
def test_names_never_lead_outside_the_directory(tmp_path: Path, name: str) -> None:
    location = FileLocation(tmp_path / "c")
    for use in (location.child, location.read_bytes, lambda n: location.write_bytes(n, b"")):
        with pytest.raises((errors.FormatError, errors.NotFoundError)):
            use(name)
    assert not list(tmp_path.iterdir())


def test_a_rename_that_is_not_durable_is_undone_unless_another_save_has_replaced_it(tmp_path: Path, monkeypatch: Any) -> None:
    path, first = tmp_path / "c", _begin(tmp_path / "c")

    def overtaken(_: str) -> None:
        monkeypatch.undo()
        second = _begin(path, force=True)
        second.temporary.write_bytes("second", b"")
        second.commit()
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(commit, "sync", overtaken)
    with pytest.raises(errors.StorageError):
        first.commit()
    first.abandon()
    assert (path / "second").exists()


@pytest.mark.parametrize("over", [True, False], ids=["over", "new"])
def test_what_was_written_stays_where_neither_a_rename_nor_its_undoing_is_durable(
    tmp_path: Path, monkeypatch: Any, over: bool
) -> None:
    """A power cut may leave the new name, which must not lead to files that were deleted; the next save tidies them."""
    path = tmp_path / "c"
    if over:
        old = _begin(path)
        old.temporary.write_bytes("old", b"")
        old.commit()
    new = _begin(path, force=True)
    new.temporary.write_bytes("new", b"")

    def fail(_: str) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(commit, "sync", fail)
    with pytest.raises(errors.StorageError):
        new.commit()
    new.abandon()
    assert [(path / "old").exists(), path.exists()] == [over, over]
    assert (tmp_path / f"c{commit.TEMPORARY_SUFFIX}" / "new").exists()
    monkeypatch.undo()
    again = _begin(path, force=True)
    again.temporary.write_bytes("again", b"")
    again.commit()
    assert [(path / "again").exists(), (path / "new").exists(), list(tmp_path.iterdir())] == [True, False, [path]]
