"""Locks on directories, which a killed process gives back."""

from __future__ import annotations

import errno
import os
import sys
import weakref

if sys.platform != "win32":
    import fcntl

__all__ = ["Lock", "try_lock"]

_held: weakref.WeakSet[Lock] = weakref.WeakSet()
"""The open locks of this process."""


class Lock:
    """The exclusive lock of a directory; it lasts until the descriptor is closed, also where its process is killed.

    Windows has no locks on directories, and some network file systems have none: there a second writer is not noticed.
    """

    _descriptor: int | None = None

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(os.devnull if sys.platform == "win32" else path, os.O_RDONLY)
        _held.add(self)

    def take(self, *, required: bool = False) -> bool:
        """Whether it is free, and taken now. Where there are no locks it counts as taken, unless one is `required`."""
        if sys.platform == "win32" or self._descriptor is None:
            return not required
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP) and not required
        return True

    def is_at(self, path: str) -> bool:
        """Whether the directory at `path` is the one that is locked; others may have renamed it, or put another in its place."""
        if sys.platform == "win32":
            return True
        try:
            return self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), os.stat(path))
        except OSError:
            return False

    def close(self) -> None:
        """Gives the lock back; no harm where that was done before."""
        _held.discard(self)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:  # where Ctrl-C came before anybody owned it
        self.close()


def try_lock(path: str, *, required: bool = False) -> Lock | None:
    """The lock of a directory, or of nothing where the directory is gone; None where another holds it; see `Lock.take`."""
    try:
        lock = Lock(path)
    except FileNotFoundError:
        return Lock(os.devnull)
    return lock if lock.take(required=required) else None


def _close_copies() -> None:
    """In a forked process: a lock lasts until the last copy of its descriptor is closed."""
    for lock in list(_held):
        lock.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_copies)
