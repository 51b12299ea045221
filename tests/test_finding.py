"""What readers find, and how they notice that another checkpoint took the place of the one they read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptkit import commit, errors, finding
from ckptkit.location import FileLocation


def _save(path: Path, *names: str) -> None:
    """Commits a checkpoint of empty files of these names, and of one more in a folder."""
    pending = commit.begin(FileLocation(path), force=True, mode=None)
    for name in ("sub/file", *names):
        pending.temporary.write_bytes(name, b"")
    pending.commit()


def test_between_two_renames_the_old_checkpoint_is_read_where_it_was_set_aside(tmp_path: Path) -> None:
    _save(tmp_path / "c")
    aside = f"{tmp_path / 'c'}.ckptkit-old.orbax-checkpoint-tmp"
    os.rename(tmp_path / "c", aside)
    assert finding.resolve(FileLocation(tmp_path / "c")).local_path == aside


@pytest.mark.parametrize("name", ["ckptkit_files.json", "_CHECKPOINT_METADATA", "_METADATA", "any"])
def test_a_checkpoint_that_got_the_number_of_the_one_before_the_last_is_another(tmp_path: Path, name: str) -> None:
    """A reader that began before two overwrites must notice them, whatever inode numbers the file system hands out."""
    seen = set()
    for _ in range(6):
        _save(tmp_path / "c", name)
        seen.add(finding._seen(FileLocation(tmp_path / "c"))[0])
    assert len(seen) == 6


def _attempts(path: Path, read: Callable[[FileLocation], object]) -> int:
    """How often a reader of a checkpoint begins."""
    count = 0
    for attempt in finding.attempts(lambda: FileLocation(path)):
        with attempt as location:
            count += 1
            read(location)
    return count


def test_files_that_come_and_go_beside_those_of_a_checkpoint_do_not_disturb_a_reader(tmp_path: Path) -> None:
    _save(tmp_path / "c", "ckptkit_files.json")
    assert _attempts(tmp_path / "c", lambda _: (tmp_path / "c" / "rank_3.done").touch()) == 1


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "_METADATA", "_sharding"])
def test_a_reader_of_a_checkpoint_without_a_list_looks_again_where_a_file_of_it_goes(tmp_path: Path, name: str) -> None:
    """It may have been read without a file that says what a leaf is."""
    _save(tmp_path / "c", "_CHECKPOINT_METADATA", "_METADATA", "_sharding")
    assert _attempts(tmp_path / "c", lambda _: (tmp_path / "c" / name).unlink(missing_ok=True)) == 2


def test_a_reader_that_fails_on_a_checkpoint_that_is_being_deleted_looks_again(tmp_path: Path) -> None:
    _save(tmp_path / "c", "_METADATA")

    def read(location: FileLocation) -> None:
        if (tmp_path / "c" / "sub").exists():
            shutil.rmtree(tmp_path / "c" / "sub")
            location.read_bytes("sub/file")

    assert _attempts(tmp_path / "c", read) == 2


def test_a_reader_that_writers_disturb_every_time_gives_up(tmp_path: Path) -> None:
    _save(tmp_path / "c")
    reading = []

    def read_while_others_write() -> None:
        for attempt in finding.attempts(lambda: FileLocation(tmp_path / "c")):
            with attempt as location:
                reading.append(location)
                _save(tmp_path / "c")

    with pytest.raises(errors.BusyError, match="100 times in a row"):
        read_while_others_write()
    assert len(reading) == 100
