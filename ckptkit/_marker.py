"""Commits where nothing can be renamed: what is complete is decided by one small file, `commit_success.txt`, written last.

Layout of the place of a checkpoint:

    commit_success.txt         JSON: 'id', unique, and 'data': where the checkpoint is, '' for here
    ckptkit_writer.txt         only while a save writes here: its id
    <files of the checkpoint>  where 'data' is ''
    ckptkit-<id>/              where 'data' is that: the files of the checkpoint, with a commit_success.txt of their own

The first save to a place writes right there, so that Orbax finds the files where it looks for them. It begins by creating
`ckptkit_writer.txt`, which one writer alone can. Every other save (one with `force`, or where a killed one left something)
writes to a folder of its own, so that whoever reads keeps the old checkpoint until `commit_success.txt` names the new one,
by a conditional write that only one of several writers wins. It then deletes what it found beside: the old checkpoint, what
killed saves left, and the files of saves that began earlier and are about to lose.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import uuid
from typing import Final

from ckptkit import errors
from ckptkit.location import Location, MarkerLocation

__all__ = ["COMMIT_FILE", "Pending", "begin", "data_location", "identity", "is_of_commits", "resolve"]

COMMIT_FILE: Final = "commit_success.txt"
_WRITER_FILE: Final = "ckptkit_writer.txt"
_DATA: Final = re.compile(r"ckptkit-[0-9a-f]{32}")
_MAX_COMMIT_NBYTES: Final = 1 << 16


def resolve(place: MarkerLocation) -> Location:
    """Where the checkpoint at a place is to be read.

    Raises:
      errors.NotFoundError: there is none, or the folder that holds it is gone.
      errors.IncompleteError: nothing that is there was committed.
    """
    committed = _committed(place)
    while committed is not None:
        data = data_location(place, committed)
        if data is place or data.exists(COMMIT_FILE):
            return data
        before, committed = committed, _committed(place)
        if committed == before:
            raise errors.NotFoundError(errno.ENOENT, f"{COMMIT_FILE} names a folder that is gone", data.url)
    names = place.names()
    if not names:
        raise errors.NotFoundError(errno.ENOENT, "no checkpoint here", place.url)
    raise errors.IncompleteError(
        f"Found incomplete checkpoint at {place.url}: there is no {COMMIT_FILE}, which is written last, among "
        f"{', '.join(sorted(names)[:20])}. A save to it never finished, or is under way. (If a whole checkpoint was copied here "
        "without that file, add it; it may be empty.)"
    )


def data_location(place: Location, committed: bytes) -> Location:
    """Where the content of a `commit_success.txt` says the checkpoint is; other programs' text there says nothing."""
    try:
        name = json.loads(committed)["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return place
    return place.child(name) if isinstance(name, str) and _DATA.fullmatch(name) else place


def identity(data: Location) -> bytes | None:
    """What tells one checkpoint from another that took its place; None where it is gone."""
    return _committed(data)


def _committed(place: Location) -> bytes | None:
    try:
        return place.read_bytes(COMMIT_FILE, limit=_MAX_COMMIT_NBYTES)
    except errors.NotFoundError:
        return None


def is_of_commits(path: str) -> bool:
    """Whether a file, by its path in the place of a checkpoint, is none of that checkpoint's, but of saves' own or another's."""
    name = path.partition("/")[0]
    return name in (COMMIT_FILE, _WRITER_FILE) or _DATA.fullmatch(name) is not None


def begin(place: MarkerLocation, *, force: bool) -> Pending:
    """Chooses where a save to a place writes.

    Raises:
      errors.ExistsError: there is a checkpoint, or something else that no save left, and `force` is False.
      errors.StorageError: the store cannot be read or written, or does not list what is written there.
    """
    replaced = _committed(place)
    names = place.names()
    left_by_saves = _WRITER_FILE in names or all(map(_DATA.fullmatch, names))
    if not force and (replaced is not None or not left_by_saves):
        raise _exists(place)
    own = uuid.uuid4().hex
    here = not names and _claim(place, own)
    return Pending(place, "" if here else f"ckptkit-{own}", own, replaced, force=force)


def _claim(place: MarkerLocation, own: str) -> bool:
    """Whether this save alone may write its files right into the place.

    Raises:
      errors.StorageError: the store does not list what is written there.
    """
    if not place.replace_bytes(_WRITER_FILE, None, own.encode()):
        return False
    names = place.names()
    if set(names) == {_WRITER_FILE}:
        return True
    unlisted = _WRITER_FILE not in names and _is_held(place, own)
    place.delete(_WRITER_FILE)  # where it is listed, another save came and went, and left what it saved
    if unlisted:
        raise errors.StorageError(
            None,
            "the store does not list what was written there, so nothing could be restored; choose another path (some stores do "
            "not list names with backslashes or control characters)",
            place.url,
        )
    return False


def _is_held(place: MarkerLocation, own: str) -> bool:
    """Whether the file of a writer is still the one that this save has made."""
    try:
        return place.read_bytes(_WRITER_FILE) == own.encode()
    except errors.NotFoundError:
        return False


class Pending:
    """A save under way; exactly one of `commit` and `abandon` ends it."""

    def __init__(self, place: MarkerLocation, folder: str, own: str, replaced: bytes | None, *, force: bool) -> None:
        self.path = place.url
        self.temporary: Location = place.child(folder) if folder else place
        self._place = place
        self._folder = folder
        self._replaced = replaced
        self._force = force
        self._commit = json.dumps({"data": folder, "id": own}).encode()
        self._readable = False  # whether somebody may read it by now

    def commit(self) -> None:
        """Makes the checkpoint the one that is read.

        Raises:
          errors.ExistsError, errors.BusyError: another save to this place was committed meanwhile; that one counts.
          errors.StorageError: the store failed; unless it did while it took in the last file, the old checkpoint is still there.
        """
        others: list[str] = []  # where this save writes right into the place, there was nothing when it began
        if self._folder:
            self.temporary.write_bytes(COMMIT_FILE, self._commit)
            others = [name for name in self._place.names() if name not in (COMMIT_FILE, self._folder)]
        if not self._decide():
            raise self._lost()
        # Only what was there before the commit: whoever began later counts on what it found. The new checkpoint is committed,
        # and the next save tidies what stays.
        with contextlib.suppress(errors.StorageError):
            for name in others:
                _delete(self._place, name)
            self._place.delete(_WRITER_FILE)

    def _decide(self) -> bool:
        """Whether the commit file is ours now."""
        self._readable = True  # also after an error: the store may have taken it in all the same
        try:
            self._readable = self._place.replace_bytes(COMMIT_FILE, self._replaced, self._commit)
        except errors.StorageError:
            if _committed(self._place) != self._commit:
                raise
        return self._readable

    def _lost(self) -> errors.CheckpointError:
        if not self._force:
            return _exists(self._place)
        return errors.BusyError(
            f"{self.path}: another save to this path was committed while this one was under way; let one writer at a time save "
            "to it."
        )

    def overtaken(self) -> errors.CheckpointError | None:
        """The error where another save was committed meanwhile, which deletes what this one has written; else None."""
        return None if _committed(self._place) == self._replaced else self._lost()

    def abandon(self) -> None:
        """Removes what was written; never raises, since it runs where something else went wrong."""
        if self._readable:
            return  # the next save to this place tidies what nobody reads
        with contextlib.suppress(errors.CheckpointError):
            if self._folder:
                self._place.delete(self._folder)
                return
            for name in self._place.names():
                if not is_of_commits(name):
                    self._place.delete(name)
            self._place.delete(_WRITER_FILE)


def _delete(place: Location, name: str) -> None:
    """Deletes a file or a folder, its commit file first: its readers know by that that it was replaced."""
    if _DATA.fullmatch(name):
        place.child(name).delete(COMMIT_FILE)
    place.delete(name)


def _exists(place: Location) -> errors.ExistsError:
    return errors.ExistsError(f"Destination {place.url} already exists. Pass force=True to replace it, or save to another path.")
