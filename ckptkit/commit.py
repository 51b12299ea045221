"""From a temporary directory to a checkpoint: whole, durable, or not there.

A save writes into `<name>.orbax-checkpoint-tmp`, whose writer holds a lock on the directory itself (flock on its inode),
so that a killed writer's lock is gone with it. Committing syncs every file and directory, renames, and syncs the parent.
With `force`, old and new are exchanged in one step where the system can (Linux: renameat2, macOS: renamex_np), else the
old one is set aside under `<name>.ckptkit-old.orbax-checkpoint-tmp` between two renames, where readers still find it.
Only then is the old one deleted.

That is how it is in directories of this machine; in other places a file written last decides, see `_marker`. Both make
directories that Orbax opens, except that the second save to the same place in an object store lies in a folder of it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from typing import Final

from ckptkit import _marker, errors
from ckptkit._filesystem import discard, exchange, remove, sync, sync_tree
from ckptkit._locks import Lock, try_lock
from ckptkit.file_list import FILE_LIST
from ckptkit.location import FileLocation, Location, MarkerLocation, mapped_os_errors
from ckptkit.metadata.step import STEP_FILE, decode_step
from ckptkit.reports import CleanReport

__all__ = [
    "ASIDE_SUFFIX",
    "TEMPORARY_SUFFIX",
    "AnyPending",
    "Pending",
    "begin",
    "check_free",
    "clean",
]

TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"
ASIDE_SUFFIX = f".ckptkit-old{TEMPORARY_SUFFIX}"
_FOREIGN_SECS: Final = 120
"""For so long after its last change, an unfinished save of another program's is taken to be under way."""


def check_free(path: str, *, force: bool) -> None:
    """Refuses a destination that is taken, or of a name that no checkpoint can have; makes nothing.

    Raises:
      errors.ExistsError: the destination exists, and `force` is False.
      errors.ArgsError: the name is one for unfinished saves.
    """
    if path.endswith(TEMPORARY_SUFFIX):
        raise errors.ArgsError(f"{path}: names that end in {TEMPORARY_SUFFIX} are for unfinished saves; choose another.")
    if not force and (os.path.lexists(path) or os.path.isdir(path + ASIDE_SUFFIX)):
        raise _exists(path)


def begin(location: Location, *, force: bool, mode: int | None) -> AnyPending:
    """An empty place for a save to `location` to write to. In a directory of this machine it is locked.

    Args:
      location: where the checkpoint will be.
      force: an existing checkpoint will be replaced.
      mode: permission bits of the checkpoint's directories; None leaves them to the umask.

    Raises:
      errors.ExistsError: the destination exists, and `force` is False.
      errors.BusyError: another writer is saving to it, or another program's has done so just now.
      errors.StorageError: the directory cannot be made, or the store refuses.
      errors.ArgsError: the name is reserved, or the place is of a kind that can only be read.
    """
    if isinstance(location, MarkerLocation):
        return _marker.begin(location, force=force)
    path = location.local_path
    if path is None:
        raise errors.ArgsError(f"{location.url}: a checkpoint is saved to a local directory or to a MarkerLocation, not here.")
    return _begin(path, force=force, mode=mode)


def _begin(path: str, *, force: bool, mode: int | None) -> Pending:
    """A locked, empty temporary directory; what a killed save left there is removed, another program's after two minutes."""
    check_free(path, force=force)
    with mapped_os_errors(path, "prepare the save"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lock = _locked_directory(path + TEMPORARY_SUFFIX, path)
        try:
            _refuse_foreign(path)
            _settle(path)
        except BaseException:
            lock.close()  # what was found stays
            raise
        try:
            _empty(path + TEMPORARY_SUFFIX)
            _recover(path)
            if mode is not None:
                os.chmod(path + TEMPORARY_SUFFIX, mode | stat.S_IRWXU)  # `commit` sets it as it was asked for
            return Pending(path, lock, force=force, mode=mode)
        except BaseException:
            _remove_locked(path + TEMPORARY_SUFFIX, lock)
            raise


class Pending:
    """A save under way; exactly one of `commit` and `abandon` ends it."""

    def __init__(self, path: str, lock: Lock, *, force: bool, mode: int | None) -> None:
        self.path = path
        self.temporary = FileLocation(path + TEMPORARY_SUFFIX)
        self._lock = lock
        self._force = force
        self._mode = mode
        self._is_undone = True  # whatever was renamed, durably

    def commit(self) -> None:
        """Makes the checkpoint visible; when it returns, it survives a power cut.

        Raises:
          errors.ExistsError: the destination has come into being meanwhile, and `force` is False.
          errors.StorageError: the system refused; the old checkpoint is still there.
        """
        with mapped_os_errors(self.path, "commit the checkpoint"):
            sync_tree(self.temporary.local_path, self._mode)
            if not os.path.lexists(self.path):
                self._place()
            elif not self._force:
                raise _exists(self.path)
            else:
                self._replace()
        self._lock.close()

    def _place(self) -> None:
        """Gives the new checkpoint its name, where there is no old one."""
        new = self.temporary.local_path
        os.rename(new, self.path)
        try:
            sync(os.path.dirname(self.path))
        except BaseException:
            with contextlib.suppress(OSError):
                if self._lock.is_at(self.path):  # and not another save's, which replaced it meanwhile
                    with self._undoing():
                        os.rename(self.path, new)
            raise

    def _replace(self) -> None:
        """Puts the new checkpoint in the old one's place, and deletes the old one."""
        old = try_lock(self.path)
        new = self.temporary.local_path
        try:
            exchanged = exchange(new, self.path)
            leftover = new if exchanged else self.path + ASIDE_SUFFIX
            if not exchanged:
                os.rename(self.path, leftover)
            try:
                if not exchanged:
                    os.rename(new, self.path)
                sync(os.path.dirname(self.path))
            except BaseException:
                with contextlib.suppress(OSError), self._undoing():  # the old one must not go with the temporary directory
                    _put_back(leftover, self.path, exchanged=exchanged)
                raise
            discard(leftover)  # the new one is durable; the next save to this name tidies what stays
        finally:
            if old is not None:
                old.close()

    @contextlib.contextmanager
    def _undoing(self) -> Iterator[None]:
        """Makes a rename back durable. Until it is, the new files stay: a power cut may leave the checkpoint's name with them."""
        self._is_undone = False
        yield
        sync(os.path.dirname(self.path))
        self._is_undone = True

    def overtaken(self) -> errors.CheckpointError | None:
        """The error where another save was committed meanwhile; None, since a lock keeps others out until this one ends."""
        return None

    def abandon(self) -> None:
        """Removes what was written, or leaves that to the next save; never raises, since something else went wrong before."""
        if self._is_undone:
            _remove_locked(self.temporary.local_path, self._lock)
        else:
            self._lock.close()


AnyPending = Pending | _marker.Pending


def clean(root: str | os.PathLike[str], *, dry_run: bool = False) -> CleanReport:
    """Tidies what killed saves left in the directory `root`, of whatever name; a later save tidies only what has its own.

    A temporary directory that a live writer has locked is left alone, and so is one of another program's, or on a file system
    without locks. A checkpoint that an interrupted overwrite set aside gets its name back where that is free.

    Args:
      root: the directory that holds checkpoints.
      dry_run: only tell what would be done.

    Raises:
      errors.ArgsError: a URL.
      errors.NotFoundError: there is no such directory.
      errors.StorageError: something cannot be removed.
    """
    if "://" in os.fspath(root):
        raise errors.ArgsError(
            f"{root}: clean takes the path of a directory on this machine. In a store, the next save to a path tidies."
        )
    report = CleanReport(removed=[], restored=[], kept={})
    path = os.path.abspath(os.fspath(root))
    with mapped_os_errors(path, "tidy"):
        for name in sorted(os.listdir(path)):
            leftover = os.path.join(path, name)
            if name.endswith(TEMPORARY_SUFFIX) and os.path.isdir(leftover) and not os.path.islink(leftover):
                _clean(leftover, report, dry_run=dry_run)
    return report


def _clean(leftover: str, report: CleanReport, *, dry_run: bool) -> None:
    """Does to one temporary directory what `clean` does, and reports it."""
    target = leftover.removesuffix(ASIDE_SUFFIX)
    lock = try_lock(leftover, required=True)
    try:
        if lock is None or not lock.is_at(leftover):  # it may have been committed or removed since it was listed
            report.kept[leftover] = "a writer holds it, or the file system has no locks to tell"
        elif target == leftover and _is_foreign(leftover):
            report.kept[leftover] = "another program wrote it"
        elif target == leftover or os.path.lexists(target):
            report.removed.append(leftover)
            if not dry_run:  # durable first, as in `_settle`
                sync(os.path.dirname(leftover))
                remove(leftover)
        else:
            report.restored.append(target)
            if not dry_run:
                os.rename(leftover, target)
                sync(os.path.dirname(target))
    finally:
        if lock is not None:
            lock.close()


def _is_foreign(temporary: str) -> bool:
    """Whether another program, Orbax that is, made a temporary directory: it begins with the file that `Saving` ends with."""
    names = set(os.listdir(temporary))
    return STEP_FILE in names and FILE_LIST not in names


def _refuse_foreign(path: str) -> None:
    """Raises errors.BusyError where another program has written to the temporary directory just now; it takes no lock of ours."""
    temporary = path + TEMPORARY_SUFFIX
    if not _is_foreign(temporary) or _was_committed(temporary):
        return
    within = [os.path.join(directory, name) for directory, folders, names in os.walk(temporary) for name in (*folders, *names)]
    age = time.time() - max(_changed_at(each) for each in (temporary, *within))
    if abs(age) < _FOREIGN_SECS:  # where clocks differ by more, nothing can be told
        raise errors.BusyError(
            f"{path}: another program, such as Orbax, is saving to this path ({temporary} changed {max(0, age):.0f} s ago); wait "
            "for it. Where it is known to be dead, remove that directory."
        )


def _was_committed(directory: str) -> bool:
    """Whether a directory was a checkpoint, the rest of which a killed overwrite leaves in the temporary directory."""
    try:
        metadata = decode_step(FileLocation(directory).read_bytes(STEP_FILE), directory)
    except errors.CheckpointError:  # it is being written
        return False
    return metadata.commit_timestamp_nsecs is not None


def _changed_at(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except FileNotFoundError:  # its writer is alive
        return time.time()


def _put_back(old: str, path: str, *, exchanged: bool) -> None:
    """Undoes a replacement that is not durable."""
    if exchanged:
        exchange(old, path)
        return
    if os.path.lexists(path):
        os.rename(path, path + TEMPORARY_SUFFIX)
    os.rename(old, path)


def _exists(path: str) -> errors.ExistsError:
    return errors.ExistsError(f"Destination {path} already exists. Pass force=True to replace it, or save to another path.")


def _locked_directory(temporary: str, path: str) -> Lock:
    """The lock of the temporary directory, which is made where it is missing."""
    for _ in range(10):
        with contextlib.suppress(FileExistsError):
            os.mkdir(temporary)
        lock = try_lock(temporary)
        if lock is None:
            raise errors.BusyError(f"{path}: another save to this path is under way ({temporary} is locked); wait for it.")
        if lock.is_at(temporary):  # else its former holder has renamed the directory away since: this locks a committed one
            return lock
        lock.close()
    raise errors.BusyError(f"{path}: other saves to this path keep coming; let one writer at a time save to it.")


def _settle(path: str) -> None:
    """Makes the renames of a killed save durable: what it replaced is about to be deleted, and a power cut must not undo them."""
    if os.listdir(path + TEMPORARY_SUFFIX) or os.path.isdir(path + ASIDE_SUFFIX):
        sync(os.path.dirname(path))


def _recover(path: str) -> None:
    """Finishes what an overwrite that was killed between its two renames left."""
    aside = path + ASIDE_SUFFIX
    if not os.path.isdir(aside):
        return
    if os.path.lexists(path):
        remove(aside)
    else:
        os.rename(aside, path)


def _empty(directory: str) -> None:
    with os.scandir(directory) as entries:
        for entry in list(entries):
            remove(entry.path)


def _remove_locked(temporary: str, lock: Lock) -> None:
    """Removes a temporary directory, and gives its lock back.

    Another directory is there after an exchange that could not be undone: the old checkpoint, which stays.
    """
    try:
        if lock.is_at(temporary):
            discard(temporary)
    finally:
        lock.close()
