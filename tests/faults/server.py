"""A program that has imported what a save needs and used none of it: it forks once for every task, and a fault is a child's.

Requests come as lines of JSON on stdin; for each, one line of JSON goes to stdout.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore  # noqa: F401 - imported once here, not in every child

import ckptkit
from ckptkit import discovery
from ckptkit.options import FileOptions

_CHILD_SECS = 250


def tree(kind: str, version: int) -> Any:
    """A tree whose every leaf depends on `version`; 'sharded' lies on eight devices, 'plain' is too small to be compressed."""
    size = 25_000 if kind == "plain" else 300_000
    arrays = {"small": np.full(100, version, np.float32), "large": np.full(size, version, np.int32), "number": version}
    if kind != "sharded":
        return arrays
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    return {name: jax.device_put(np.full((16, 16), version, np.float32), sharding) for name in "abc"}


def save(path: str, version: int, kind: str, storage: str, *, background: bool, mode: int | None = None) -> None:
    """Saves over whatever is at `path`."""
    value = tree(kind, version)
    options: Any = {"storage": storage, "file_options": FileOptions(path_permission_mode=mode)}
    if background:
        checkpointer = ckptkit.StandardCheckpointer(**options)
        checkpointer.save(path, value, force=True)
        checkpointer.wait_until_finished()
    else:
        ckptkit.PyTreeCheckpointer(**options).save(path, value, force=True)


def save_alone(path: str, version: int, *, force: bool) -> None:
    """Saves beside another process that does so too."""
    ckptkit.save(path, tree("numpy", version), force=force)


def overwrite_until(path: str, end: str) -> None:
    """Replaces the checkpoint by the next version of it again and again, until there is a file `end`."""
    version = 0
    while not os.path.exists(end):
        version += 1
        ckptkit.save(path, tree("numpy", version), force=True)


_TASKS: Mapping[str, Callable[..., Any]] = {"save": save, "save_alone": save_alone, "overwrite_until": overwrite_until}


def _child(request: Mapping[str, Any]) -> dict[str, Any]:
    """Does the task with the fault armed, and tells how it ended."""
    shim = ctypes.CDLL(None)
    if fault := request.get("fault"):
        log = os.open(fault["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if fault["log"] else -1
        shim.fault_arm(os.fsencode(fault["below"]), fault["kinds"].encode(), fault["at"], fault["action"], fault["value"], log)
    answer: dict[str, Any] = {"error": None}
    try:
        _TASKS[request["task"]](**request["arguments"])
    except BaseException as error:
        answer["error"] = {
            "type": type(error).__name__,
            "ours": isinstance(error, ckptkit.errors.CheckpointError),
            "errno": getattr(error, "errno", None),
            "text": str(error),
            "trace": traceback.format_exc(),
        }
    if fault:
        answer["count"] = shim.fault_count()
        shim.fault_arm(b"", b"", 0, 0, 0, -1)
    return answer


def main() -> None:
    """Answers requests until stdin ends."""
    discovery.ready(None)
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            signal.alarm(_CHILD_SECS)  # a child that hangs ends with SIGALRM
            os.umask(request.get("umask", 0o022))
            if request.get("user"):
                os.setgid(request["user"])
                os.setuid(request["user"])
            with os.fdopen(writer, "w") as report:
                json.dump(_child(request), report)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as report:
            told = report.read()
        _, status = os.waitpid(child, 0)
        answer = {"status": os.waitstatus_to_exitcode(status)} | (json.loads(told) if told else {})
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
