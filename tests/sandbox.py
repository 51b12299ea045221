"""Opens damaged and hostile checkpoints in children that may die, and tells what came of each.

The children are forked from a server that has imported ckptkit and used none of it, as many at a time as there are cores. Each
has 1 GiB of address space beyond what it has when a sound checkpoint is restored, opens up to a thousand checkpoints one
after another, and is killed where one takes too long.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest

import ckptkit
from ckptkit import errors
from ckptkit.file_list import FILE_LIST
from ckptkit.testing import assert_same

NEEDS_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space hold on Linux, and /proc tells of it")

_MEMORY = 1 << 30
_PATIENCE_SECS = 30
_BATCH = 1000
_SCRATCH = next(filter(os.path.isdir, ["/dev/shm"]), None)  # noqa: S108 - in memory where there is such a place
_SERVER = multiprocessing.get_context("forkserver") if sys.platform == "linux" else multiprocessing.get_context()
_SERVER.set_forkserver_preload(["pytest", "jax.numpy", "ckptkit.builtins", "ckptkit.testing"])  # a child would take seconds to


class Outcome(NamedTuple):
    """What came of opening one checkpoint.

    Attributes:
      kind: 'right' (the values that were saved), 'refused' (an error of ours); and what must not be: 'wrong' (other values),
        'foreign' (an error of others), 'crash', 'hang'.
      detail: the error, or what differs.
      peak_nbytes: the most memory taken so far beyond what restoring a sound checkpoint takes.
    """

    kind: str
    detail: str = ""
    peak_nbytes: int = 0

    @property
    def good(self) -> bool:
        return self.kind in ("right", "refused")


class Damage(NamedTuple):
    """One file of a checkpoint replaced; None: removed."""

    file: str
    data: bytes | None


def files_of(directory: str) -> list[str]:
    """The files below a directory, relative to it."""
    found = (os.path.join(place, name) for place, _, names in os.walk(directory) for name in names)
    return sorted(os.path.relpath(path, directory) for path in found)


def read(directory: str, file: str) -> bytes:
    with open(os.path.join(directory, file), "rb") as opened:
        return opened.read()


def write(directory: str, file: str, data: bytes) -> None:
    with open(os.path.join(directory, file), "wb") as opened:
        opened.write(data)


def unlisted(checkpoint: Any) -> str:
    """The checkpoint without its list of files, as a stranger may make it, so that what is changed in it reaches its parser."""
    os.unlink(os.path.join(checkpoint, FILE_LIST))
    return os.fspath(checkpoint)


def open_hostile(path: Any) -> Outcome:
    """What comes of opening a checkpoint of a stranger, whatever its values are."""
    return _outcomes(_HostileOpener(), [os.fspath(path)])[0]


def open_variants(checkpoint: Any, changes: Mapping[str, Callable[[str], Any]]) -> dict[str, Outcome]:
    """What comes of opening copies of a checkpoint that the functions change, by the names of the changes; in one child."""
    paths = [shutil.copytree(checkpoint, f"{checkpoint}-{i}") for i in range(len(changes))]
    for path, change in zip(paths, changes.values(), strict=True):
        change(path)
    return dict(zip(changes, _outcomes(_HostileOpener(), paths), strict=True))


def open_damaged(checkpoint: Any, damages: Sequence[Damage], *, brief: bool = False) -> list[Outcome]:
    """What comes of opening a sound checkpoint with each damage; where a child ended, that of another try, alone.

    Args:
      checkpoint: the sound one, which is copied.
      damages: done and undone one after another.
      brief: what is refused when its metadata are read is not restored as well.
    """
    opener = _DamagedOpener(os.fspath(checkpoint), brief=brief)
    outcomes = _outcomes(opener, damages)
    return [_outcomes(opener, [d])[0] if o.kind in ("crash", "hang") else o for o, d in zip(outcomes, damages, strict=True)]


class _HostileOpener:
    def open(self, path: str) -> Outcome:
        return _opened(path, None)


class _DamagedOpener:
    def __init__(self, checkpoint: str, *, brief: bool) -> None:
        self._checkpoint = checkpoint
        self._brief = brief
        self._copy = ""
        self._expected: list[Any] = []

    def open(self, damage: Damage) -> Outcome:
        if not self._copy:
            self._copy = shutil.copytree(self._checkpoint, os.path.join(tempfile.mkdtemp(), "copy"))
            self._expected = [part(self._copy) for part in _PARTS]
        sound = read(self._copy, damage.file)
        try:
            if damage.data is None:
                os.unlink(os.path.join(self._copy, damage.file))
            else:
                write(self._copy, damage.file, damage.data)
            return _opened(self._copy, self._expected, brief=self._brief)
        finally:
            write(self._copy, damage.file, sound)


def _custom(path: str) -> Any:
    """The metadata that users gave; what is returned beside it differs by design when files are missing."""
    step = ckptkit.Checkpointer().metadata(path)
    return [step.custom_metadata, getattr(step.item_metadata, "custom_metadata", None)]


def _restored(path: str) -> Any:
    found = ckptkit.restore(path)
    return dict(found) if isinstance(found, ckptkit.args.Composite) else found


_PARTS: tuple[Callable[[str], Any], ...] = (_custom, _restored)


def _opened(path: str, expected: Sequence[Any] | None, *, brief: bool = False) -> Outcome:
    outcome = Outcome("right")
    for i, part in enumerate(_PARTS):
        try:
            found = part(path)
        except errors.CheckpointError as error:
            outcome = Outcome("refused", f"{type(error).__name__}: {error}")
            if brief:
                return outcome
            continue
        except BaseException as error:  # whatever it is, it is not ours
            return Outcome("foreign", repr(error))
        try:
            if expected is not None:
                assert_same(found, expected[i])
        except (AssertionError, AttributeError) as error:
            return Outcome("wrong", str(error)[:500])
    return outcome


def _outcomes(opener: Any, inputs: Sequence[Any]) -> list[Outcome]:
    batches = [inputs[i : i + _BATCH] for i in range(0, len(inputs), _BATCH)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(itertools.chain.from_iterable(pool.map(functools.partial(_of_batch, opener), batches)))


def _of_batch(opener: Any, inputs: Sequence[Any]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while len(outcomes) < len(inputs):
        outcomes += _of_one_child(opener, inputs[len(outcomes) :])
    return outcomes


def _of_one_child(opener: Any, inputs: Sequence[Any]) -> Iterator[Outcome]:
    """The outcomes up to the first that ends the child."""
    receiver, sender = _SERVER.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(dir=_SCRATCH) as scratch, receiver:
        child = _SERVER.Process(target=_serve, args=(sender, scratch, opener, inputs), daemon=True)
        child.start()
        sender.close()
        try:
            receiver.recv()  # it is ready
            for _ in inputs:
                if not receiver.poll(_PATIENCE_SECS):
                    yield Outcome("hang", f"no answer after {_PATIENCE_SECS} s")
                    return
                try:
                    yield receiver.recv()
                except EOFError:
                    child.join(_PATIENCE_SECS)
                    yield Outcome("crash", f"exit code {child.exitcode}")
                    return
        finally:
            child.kill()
            child.join()


def _serve(sender: Connection, scratch: str, opener: Any, inputs: Sequence[Any]) -> None:
    """The child: opens each input, and sends what came of it."""
    tempfile.tempdir = scratch
    warnings.simplefilter("ignore")
    with contextlib.closing(sender):
        ckptkit.save(os.path.join(scratch, "sound"), {"a": jnp.arange(3), "b": 1})
        ckptkit.restore(os.path.join(scratch, "sound"))
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + _MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before = _status("VmRSS")
        sender.send(None)
        for each in inputs:
            sender.send(opener.open(each)._replace(peak_nbytes=max(0, _status("VmHWM") - before)))


def _status(field: str) -> int:
    """A size from /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(f"{field}:"))
