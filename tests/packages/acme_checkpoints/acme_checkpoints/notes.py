"""Plain notes, a line each, in a text file."""

import dataclasses

from ckptkit.args import CheckpointArgs, register_with_handler
from ckptkit.handlers import CheckpointHandler


class NotesHandler(CheckpointHandler):
    """Saves lines of text."""

    def save(self, directory, args):
        (directory / "notes.txt").write_text("\n".join(args.lines))

    def restore(self, directory, args):
        lines = (directory / "notes.txt").read_text().split("\n")
        return [line.upper() for line in lines] if args.shout else lines


@register_with_handler(NotesHandler, for_save=True)
@dataclasses.dataclass(frozen=True)
class NotesSave(CheckpointArgs):
    lines: list[str]


@register_with_handler(NotesHandler, for_restore=True)
@dataclasses.dataclass(frozen=True)
class NotesRestore(CheckpointArgs):
    shout: bool = False
