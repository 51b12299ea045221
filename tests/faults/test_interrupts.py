"""Ctrl-C at every line of a save: no lock stays behind, nobody goes on writing, and one whole checkpoint is there."""

from __future__ import annotations

import gc
import itertools
import linecache
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import ckptkit
from ckptkit import _lifetime
from ckptkit.pipeline import answers

_FOLDER = os.path.dirname(ckptkit.__file__)


def _interrupted_at(line: int, call: Callable[[], object]) -> bool:
    """Runs a call, with Ctrl-C at the `line`-th line of ckptkit in this thread; False once the call has fewer."""
    seen = 0
    entered: set[tuple[int, int]] = set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        caller = frame.f_back
        if "__del__" in (frame.f_code.co_name, caller and caller.f_code.co_name):  # what is raised there is ignored
            return None
        if not frame.f_code.co_filename.startswith(_FOLDER):
            return None
        if event == "line" and not leaves_with(frame):
            seen += 1
            if seen == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    def leaves_with(frame: FrameType) -> bool:
        """Whether the line is a `with` that is being left, where Python lets no signal in: its lock would stay taken."""
        if not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            return False
        again = (id(frame), frame.f_lineno) in entered  # the frame itself would keep alive what it owns
        entered.add((id(frame), frame.f_lineno))
        return again

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return seen >= line


def _wait_for_threads() -> None:
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("ckptkit") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, [thread.name for thread in threading.enumerate()]
        time.sleep(0.001)
        if time.monotonic() > deadline - 9.5:
            gc.collect()  # workers that only a cycle refers to end their threads when they are collected


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # Ctrl-C came before it could be
@pytest.mark.parametrize("background", [False, True], ids=["blocking", "background"])
@pytest.mark.parametrize("stride", [41, pytest.param(1, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_line_leaves_one_whole_checkpoint_and_no_lock(tmp_path: Path, background: bool, stride: int) -> None:
    path = tmp_path / "c"
    make = ckptkit.StandardCheckpointer if background else ckptkit.PyTreeCheckpointer
    make().save(path, {"a": np.zeros(100)})
    version = 0
    for line in itertools.count(1, stride):
        checkpointer = make()
        tree = {"a": np.full(100, line), "b": np.full(100, line)}
        more = _interrupted_at(line, lambda: checkpointer.save(path, tree, force=True))  # noqa: B023 - called at once
        checkpointer.close()
        _wait_for_threads()
        found = {float(value) for leaf in ckptkit.restore(path).values() for value in leaf}
        assert found in ({version}, {line}), line
        version = found.pop()
        ckptkit.save(path, {"a": np.full(100, version)}, force=True)  # no lock is held, and what was left is tidied
        assert os.listdir(tmp_path) == ["c"], line
        if not more:
            break
    assert version > 0
    assert not [save for save in _lifetime._under_way if save.goes_on()], "the exit of this process would wait for them"


def test_ctrl_c_once_the_writer_has_started_stops_it_before_the_directory_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        monkeypatch.undo()
        raise KeyboardInterrupt

    tree = {str(i): np.full(1 << 18, 7.0) for i in range(40)}
    for i in range(5):
        monkeypatch.setattr(answers, "futures", interrupt)  # which the writers' futures are handed to
        with pytest.raises(KeyboardInterrupt):
            ckptkit.PyTreeCheckpointer().save(tmp_path / str(i), tree)
        assert not [thread.name for thread in threading.enumerate() if thread.name == "ckptkit-write"]
        assert os.listdir(tmp_path) == []
