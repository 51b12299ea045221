"""Runs code in an interpreter of its own, forked from one that has imported what ckptkit needs and used none of it.

An import takes longer than what most tests try. The child has no thread, no registered plugin and no device yet, and comes to its
end as any interpreter does: it waits for its threads, then runs what was registered for the exit. What importing does, or what
must not be imported, is a matter for a `subprocess` of the test's own; so is a process that is to run beside the test.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SECS = 120


def run(code: str, *argv: object, paths: Sequence[object] = (), cwd: object = None) -> subprocess.CompletedProcess[str]:
    """Runs code as `python -c` would, and returns how it ended and what it printed.

    Args:
      code: is dedented first.
      argv: what it finds behind `sys.argv[0]`.
      paths: come first in its `sys.path`.
      cwd: the directory it runs in.
    """
    command = ["-c", textwrap.dedent(code), *map(str, argv)]
    first = [os.path.abspath(str(path)) for path in paths]
    if sys.platform != "linux":  # elsewhere a fork may not use what the system's libraries have started
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*first, os.environ.get("PYTHONPATH")]))}
        command.insert(0, sys.executable)
        return subprocess.run(command, capture_output=True, text=True, timeout=_SECS, check=False, env=env, cwd=cwd)
    with tempfile.TemporaryDirectory() as scratch:
        request = {"command": command, "paths": first, "cwd": os.path.abspath(str(cwd or os.curdir)), "printed": scratch}
        status = _server()(request | {"env": dict(os.environ)})
        out, err = (Path(scratch, name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, status, out, err)


@functools.cache
def _server() -> Any:
    """Starts the interpreter that forks; what it is called with goes to a child, whose exit code it returns."""
    server = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    atexit.register(server.communicate)
    requests, answers = server.stdin, server.stdout

    def ask(request: dict[str, Any]) -> int:
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        return int(answers.readline())

    return ask


def _fork_for_each_request() -> dict[str, Any] | None:
    """Returns a request in the child that it is for, and None in the server once there are no more."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(request: dict[str, Any]) -> types.CodeType:
    """Makes this process what was asked for, as whose `__main__` the code that is returned then runs."""
    signal.alarm(_SECS)
    for descriptor, file in enumerate([os.devnull, *(os.path.join(request["printed"], name) for name in ("stdout", "stderr"))]):
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[:0] = ["", *request["paths"]]
    _, code, *argv = request["command"]
    sys.argv = ["-c", *argv]
    sys.modules["__main__"] = types.ModuleType("__main__")
    return compile(code, "<string>", "exec", dont_inherit=True)


if __name__ == "__main__":
    import gc

    import tensorstore  # noqa: F401 - imported once here, not in every child

    import ckptkit.builtins
    import ckptkit.testing  # noqa: F401 - the same

    gc.freeze()
    if asked := _fork_for_each_request():
        exec(_become(asked), vars(sys.modules["__main__"]))  # noqa: S102 - the tests' own
