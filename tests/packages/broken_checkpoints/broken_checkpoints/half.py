"""Registers its args, then cannot be imported."""

from ckptkit.args import CheckpointArgs, register_with_handler
from ckptkit.handlers import CheckpointHandler


class HalfHandler(CheckpointHandler):
    def save(self, directory, args):
        """Saves nothing."""

    def restore(self, directory, args):
        """Restores nothing."""


@register_with_handler(HalfHandler, for_save=True, for_restore=True)
class HalfArgs(CheckpointArgs):
    pass


raise OSError("no such device")
