"""Claims args that are somebody else's."""

from ckptkit import args, hookimpl
from ckptkit.handlers import JsonCheckpointHandler


@hookimpl
def ckptkit_register(registry):
    registry.add_args(args.StandardSave, JsonCheckpointHandler, for_save=True)
