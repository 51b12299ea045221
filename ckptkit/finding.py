"""Finding the checkpoint that is to be read, and noticing that another one took its place while it was.

Writers wait for no reader, and readers lock nothing: they look where `commit` may have put a checkpoint, tell by its directory
and its list of files whether it is still the one they began to read, and begin again where it is not.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final

from ckptkit import _marker, errors
from ckptkit.commit import ASIDE_SUFFIX, TEMPORARY_SUFFIX
from ckptkit.file_list import FILE_LIST
from ckptkit.location import FileLocation, Location, MarkerLocation
from ckptkit.metadata.step import STEP_FILE
from ckptkit.restoration import Restoration, current_restoration

__all__ = ["Attempt", "attempts", "resolve"]

_MAX_ATTEMPTS: Final = 100
_PAUSE_SECS: Final = 0.1
"""Until processes look again that see different checkpoints: clients of NFS keep what they know of directories for seconds."""


def resolve(location: Location) -> Location:
    """Where the checkpoint at `location` is to be read: there, or where an overwrite has put it.

    Raises:
      errors.NotFoundError: there is none.
      errors.IncompleteError: a save that never finished is there.
    """
    if isinstance(location, MarkerLocation):
        return _marker.resolve(location)
    if location.local_path is None:
        return location
    found = _resolve(location.local_path)
    committed = _marker.identity(found)  # one that was copied here from a place without renames may lie in a folder of its own
    return found if committed is None else _marker.data_location(found, committed)


def _resolve(path: str) -> FileLocation:
    if os.path.basename(path).endswith(TEMPORARY_SUFFIX):
        raise errors.IncompleteError(f"Found incomplete checkpoint at {path}: this is the temporary directory of a save.")
    if os.path.isdir(path):
        return FileLocation(path)
    if os.path.isdir(path + ASIDE_SUFFIX):
        return FileLocation(path + ASIDE_SUFFIX)
    if os.path.exists(path):
        raise errors.NotFoundError(errno.ENOTDIR, "this is a file, and no storage backend recognises it", path)
    raise errors.NotFoundError(errno.ENOENT, f"no checkpoint here; {_neighbours(path)}", path)


def attempts(find: Callable[[], Location]) -> Iterator[Attempt]:
    """Attempts at reading a checkpoint where `find` says that it is, until one is not disturbed; each is a context manager.

    Files are opened by path: where another checkpoint took this one's place meanwhile, an error is passed over, and there is
    a further attempt, at the new one. Processes that read together make each attempt together, at the same checkpoint.

    Raises:
      errors.BusyError: others replaced the checkpoint during each of a hundred attempts.
      what `find` raises.
    """
    meeting = current_restoration()
    for _ in range(_MAX_ATTEMPTS):
        location = find()
        attempt = Attempt(location, meeting)
        if meeting.job.others and not meeting.stands("version", _version(location)):
            time.sleep(_PAUSE_SECS)
        else:
            yield attempt
            if not attempt.disturbed:
                return
        meeting.start_over()
    raise errors.BusyError(
        f"{location.url}: while it was read, another checkpoint took its place, {_MAX_ATTEMPTS} times in a row; "
        "replace it less often than reading it takes, or read one that stays."
    )


class Attempt:
    """Reads where a checkpoint is to be read, which the `with` statement gives; `disturbed` tells whether that held."""

    def __init__(self, location: Location, meeting: Restoration) -> None:
        self._location = location
        self._meeting = meeting
        self._seen = _seen(location)
        self.disturbed = False

    def __enter__(self) -> Location:
        return self._location

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if error is not None and not isinstance(error, errors.CheckpointError):
            return False
        seen = _seen(self._location)
        if seen[0] != self._seen[0] or (error is not None and seen[1] != self._seen[1]):
            self.disturbed = self._meeting.give_up_attempt()
        elif error is None and self._meeting.job.others:
            self.disturbed = not self._meeting.stands("end")
        else:
            self.disturbed = self._meeting.given_up
        return self.disturbed


def _version(location: Location) -> bytes:
    """What tells one checkpoint from another on every process alike, by when it was saved; b'' where nothing says so.

    An inode's number and times are not the same on every machine that mounts a file system.
    """
    with contextlib.suppress(errors.NotFoundError):  # it is being replaced, which `Attempt` notices
        if location.exists(STEP_FILE):
            return hashlib.blake2b(location.read_bytes(STEP_FILE), digest_size=16).digest()
    return b""


def _seen(location: Location) -> tuple[object, tuple[int, int] | None]:
    """What tells a checkpoint from another that took its place, or None; and when its directory last changed, as by a deletion.

    An inode's number alone is no identity: ext4 gives that of a deleted directory to the next one, so that after two overwrites
    it is the same again. What tells is the list of files, or, where there is none, those times. They are no part of it otherwise,
    since somebody may put a file beside those of the checkpoint; that one of these is gone, the list tells.
    """
    if isinstance(location, MarkerLocation):
        committed = _marker.identity(location)
        return object() if committed is None else committed, None  # what is gone is equal to nothing
    path = location.local_path or ""
    try:
        found = os.stat(path)
    except OSError:
        return None, None
    times = found.st_mtime_ns, found.st_ctime_ns
    try:
        listed = os.stat(f"{path}/{FILE_LIST}")
    except OSError:
        return (found.st_dev, found.st_ino, *times), times
    return (found.st_dev, found.st_ino, listed.st_ino, listed.st_mtime_ns, listed.st_size), times


def _neighbours(path: str) -> str:
    """What there is instead, for the message of a missing checkpoint."""
    if os.path.isdir(path + TEMPORARY_SUFFIX):
        return f"a save to it never finished, or is under way ({path + TEMPORARY_SUFFIX})"
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        return f"not even the directory above it exists ({parent})"
    names = sorted(name for name in os.listdir(parent) if not name.endswith(TEMPORARY_SUFFIX))
    return f"{parent} holds {', '.join(names[:20]) or 'nothing'}{' ...' if len(names) > 20 else ''}"
