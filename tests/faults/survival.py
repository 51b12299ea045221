"""What a disk holds after a power cut: all that was synced, and of the rest what chance decides.

A file system is recorded as the list of the changes made to it and of what was synced. From the first so many of them follows
every state that the disk may be in if the power fails there. No more is taken for granted than POSIX promises: an entry of a
directory is sure to be there once that directory is synced, data and length of a file once the file is, and what was not synced
survives in any order, by sectors. A call that changes several names changes them at once: file systems do promise that.
"""

from __future__ import annotations

import enum
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

ROOT = 1
_SECTOR_NBYTES = 512


class Fate(enum.Enum):
    """What of the changes that were not synced reaches the disk."""

    NOTHING = "nothing"
    EVERYTHING = "everything"
    HOLLOW = "all names and lengths, no data"
    FIRST = "the first so many"
    SOME = "any of them"


@attrs.frozen
class Named:
    """Entries of directories that change at once: node numbers by directory and name, None for one that goes.

    Attributes:
      entries: what changes.
      made: the number of a new directory; 0 for none.
    """

    entries: Mapping[tuple[int, str], int | None]
    made: int = 0

    def touches(self, node: int) -> bool:
        return any(directory == node for directory, _ in self.entries)

    def pieces(self) -> Iterable[Change]:
        return [self]

    def reach(self, disk: Disk) -> None:
        for (directory, name), node in self.entries.items():
            disk.names[directory].pop(name, None)
            if node is not None:
                disk.names[directory][name] = node


@attrs.frozen
class Written:
    """Bytes put into a file."""

    file: int
    offset: int
    data: bytes

    def touches(self, node: int) -> bool:
        return self.file == node

    def pieces(self) -> Iterator[Change]:
        """By sectors, and the length of its own: either may reach the disk without the other."""
        start, end = self.offset, self.offset + len(self.data)
        yield Sized(self.file, end, cut=False)
        while start < end:
            stop = min(end, (start // _SECTOR_NBYTES + 1) * _SECTOR_NBYTES)
            yield Written(self.file, start, self.data[start - self.offset : stop - self.offset])
            start = stop

    def reach(self, disk: Disk) -> None:
        Sized(self.file, self.offset + len(self.data), cut=False).reach(disk)
        disk.files[self.file][self.offset : self.offset + len(self.data)] = self.data


@attrs.frozen
class Sized:
    """A new length of a file; without `cut`, at least that length."""

    file: int
    nbytes: int
    cut: bool

    def touches(self, node: int) -> bool:
        return self.file == node

    def pieces(self) -> Iterable[Change]:
        return [self]

    def reach(self, disk: Disk) -> None:
        content = disk.files[self.file]
        content.extend(bytes(max(0, self.nbytes - len(content))))
        if self.cut:
            del content[self.nbytes :]


@attrs.frozen
class Synced:
    """A node whose changes are on the disk now."""

    node: int


@attrs.frozen
class Dropped:
    """A file whose changes the system gave up: they are in its cache, and it will never write them."""

    node: int


Change = Named | Written | Sized
Event = Change | Synced | Dropped


@attrs.define
class Disk:
    """Files by number, and directories by number: the numbers of their entries."""

    files: dict[int, bytearray] = attrs.field(factory=lambda: defaultdict(bytearray))
    names: dict[int, dict[str, int]] = attrs.field(factory=lambda: {ROOT: {}})

    def tree(self, directory: int = ROOT) -> dict[str, Any]:
        """The content of files and directories by name."""
        entries = self.names[directory].items()
        return {name: self.tree(n) if n in self.names else bytes(self.files[n]) for name, n in sorted(entries)}


def survivor(events: Sequence[Event], fate: Fate, chance: random.Random) -> dict[str, Any]:
    """The tree that a disk may hold when the power fails after the events."""
    disk = Disk()
    unsynced: list[Change] = []
    for event in events:
        if isinstance(event, Synced | Dropped):
            for change in unsynced:
                if isinstance(event, Synced) and change.touches(event.node):
                    change.reach(disk)
            unsynced = [change for change in unsynced if not change.touches(event.node)]
        else:
            unsynced.append(event)
            if isinstance(event, Named) and event.made:
                disk.names[event.made] = {}
    for piece in _lucky([piece for change in unsynced for piece in change.pieces()], fate, chance):
        piece.reach(disk)
    return disk.tree()


def _lucky(pieces: Sequence[Change], fate: Fate, chance: random.Random) -> Sequence[Change]:
    match fate:
        case Fate.NOTHING:
            return []
        case Fate.EVERYTHING:
            return pieces
        case Fate.HOLLOW:
            return [piece for piece in pieces if not isinstance(piece, Written)]
        case Fate.FIRST:
            return pieces[: chance.randint(0, len(pieces))]
        case Fate.SOME:
            likely = chance.choice([0.1, 0.5, 0.9])
            return [piece for piece in pieces if chance.random() < likely]


def lay_out(tree: Mapping[str, Any], directory: Path) -> None:
    """Makes a tree in a directory that is made for it."""
    directory.mkdir()
    for name, content in tree.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            lay_out(content, directory / name)
