"""What a commit asks of the file system: to make a directory durable, to exchange two, to remove one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from ckptkit._threads import Workers
from ckptkit.location import mapped_os_errors

__all__ = ["discard", "exchange", "remove", "sync", "sync_directory", "sync_tree"]

_SYNC_THREADS: Final = 8


def sync_directory(path: str) -> None:
    """Makes a directory, with all that is in it, survive a power cut.

    Raises:
      errors.StorageError: the system refused.
    """
    with mapped_os_errors(path, "sync"):
        sync_tree(path, None)


def sync_tree(root: str, mode: int | None) -> None:
    """Syncs every file and every directory: an entry is durable once its directory is synced, in whatever order.

    Where directories get a `mode`, which may keep their owner out, the files are synced before that.
    """
    files, directories = [], []
    for directory, _, names in os.walk(root, topdown=False):
        files += [os.path.join(directory, name) for name in names]
        directories.append(directory)
    if mode is not None:
        _sync_all(files)
        files = []
        for directory in directories:
            os.chmod(directory, mode)
    _sync_all([*files, *directories])


def _sync_all(paths: Sequence[str]) -> None:
    """Syncs in threads: a journal commits at once what several wait for (15,000 files: 1.4 s instead of 12.6 s)."""

    def sync_each(part: Sequence[str]) -> None:
        for path in part:
            sync(path)

    with Workers(_SYNC_THREADS, "ckptkit-sync") as workers:
        parts = [workers.submit(sync_each, paths[i::_SYNC_THREADS]) for i in range(min(_SYNC_THREADS, len(paths)))]
        for part in parts:
            part.result()


def sync(path: str) -> None:
    """Makes what is written in one file, or the entries of one directory, survive a power cut."""
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


def exchange(a: str, b: str) -> bool:
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


def remove(path: str) -> None:
    """Removes a file, a link, or a directory with all that is in it."""
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
        return
    try:
        shutil.rmtree(path)
    except PermissionError:  # directories without write permission: `path_permission_mode` may have asked for that
        os.chmod(path, stat.S_IRWXU)
        for directory, names, _ in os.walk(path):
            for name in names:
                if not os.path.islink(inside := os.path.join(directory, name)):
                    os.chmod(inside, stat.S_IRWXU)
        shutil.rmtree(path)


def discard(directory: str) -> None:
    """Removes a directory as far as the system lets it."""
    with contextlib.suppress(OSError):
        remove(directory)
    shutil.rmtree(directory, ignore_errors=True)
