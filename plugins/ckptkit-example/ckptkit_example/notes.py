"""Notes to keep with a run: lines of text in a file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ckptkit.args import CheckpointArgs, register_with_handler
from ckptkit.errors import FormatError
from ckptkit.handlers import CheckpointHandler

if TYPE_CHECKING:
    from etils import epath

_FIRST_LINE = "notes 1"


class NotesHandler(CheckpointHandler):
    """Writes one file; the first line tells its version, so that an empty or foreign file is no notes."""

    def save(self, directory: epath.Path, *, args: NotesSave) -> None:
        (directory / "notes.txt").write_text("\n".join([_FIRST_LINE, *args.lines]))

    def restore(self, directory: epath.Path, *, args: NotesRestore) -> list[str]:
        first, *lines = (directory / "notes.txt").read_text().split("\n")
        if first != _FIRST_LINE:
            raise FormatError(f"{directory}/notes.txt begins with {first[:40]!r}, expected {_FIRST_LINE!r}; it is damaged.")
        return lines[-args.last :] if args.last else lines


@register_with_handler(NotesHandler, for_save=True)
@dataclasses.dataclass(frozen=True)
class NotesSave(CheckpointArgs):
    """Saves lines of text, none of which holds a line break."""

    lines: list[str]


@register_with_handler(NotesHandler, for_restore=True)
@dataclasses.dataclass(frozen=True)
class NotesRestore(CheckpointArgs):
    """Restores them; the last few only where a number is given."""

    last: int | None = None
