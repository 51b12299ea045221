"""The order of calls that a power cut cannot break, read from a log: holds without root and on any file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults.injection import Fault, Server


def _unsynced(calls: list[tuple[str, str, str]], path: str) -> list[str]:
    """What a power cut could lose although the calls after it rely on it.

    A file counts until it is synced after its last write, a directory until it is synced after its last new name.
    """
    temporary = f"{path}.orbax-checkpoint-tmp"
    dirty: set[str] = set()
    lost = []
    for kind, first, second in calls:
        if kind in ("rename", "rename2") and second == path:
            lost += [f"{entry} at the commit" for entry in sorted(dirty)]
            dirty = {os.path.dirname(path)}
        elif kind in ("unlink", "rmdir"):
            lost += [f"the new name, when {first} is deleted"] if os.path.dirname(path) in dirty else []
        elif kind in ("fsync", "fdatasync"):
            dirty.discard(first)
        elif first.startswith(f"{temporary}/"):
            name = second or first
            dirty.discard(first)
            dirty |= {name, os.path.dirname(name)}
    return lost + [f"{entry} at the end" for entry in sorted(dirty)]


@pytest.mark.parametrize("storage", ["ocdbt", "zarr"])
@pytest.mark.parametrize("over", [False, True], ids=["new", "over"])
def test_everything_is_synced_before_something_relies_on_it(server: Server, tmp_path: Path, storage: str, over: bool) -> None:
    path, log = tmp_path / "saved" / "c", tmp_path / "log"
    path.parent.mkdir()
    fault = Fault(str(path.parent), log=str(log))
    for _ in range(1 + over):
        log.unlink(missing_ok=True)
        answer = server.run("save", fault=fault, path=str(path), version=1, kind="numpy", storage=storage, background=False)
        assert answer["error"] is None
    calls = [(kind, first, second) for kind, first, second in (line.split("\t") for line in log.read_text().splitlines())]
    assert _unsynced(calls, str(path)) == []
    assert _unsynced([call for call in calls if call[0] != "fsync"], str(path))  # the control
    assert _unsynced([call for call in calls if call[:2] != ("fsync", str(path.parent))], str(path))
