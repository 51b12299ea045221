"""The handler of JSON values: one file, written and read inside the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptkit import args as args_lib
from ckptkit import discovery, errors
from ckptkit._checks import optional, text
from ckptkit.handlers.base import CheckpointHandler, folded_args
from ckptkit.metadata.json import checked_custom, dump_exact, load_exact

if TYPE_CHECKING:
    from etils import epath

__all__ = ["JsonCheckpointHandler"]


class JsonCheckpointHandler(CheckpointHandler):
    """Saves what JSON holds: dicts with str keys, lists, str, int, float, bool and None; tuples come back as lists.

    Args:
      filename: of the file in the directory; 'metadata' by default.
    """

    def __init__(self, filename: str | None = None) -> None:
        optional(text)(self, "filename", filename)
        self._filename = filename or "metadata"

    @classmethod
    def typestr(cls) -> str:
        return "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"

    def save(self, directory: epath.Path, item: Any = None, args: args_lib.JsonSave | None = None) -> None:
        """Writes the file. `item` is deprecated: `args` says the same.

        Raises:
          errors.ArgsTypeError: something inside the item that JSON cannot hold; names its place.
        """
        args = folded_args(args_lib.JsonSave, args, item=item)
        data = dump_exact(checked_custom(args.item, "item"))
        discovery.ready(self.registry).location(directory).write_bytes(self._filename, data)

    def restore(self, directory: epath.Path, item: Any = None, args: args_lib.JsonRestore | None = None) -> Any:
        """The value. `item` and `args` say nothing of it.

        Raises:
          errors.NotFoundError: there is no such file.
          errors.FormatError: the file is not JSON.
        """
        location = discovery.ready(self.registry).location(directory)
        if not location.exists(self._filename):
            listed = ", ".join(sorted(location.names())) or "nothing"
            raise errors.NotFoundError(f"{location.url} has no file {self._filename!r}, which holds the JSON. It has: {listed}.")
        return load_exact(location.read_bytes(self._filename), f"{location.url}/{self._filename}")
