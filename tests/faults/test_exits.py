"""Programs that end with a save under way: the save is finished, or the status is not 0 and the reason is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import attrs
import pytest
from faults.injection import version_at

import ckptkit

_BEGIN = """
import atexit, os, signal, sys, threading, time
PATH = sys.argv[1]
{first}
import numpy as np
import ckptkit

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests in the background may have it ignored

def tree():
    return {{"a": np.full(1 << 20, 2, np.int32), "b": np.full(100, 2, np.int32)}}

def blocking(path=PATH):
    ckptkit.save(path, tree(), force=True)

def background(path=PATH):
    checkpointer = ckptkit.StandardCheckpointer()
    checkpointer.save(path, tree(), force=True)
    return checkpointer

def slowly():  # the commit begins half a second after the save returns
    options = ckptkit.options.AsyncOptions()
    checkpointer = ckptkit.AsyncCheckpointer(Slow(), async_options=options)
    checkpointer.save(PATH, args=ckptkit.args.PyTreeSave(tree()), force=True)
    return checkpointer

SIGNALS, COMMITTING = [], threading.Event()

class Slow(ckptkit.handlers.PyTreeCheckpointHandler):
    def finalize(self, directory):
        COMMITTING.set()
        time.sleep(0.4)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        if os.environ.get("FAIL"):
            raise OSError(28, "No space left on device")
        super().finalize(directory)

def slowly_blocking():
    ckptkit.Checkpointer(Slow()).save(PATH, args=ckptkit.args.PyTreeSave(tree()), force=True)

def started(thread):
    thread.start()
    COMMITTING.wait(30)
"""


@attrs.frozen
class Way:
    """A way to end.

    Attributes:
      code: what the program does.
      status: how it ends; negative where a signal ends it.
      finished: the save is finished; else what was there before is whole, and a status other than 0 says so.
      first: what it does before it imports ckptkit.
    """

    code: str
    status: int = 0
    finished: bool = True
    first: str = ""


_MULTIPROCESSING = """
import multiprocessing
if __name__ == "__main__":
    child = multiprocessing.get_context({method!r}).Process(target={target})
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""

WAYS = {
    "the end": Way("slowly()"),
    "the end, kept": Way("checkpointer = slowly()"),
    "sys.exit()": Way("slowly(); sys.exit()"),
    "sys.exit(0)": Way("slowly(); sys.exit(0)"),
    "sys.exit(3)": Way("slowly(); sys.exit(3)", 3),
    "sys.exit(text)": Way("slowly(); sys.exit('no')", 1),
    "raise SystemExit": Way("slowly(); raise SystemExit(4)", 4),
    "exit()": Way("slowly(); exit()"),
    "exception": Way("slowly(); raise RuntimeError('boom')", 1),
    "exception in with": Way("with slowly(): raise RuntimeError('boom')", 1),
    "KeyboardInterrupt": Way("slowly(); raise KeyboardInterrupt", -signal.SIGINT),
    "save_async": Way("handle = ckptkit.save_async(PATH, tree(), force=True)"),
    "save_async, dropped": Way("ckptkit.save_async(PATH, tree(), force=True)"),
    "several": Way("background(PATH + '2'); background(PATH + '3'); slowly()"),
    "deleted": Way("checkpointer = slowly(); del checkpointer; import gc; gc.collect()"),
    "in a thread": Way("started(threading.Thread(target=slowly))"),
    "blocking, in a thread": Way("started(threading.Thread(target=slowly_blocking))"),
    "in a daemon thread": Way("started(threading.Thread(target=slowly, daemon=True))"),
    "blocking, in a daemon thread": Way("started(threading.Thread(target=slowly_blocking, daemon=True))"),
    "begun in a thread that outlives main": Way(
        "threading.Thread(target=lambda: (threading.main_thread().join(), slowly())).start()"
    ),
    "blocking, in a thread that outlives main": Way(
        "threading.Thread(target=lambda: (threading.main_thread().join(), blocking())).start()"
    ),
    "in an exit handler": Way("atexit.register(slowly)"),
    "blocking, in an exit handler": Way("atexit.register(blocking)"),
    "in an exit handler older than ckptkit": Way("", first="atexit.register(lambda: slowly())"),
    "blocking, in an exit handler older than ckptkit": Way("", first="atexit.register(lambda: blocking())"),
    "in an executor": Way("from concurrent.futures import ThreadPoolExecutor as P; P(1).submit(slowly)"),
    "in a running event loop": Way("import asyncio\nasync def main(): slowly()\nasyncio.run(main())"),
    "in asyncio.to_thread": Way("import asyncio\nasync def main(): await asyncio.to_thread(slowly)\nasyncio.run(main())"),
    "sys.exit in a running event loop": Way("import asyncio\nasync def main(): slowly(); sys.exit(5)\nasyncio.run(main())", 5),
    "SIGTERM": Way("SIGNALS.append(signal.SIGTERM); slowly(); time.sleep(9)", -signal.SIGTERM, finished=False),
    "SIGTERM with a handler": Way(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); SIGNALS.append(signal.SIGTERM); slowly(); time.sleep(9)", 7
    ),
    "SIGINT": Way("SIGNALS.append(signal.SIGINT); slowly(); time.sleep(9)", -signal.SIGINT),
    "SIGINT while the exit waits": Way("SIGNALS.append(signal.SIGINT); slowly()"),
    "SIGHUP": Way("SIGNALS.append(signal.SIGHUP); slowly(); time.sleep(9)", -signal.SIGHUP, finished=False),
    "a forked child": Way(_MULTIPROCESSING.format(method="fork", target="slowly")),
    "a spawned child": Way(_MULTIPROCESSING.format(method="spawn", target="slowly")),
    # Ways in which the save cannot be finished.
    "failing": Way("os.environ['FAIL'] = '1'; slowly()", 1, finished=False),
    "failing, sys.exit(3)": Way("os.environ['FAIL'] = '1'; slowly(); sys.exit(3)", 1, finished=False),
    "failing in a daemon thread": Way(
        "os.environ['FAIL'] = '1'; started(threading.Thread(target=slowly, daemon=True))", 1, finished=False
    ),
    "failing in a forked child": Way(
        "os.environ['FAIL'] = '1'" + _MULTIPROCESSING.format(method="fork", target="slowly"), 1, finished=False
    ),
    "failing in a spawned child": Way(
        "os.environ['FAIL'] = '1'" + _MULTIPROCESSING.format(method="spawn", target="slowly"), 1, finished=False
    ),
    "SIGINT twice while the exit waits": Way("SIGNALS += [signal.SIGINT] * 2; slowly()", 1, finished=False),
}
QUICK = ["blocking, in a daemon thread", "in an exit handler older than ckptkit", "failing in a forked child"]


def _end(directory: Path, way: Way) -> subprocess.CompletedProcess[str]:
    script = directory / "program.py"  # a file, since a spawned child imports it
    script.write_text(_BEGIN.format(first=way.first) + textwrap.dedent(way.code) + "\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, script, directory / "c"], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in WAYS])
def test_a_save_under_way_is_finished_or_the_end_says_why(tmp_path: Path, name: str) -> None:
    way = WAYS[name]
    ckptkit.save(tmp_path / "c", {"a": 1})
    done = _end(tmp_path, way)
    assert done.returncode == way.status, done.stderr
    assert version_at(tmp_path / "c") == (2 if way.finished else 1), done.stderr
    if way.status == 1 and not way.finished:
        assert "ckptkit: " in done.stderr
    ckptkit.save(tmp_path / "c", {"a": 3}, force=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("c.")]


def test_exit_handlers_older_than_ckptkit_run_also_where_a_save_failed(tmp_path: Path) -> None:
    way = Way("os.environ['FAIL'] = '1'; slowly()", first="atexit.register(print, 'older')")
    done = _end(tmp_path, way)
    assert done.returncode == 1
    assert "older" in done.stdout
    assert "No space left" in done.stderr
