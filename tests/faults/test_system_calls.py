"""Faults put into the kernel's answers, and the order of calls as the kernel sees it, whoever makes them: with strace."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.injection import install, version_at

import ckptkit

OLD, NEW = 1, 2
TEMPORARY = "c.orbax-checkpoint-tmp"

_SAVE = """
import sys
import numpy as np
import ckptkit
ckptkit.save(sys.argv[1], {"a": np.full(100_000, 2), "b": np.full(100, 2)}, force=True, storage=sys.argv[2])
"""

_LINE = re.compile(r"(?P<thread>\d+) +(?:<\.\.\. )?(?P<call>\w+)(?P<arguments>.*?)(?P<unfinished><unfinished \.\.\.>)?$")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a save over an old checkpoint at `c` under strace with further options; `log` will hold the calls."""
    install("strace", "strace")
    tried = subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], capture_output=True, text=True, timeout=60, check=False)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr}")
    ckptkit.save(tmp_path / "there" / "c", {"a": OLD})

    def started(*options: str, storage: str = "ocdbt") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _SAVE, tmp_path / "there" / "c", storage]
        return subprocess.Popen(
            ["strace", "-f", "-qq", "-y", "-o", tmp_path / "log", *options, *command],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    return started


# "" is everything, "." the directory above, whose sync comes after the exchange, which is undone then.
NAMES = [
    *("", "."),
    *(pytest.param(name, marks=pytest.mark.slow) for name in (f"{TEMPORARY}/_METADATA", f"{TEMPORARY}/d", TEMPORARY)),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_sync_that_fails_is_reported_and_the_old_checkpoint_is_whole(start: Start, tmp_path: Path, name: str) -> None:
    above = tmp_path / "there"
    only = ["-P", str(above / name)] if name else []
    with start(*only, "-e", "trace=fsync", "-e", "inject=fsync:error=EIO") as save:
        _, printed = save.communicate(timeout=120)
    assert save.returncode == 1
    assert f"ckptkit.errors.StorageError: [Errno {errno.EIO}]" in printed
    assert str(above / "c") in printed
    assert version_at(above / "c") == OLD
    if name == ".":  # the undoing of the exchange could not be synced either, so a power cut may still show the new files
        assert sorted(os.listdir(above)) == ["c", "c.orbax-checkpoint-tmp"]
        with start() as save:
            save.communicate(timeout=120)
        assert version_at(above / "c") == NEW
    assert os.listdir(above) == ["c"]


def test_a_reader_beside_a_disk_that_syncs_slowly_finds_the_old_checkpoint_and_then_the_new_one(
    start: Start, tmp_path: Path
) -> None:
    found = []
    with start("-e", "trace=fsync", "-e", "inject=fsync:delay_enter=100000") as save:  # microseconds
        while save.poll() is None:
            found.append(version_at(tmp_path / "there" / "c"))
        _, printed = save.communicate(timeout=120)
    found.append(version_at(tmp_path / "there" / "c"))
    assert (save.returncode, printed) == (0, "")
    assert found == sorted(found)
    assert set(found) == {OLD, NEW}


def _calls(log: Path) -> Iterator[tuple[str, str]]:
    """Calls and their arguments, in the order in which they returned."""
    begun = {}
    for line in log.read_text().splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        thread, call, arguments, unfinished = found.groups()
        if unfinished:
            begun[thread] = arguments
        else:
            yield call, begun.pop(thread, "") + arguments


@pytest.mark.parametrize("storage", ["ocdbt", pytest.param("zarr", marks=pytest.mark.slow)])
def test_everything_is_synced_before_the_exchange_the_directory_above_after_it_and_then_the_old_is_deleted(
    start: Start, tmp_path: Path, storage: str
) -> None:
    with start("-e", "trace=fsync,renameat2,unlink,unlinkat,rmdir", storage=storage) as save:
        _, printed = save.communicate(timeout=120)
    assert save.returncode == 0, printed
    above, new = tmp_path / "there", tmp_path / "there" / TEMPORARY
    seen = [(call, arguments) for call, arguments in _calls(tmp_path / "log") if str(above) in arguments]
    (exchange,) = [i for i, (call, _) in enumerate(seen) if call == "renameat2"]
    synced = {arguments.split("<")[1].split(">")[0] for call, arguments in seen[:exchange] if call == "fsync"}
    names = [path.relative_to(above / "c") for path in (above / "c").rglob("*")]
    assert synced == {str(new), *(str(new / name) for name in names)}
    assert seen[exchange + 1][0] == "fsync"
    assert f"<{above}>" in seen[exchange + 1][1]
    removals = {"unlink", "unlinkat", "rmdir"}
    assert not [call for call, _ in seen[:exchange] if call in removals]
    assert {call for call, _ in seen[exchange + 2 :]} & removals
