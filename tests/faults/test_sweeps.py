"""A process killed, or refused by the system, at every call that changes a file: the old checkpoint or the new one, whole."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest
from faults.injection import Action, Fault, Server, version_at

import ckptkit

OLD, NEW = 1, 2


@attrs.frozen
class Save:
    """One kind of save; `over` replaces a checkpoint."""

    kind: str
    storage: str
    background: bool
    over: bool

    def __str__(self) -> str:
        return "-".join(
            [self.kind, self.storage, "background" if self.background else "blocking", "over" if self.over else "new"]
        )


ALL = [Save(*values) for values in itertools.product(("numpy", "sharded"), ("ocdbt", "zarr"), (False, True), (False, True))]
NUMPY = ALL[:8]
SHARDED_OVER = [case for case in ALL if case.kind == "sharded" and case.background and case.over]
OVER = [case for case in NUMPY if case.over]
ONE = [Save("numpy", "ocdbt", background=True, over=True)]
SHORT_POINTS = 12


def sweeps(short: Sequence[Any], whole: Sequence[Any]) -> pytest.MarkDecorator:
    """Some of the calls of a few saves in every run, every call of all saves in the slow one."""
    cases = [pytest.param(case, SHORT_POINTS, id=f"{case}-some") for case in short]
    cases += [pytest.param(case, None, id=str(case), marks=pytest.mark.slow) for case in whole]
    return pytest.mark.parametrize(("case", "limit"), cases)


class Sweep:
    """Repeats a save in a directory of its own, with a fault at one of the calls that it makes."""

    def __init__(self, server: Server, directory: Path, case: Save) -> None:
        self._server = server
        self._case = case
        self._start, self.directory = directory / "start", directory / "work"
        self._start.mkdir(parents=True)
        if case.over:
            assert self._save(self._start, version=OLD)["error"] is None
        self.log = directory / "log"

    def _save(self, directory: Path, *, version: int = NEW, fault: Fault | None = None) -> dict[str, Any]:
        case = self._case
        return self._server.run(
            "save",
            fault=fault,
            path=str(directory / "c"),
            version=version,
            kind=case.kind,
            storage=case.storage,
            background=case.background,
        )

    def run(self, action: Action, value: int = 0, at: int = 0) -> tuple[dict[str, Any], str]:
        """How the save ended with the fault at call `at`, and that call, as the shim logged it."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.copytree(self._start, self.directory)
        self.log.unlink(missing_ok=True)
        fault = Fault(f"{self.directory}/", action, at=at, value=value, log=str(self.log))
        answer = self._save(self.directory, fault=fault)
        calls = self.log.read_text().splitlines()
        return answer, calls[at - 1] if at <= len(calls) else ""

    def points(self, limit: int | None) -> range:
        """The calls to fault, from 1 on; about `limit` of them, or all."""
        count = self.run(Action.COUNT)[0]["count"]
        assert count > 20
        return range(1, count + 1, 1 if limit is None else max(1, count // limit))

    def version(self) -> int | None:
        """What a reader finds; None where there is no checkpoint."""
        try:
            return version_at(self.directory / "c")
        except ckptkit.errors.NotFoundError:
            return None

    def check(self, where: str) -> int | None:
        """The version found, which is the old or the new one; a save afterwards succeeds and tidies everything."""
        version = self.version()
        assert version in ((OLD, NEW) if self._case.over else (None, NEW)), where
        ckptkit.save(self.directory / "c", {"next": 3}, force=True)
        assert version_at(self.directory / "c") == 3
        assert os.listdir(self.directory) == ["c"], where
        return version


def at_each_call(
    servers: Sequence[Server], directory: Path, case: Save, limit: int | None, strike: Callable[[Sweep, int], None]
) -> None:
    """Calls `strike` with a sweep and a call to fault, for each call; every server has a sweep and takes its share of them."""
    lanes = [Sweep(server, directory / str(n), case) for n, server in enumerate(servers)]
    points = lanes[0].points(limit)

    def strike_share(n: int) -> None:
        for at in points[n :: len(lanes)]:
            strike(lanes[n], at)

    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(strike_share, range(len(lanes))))


@sweeps(ONE, NUMPY + SHARDED_OVER)
def test_a_process_killed_at_any_call_leaves_one_whole_checkpoint(
    servers: Sequence[Server], tmp_path: Path, case: Save, limit: int
) -> None:
    def strike(sweep: Sweep, at: int) -> None:
        answer, call = sweep.run(Action.KILL, at=at)
        assert answer["status"] in (-signal.SIGKILL, 0), call  # a call may come one sooner than when it was counted
        sweep.check(f"{at}: {call}")

    at_each_call(servers, tmp_path, case, limit, strike)


REFUSALS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES]


def expect_refusal(sweep: Sweep, action: Action, number: int, at: int, case: Save) -> None:
    answer, call = sweep.run(action, number, at)
    where = f"{at}: {call} -> {answer}"
    assert answer["status"] == 0, where
    left = set(os.listdir(sweep.directory)) - {"c"}
    removing = call.startswith(("unlink", "rmdir"))
    if answer["error"] is None:
        assert sweep.version() == NEW, where
    else:
        assert (answer["error"]["type"], answer["error"]["errno"]) == ("StorageError", number), where
        assert str(sweep.directory) in answer["error"]["text"], where
        assert sweep.version() == (OLD if case.over else None), where
    assert not left or removing or action is Action.FAIL_FROM, where
    sweep.check(where)


@sweeps(ONE, NUMPY + SHARDED_OVER)
def test_a_call_that_the_system_refuses_is_one_typed_error_or_none(
    servers: Sequence[Server], tmp_path: Path, case: Save, limit: int
) -> None:
    def strike(sweep: Sweep, at: int) -> None:
        expect_refusal(sweep, Action.FAIL, REFUSALS[at % len(REFUSALS)], at, case)

    at_each_call(servers, tmp_path, case, limit, strike)


@sweeps(ONE, OVER)
def test_a_disk_that_refuses_everything_from_some_call_on_leaves_the_old_checkpoint(
    servers: Sequence[Server], tmp_path: Path, case: Save, limit: int
) -> None:
    def strike(sweep: Sweep, at: int) -> None:
        expect_refusal(sweep, Action.FAIL_FROM, REFUSALS[at % len(REFUSALS)], at, case)

    at_each_call(servers, tmp_path, case, limit, strike)


@sweeps(ONE, [case for case in OVER if case.background])
def test_a_write_that_the_system_cuts_short_is_continued(
    servers: Sequence[Server], tmp_path: Path, case: Save, limit: int
) -> None:
    def strike(sweep: Sweep, at: int) -> None:
        answer, call = sweep.run(Action.SHORT, at=at)
        assert (answer["status"], answer["error"]) == (0, None), call
        assert sweep.check(call) == NEW

    at_each_call(servers, tmp_path, case, limit, strike)


@sweeps(ONE, [case for case in OVER if not case.background])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_at_any_call_leaves_one_whole_checkpoint(
    servers: Sequence[Server], tmp_path: Path, case: Save, limit: int, number: signal.Signals
) -> None:
    def strike(sweep: Sweep, at: int) -> None:
        answer, call = sweep.run(Action.SIGNAL, number, at)
        where = f"{at}: {call} -> {answer}"
        if number is signal.SIGTERM:
            assert answer["status"] in (-number, 0), where
        elif answer.get("error"):  # none also where the signal came with the last call, and struck the server's own code
            assert answer["error"]["type"] == "KeyboardInterrupt", where
        sweep.check(where)

    at_each_call(servers, tmp_path, case, limit, strike)
