"""What a forked process may do, and what it must not keep from its parent."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ckptkit
from ckptkit import commit, errors
from ckptkit.location import FileLocation

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system"),
    pytest.mark.filterwarnings("ignore:.*fork.*"),  # jax and Python 3.12 warn that what these tests do is dangerous
]


def _in_child(action: Callable[[], object]) -> int:
    """The status of a forked process: 0 where `action` returned; one that hangs is killed."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _refused(action: Callable[[], object]) -> Callable[[], None]:
    def expecting() -> None:
        with pytest.raises(errors.ForkedError, match="spawn"):
            action()

    return expecting


def test_a_fork_of_a_process_that_used_ckptkit_is_told_so(tmp_path: Path) -> None:
    path = tmp_path / "c"
    ckptkit.save(path, {"a": np.ones(3)})
    checkpointer = ckptkit.StandardCheckpointer()
    for action in (
        lambda: ckptkit.restore(path),
        lambda: ckptkit.save(path, {"a": 1}, force=True),
        lambda: checkpointer.save(path, {"a": 1}, force=True),
        lambda: checkpointer.metadata(path),
    ):
        assert _in_child(_refused(action)) == 0
    assert ckptkit.restore(path)["a"].sum() == 3


def test_a_fork_is_not_told_that_its_parents_save_was_finished(tmp_path: Path) -> None:
    handle = ckptkit.save_async(tmp_path / "c", {"a": np.ones(1 << 22)})
    assert _in_child(_refused(handle.result)) == 0
    assert _in_child(_refused(handle.done)) == 0
    handle.result(60)


def test_a_fork_that_does_not_touch_ckptkit_ends_as_ever(tmp_path: Path) -> None:
    with ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"a": np.ones(1 << 22)})
        assert _in_child(lambda: None) == 0
    assert ckptkit.restore(tmp_path / "c")["a"].sum() == 1 << 22


def test_a_fork_does_not_keep_the_lock_of_a_save(tmp_path: Path) -> None:
    """A loader forked in the middle of a save outlives a killed trainer; the next one must not find the path taken."""
    pending = commit.begin(FileLocation(tmp_path / "c"), force=False, mode=None)
    end, ended = os.pipe()
    started, start = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os.write(start, b".")
        os.close(ended)
        os.read(end, 1)
        os._exit(0)
    os.read(started, 1)  # it has closed its copies by now
    pending._lock.close()  # as the end of the parent would, which leaves the directory
    commit.begin(FileLocation(tmp_path / "c"), force=False, mode=None).abandon()
    for descriptor in (ended, end, started, start):
        os.close(descriptor)
    os.waitpid(child, 0)
