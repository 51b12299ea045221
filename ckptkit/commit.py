"""From a temporary directory to a checkpoint: whole, durable, or not there.

A save writes into `<name>.orbax-checkpoint-tmp`, whose writer holds a lock on the directory itself (flock on its inode),
so that a killed writer's lock is gone with it. Committing syncs every file and directory, renames, and syncs the parent.
With `force`, old and new are exchanged in one step where the system can (Linux: renameat2, macOS: renamex_np), else the
old one is set aside under `<name>.ckptkit-old.orbax-checkpoint-tmp` between two renames, where `resolve` still finds it.
Only then is the old one deleted.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from ckptkit import errors
from ckptkit._threads import Workers
from ckptkit.location import FileLocation, Location, mapped_os_errors

if sys.platform != "win32":
    import fcntl

__all__ = ["TEMPORARY_SUFFIX", "Pending", "begin", "check_free", "identity", "resolve"]

TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"
_ASIDE_SUFFIX = f".ckptkit-old{TEMPORARY_SUFFIX}"
_SYNC_THREADS: Final = 8


def resolve(location: FileLocation) -> FileLocation:
    """Where the checkpoint at `location` is to be read: there, or where an interrupted overwrite set it aside.

    Raises:
      errors.NotFoundError: there is none.
      errors.IncompleteError: a save that never finished is there.
    """
    path = location.local_path
    if os.path.basename(path).endswith(TEMPORARY_SUFFIX):
        raise errors.IncompleteError(f"Found incomplete checkpoint at {path}: this is the temporary directory of a save.")
    if os.path.isdir(path):
        return location
    if os.path.isdir(path + _ASIDE_SUFFIX):
        return FileLocation(path + _ASIDE_SUFFIX)
    if os.path.exists(path):
        raise errors.NotFoundError(errno.ENOTDIR, "a checkpoint is a directory, this is a file", path)
    raise errors.NotFoundError(errno.ENOENT, f"no checkpoint here; {_neighbours(path)}", path)


def identity(location: Location) -> tuple[int, int, int] | None:
    """What tells one checkpoint from another that took its place; None where there is none, or nothing to tell.

    The time is among it, since the number of a deleted directory's inode is soon given to another.
    """
    try:
        status = os.stat(location.local_path or "")
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _neighbours(path: str) -> str:
    """What there is instead, for the message of a missing checkpoint."""
    if os.path.isdir(path + TEMPORARY_SUFFIX):
        return f"a save to it never finished, or is under way ({path + TEMPORARY_SUFFIX})"
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        return f"not even the directory above it exists ({parent})"
    names = sorted(name for name in os.listdir(parent) if not name.endswith(TEMPORARY_SUFFIX))
    return f"{parent} holds {', '.join(names[:20]) or 'nothing'}{' ...' if len(names) > 20 else ''}"


def check_free(location: FileLocation, *, force: bool) -> None:
    """Refuses a destination that is taken, or of a name that no checkpoint can have; makes nothing.

    Raises:
      errors.ExistsError: the destination exists, and `force` is False.
      errors.ArgsError: the name is one for unfinished saves.
    """
    path = location.local_path
    if path.endswith(TEMPORARY_SUFFIX):
        raise errors.ArgsError(f"{path}: names that end in {TEMPORARY_SUFFIX} are for unfinished saves; choose another.")
    if not force and (os.path.lexists(path) or os.path.isdir(path + _ASIDE_SUFFIX)):
        raise _exists(path)


def begin(location: FileLocation, *, force: bool, mode: int | None) -> Pending:
    """A locked, empty temporary directory for a save to `location`; what a killed save left there is removed.

    Args:
      location: where the checkpoint will be.
      force: an existing checkpoint will be replaced.
      mode: permission bits of the checkpoint's directories; None leaves them to the umask.

    Raises:
      errors.ExistsError: the destination exists, and `force` is False.
      errors.BusyError: another writer is saving to it.
      errors.StorageError: the directory cannot be made.
    """
    path = location.local_path
    with mapped_os_errors(path, "prepare the save"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        check_free(location, force=force)
        lock = _locked_directory(path + TEMPORARY_SUFFIX, path)
        try:
            _empty(path + TEMPORARY_SUFFIX)
            _recover(path)
            if mode is not None:
                os.chmod(path + TEMPORARY_SUFFIX, mode)
        except BaseException:
            os.close(lock)
            raise
    return Pending(path, lock, force=force, mode=mode)


class Pending:
    """A save under way; exactly one of `commit` and `abandon` ends it."""

    def __init__(self, path: str, lock: int, *, force: bool, mode: int | None) -> None:
        self.path = path
        self.temporary = FileLocation(path + TEMPORARY_SUFFIX)
        self._lock = lock
        self._force = force
        self._mode = mode

    def commit(self) -> None:
        """Makes the checkpoint visible; when it returns, it survives a power cut.

        Raises:
          errors.ExistsError: the destination has come into being meanwhile, and `force` is False.
          errors.StorageError: the system refused; the old checkpoint is still there.
        """
        with mapped_os_errors(self.path, "commit the checkpoint"):
            _sync_tree(self.temporary.local_path, self._mode)
            if not os.path.lexists(self.path):
                os.rename(self.temporary.local_path, self.path)
                _sync(os.path.dirname(self.path))
            elif not self._force:
                raise _exists(self.path)
            else:
                self._replace()
        os.close(self._lock)

    def _replace(self) -> None:
        """Puts the new checkpoint in the old one's place, and deletes the old one."""
        old = _try_lock(self.path)
        new = self.temporary.local_path
        try:
            exchanged = _exchange(new, self.path)
            leftover = new if exchanged else self.path + _ASIDE_SUFFIX
            if not exchanged:
                os.rename(self.path, leftover)
            try:
                if not exchanged:
                    os.rename(new, self.path)
                _sync(os.path.dirname(self.path))
            except BaseException:
                with contextlib.suppress(OSError):  # the old one must not go with the temporary directory
                    _put_back(leftover, self.path, exchanged=exchanged)
                raise
            with contextlib.suppress(OSError):  # the new one is durable; the next save to this name tidies what stays
                _remove(leftover)
        finally:
            if old is not None:
                os.close(old)

    def abandon(self) -> None:
        """Removes what was written; never raises, since it runs where something else went wrong."""
        shutil.rmtree(self.temporary.local_path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)


def _put_back(old: str, path: str, *, exchanged: bool) -> None:
    """Undoes a replacement that is not durable."""
    if exchanged:
        _exchange(old, path)
        return
    if os.path.lexists(path):
        os.rename(path, path + TEMPORARY_SUFFIX)
    os.rename(old, path)


def _exists(path: str) -> errors.ExistsError:
    return errors.ExistsError(f"Destination {path} already exists. Pass force=True to replace it, or save to another path.")


def _locked_directory(temporary: str, path: str) -> int:
    """A descriptor of the temporary directory that holds its lock; the directory is made where it is missing."""
    for _ in range(10):
        with contextlib.suppress(FileExistsError):
            os.mkdir(temporary)
        lock = _try_lock(temporary)
        if lock is None:
            raise errors.BusyError(f"{path}: another save to this path is under way ({temporary} is locked); wait for it.")
        # Between mkdir and lock its former holder may have renamed the directory away: then this locks a committed one.
        with contextlib.suppress(FileNotFoundError):
            if sys.platform == "win32" or os.path.samestat(os.fstat(lock), os.stat(temporary)):
                return lock
        os.close(lock)
    raise errors.BusyError(f"{path}: other saves to this path keep coming; let one writer at a time save to it.")


def _try_lock(path: str) -> int | None:
    """A descriptor that holds the exclusive lock of a directory; None where another holds it.

    Windows has no locks on directories: there a second writer is not noticed.
    """
    if sys.platform == "win32":
        return os.open(os.devnull, os.O_RDONLY)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(os.devnull, os.O_RDONLY)  # gone meanwhile; the caller notices that this is another file
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            return descriptor  # some network file systems have no locks: there a second writer is not noticed
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return descriptor


def _recover(path: str) -> None:
    """Finishes what an overwrite that was killed between its two renames left."""
    aside = path + _ASIDE_SUFFIX
    if not os.path.isdir(aside):
        return
    if os.path.lexists(path):
        _remove(aside)
    else:
        os.rename(aside, path)


def _empty(directory: str) -> None:
    with os.scandir(directory) as entries:
        for entry in list(entries):
            _remove(entry.path)


def _remove(path: str) -> None:
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
    else:
        shutil.rmtree(path)


def _sync_tree(root: str, mode: int | None) -> None:
    """Syncs every file, then every directory: a directory's entry is durable once its parent is synced."""
    files, directories = [], []
    for directory, _, names in os.walk(root, topdown=False):
        files += [os.path.join(directory, name) for name in names]
        directories.append(directory)
    _sync_all(files)
    if mode is not None:
        for directory in directories:
            os.chmod(directory, mode)
    _sync_all(directories)


def _sync_all(paths: Sequence[str]) -> None:
    """Syncs in threads: a journal commits at once what several wait for (15,000 files: 1.4 s instead of 12.6 s)."""

    def sync(part: Sequence[str]) -> None:
        for path in part:
            _sync(path)

    with Workers(_SYNC_THREADS, "ckptkit-sync") as workers:
        parts = [workers.submit(sync, paths[i::_SYNC_THREADS]) for i in range(min(_SYNC_THREADS, len(paths)))]
        for part in parts:
            part.result()


def _sync(path: str) -> None:
    if os.path.isdir(path) and sys.platform == "win32":
        return  # Windows cannot open a directory to sync it
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange_function() -> Callable[[bytes, bytes], int] | None:
    """The system's call that exchanges two paths in one step, or None where it has none."""
    try:
        libc: Any = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return lambda a, b: int(libc.renamex_np(a, b, 2))  # RENAME_SWAP
        at_cwd, rename_exchange = -100, 2  # <fcntl.h>, <linux/fs.h>
        renameat2 = libc.renameat2
    except (OSError, AttributeError, TypeError):
        return None
    return lambda a, b: int(renameat2(at_cwd, a, at_cwd, b, rename_exchange))


def _exchange(a: str, b: str) -> bool:
    """Exchanges two directories in one step; False where the system or the file system cannot."""
    function = _exchange_function()
    if function is None:
        return False
    if function(os.fsencode(a), os.fsencode(b)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), b)
