"""Faults on demand: builds the shim, starts the server, and says what a directory holds afterwards."""

from __future__ import annotations

import enum
import fcntl
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from faults.survival import Event

import ckptkit

FOLDER = Path(__file__).parent


class Action(enum.IntEnum):
    """What happens at a call; as in shim.c. `value` is an errno, a signal, microseconds, or a flag of the shutdown."""

    COUNT = 0
    KILL = 1
    FAIL = 2
    FAIL_FROM = 3
    SHORT = 4
    SHUTDOWN = 5
    UNSYNCED = 6
    SIGNAL = 7
    DELAY = 8


@attrs.frozen
class Fault:
    """Something that happens at the `at`-th mutating call below a directory.

    Attributes:
      below: the directory; a prefix of paths.
      action, value: what happens.
      at: which call, from 1 on.
      kinds: the calls that count, separated by blanks; all but flock where empty.
      log: a file for one line per call.
    """

    below: str
    action: Action = Action.COUNT
    at: int = 0
    value: int = 0
    kinds: str = ""
    log: str = ""


def built_shim(directory: Path) -> Path:
    """The compiled shim; skips the test where there is no C compiler, or nothing to preload into."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("faults are injected with LD_PRELOAD: that needs Linux and a C compiler (cc or gcc)")
    shim = directory / "shim.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", shim, FOLDER / "shim.c", "-ldl"], check=True, timeout=60)
    return shim


class Server:
    """The running server; each `run` is one child of it."""

    def __init__(self, shim: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, FOLDER / "server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )

    def run(
        self, task: str, *, fault: Fault | None = None, umask: int = 0o022, user: int = 0, **arguments: Any
    ) -> dict[str, Any]:
        """How the task ended: `status` of the child, and, where it lived, `error` and the `count` of calls."""
        request = {"task": task, "arguments": arguments, "umask": umask, "user": user}
        if fault is not None:
            request["fault"] = attrs.asdict(fault)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """Ends the server."""
        self._process.communicate(timeout=60)


class Disk:
    """A file system of its own on a loop device, whose power can be cut.

    Its image is in memory: what the power cut loses is what the file system has not given to the device.

    Args:
      kind: 'ext4' or 'xfs'.
      directory: for the mount point `path`.
    """

    _SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN

    def __init__(self, kind: str, directory: Path) -> None:
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("cutting the power of a disk needs root on Linux, to mount one")
        install(f"mkfs.{kind}", {"ext4": "e2fsprogs", "xfs": "xfsprogs"}[kind])
        self._memory = os.memfd_create("image")
        self._image, self.path = Path(f"/proc/{os.getpid()}/fd/{self._memory}"), directory / "disk"
        self.path.mkdir()
        os.truncate(self._memory, 400 << 20)  # sparse; the least that mkfs.xfs takes is 300 MB
        self._call(f"mkfs.{kind}", "-q", self._image)
        try:
            self._mount()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no loop device can be mounted here: {error.stderr}")

    def cut_power(self, *, keep_journal: bool) -> None:
        """Loses what was not synced; with `keep_journal` that is data alone, since names and sizes had just been logged."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, self._SHUTDOWN, struct.pack("I", 1 if keep_journal else 2))
        finally:
            os.close(descriptor)

    def remount(self) -> None:
        """What a computer finds when it has power again."""
        self._call("umount", self.path)
        self._mount()

    def sync(self) -> None:
        """All that is there will survive."""
        self._call("sync", "-f", self.path)

    def close(self) -> None:
        """Unmounts it and frees its memory."""
        self._call("umount", self.path)
        os.close(self._memory)

    def _mount(self) -> None:
        self._call("mount", "-o", "loop", self._image, self.path)

    def _call(self, *command: str | Path) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


class RecordedDisk:
    """A file system in memory, mounted at `path`, which answers as it is told and records what happens to it: see fuse.py."""

    def __init__(self, directory: Path) -> None:
        if sys.platform != "linux" or os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
            pytest.skip("a disk that is slow or fails needs root on Linux and /dev/fuse, to mount one")
        self.path, self._record = directory / "disk", directory / "record"
        self.path.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, FOLDER / "fuse.py", self.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            _, printed = self._process.communicate(timeout=60)
            reason = printed.splitlines()[-1]
            assert reason.startswith(("FileNotFoundError", "OSError", "PermissionError")), printed
            pytest.skip(f"FUSE cannot be mounted here: {reason}")

    def behave(self, **fields: Any) -> None:
        """From now on it answers as the fields of `Behaviour` say, and counts calls from 1."""
        self._ask(behave=fields)

    def events(self) -> list[Event]:
        """All that happened since the disk was made."""
        self._ask(record=str(self._record))
        recorded: list[Event] = pickle.loads(self._record.read_bytes())  # noqa: S301 - our own process wrote it
        return recorded

    def counts(self) -> dict[str, int]:
        """How many calls there were of each kind that can be made to fail, since `behave`."""
        return self._ask(record=os.devnull)

    def close(self) -> None:
        """Unmounts it."""
        self._process.communicate(timeout=60)

    def _ask(self, **request: Any) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        counts: dict[str, int] = json.loads(self._process.stdout.readline())
        return counts


os.environ["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"  # where mkfs and losetup are, and not every path leads


def install(program: str, package: str) -> None:
    """Skips the test where a program is missing that nothing here may install: only CI, as root, calls apt-get."""
    if shutil.which(program) is None and "CI" in os.environ and shutil.which("apt-get") and os.geteuid() == 0:
        command = ["apt-get", "install", "--yes", "--quiet", "-o", "DPkg::Lock::Timeout=60", package]
        subprocess.run(command, check=False, capture_output=True, timeout=180)
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing; install {package}")


def version_at(path: Path) -> int:
    """The version that the checkpoint at `path` holds, in every leaf of it."""
    restored = ckptkit.restore(path, devices="numpy")
    values = {int(value) for leaf in restored.values() for value in (np.min(leaf), np.max(leaf))}
    assert len(values) == 1, f"{path} is torn: {values}"
    return values.pop()
