"""Which handler a call means, and with which args: from what the caller gave, and from what a checkpoint records."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from ckptkit import args as args_lib
from ckptkit import errors, finding
from ckptkit._marker import is_of_commits
from ckptkit.file_list import FILE_LIST
from ckptkit.handlers._stored import args_for_files, handler_class_for, held_by, item_folders
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.index import INDEX_FILE
from ckptkit.location import Location
from ckptkit.metadata.arrays import ARRAYS_DIRECTORY, STRINGS_FILE
from ckptkit.metadata.sharding import SHARDING_FILE
from ckptkit.metadata.step import STEP_FILE, StepMetadata, decode_step
from ckptkit.metadata.tree import TREE_FILE
from ckptkit.pipeline import answers
from ckptkit.registry import Registry, Use

__all__ = [
    "attempts",
    "belonging_args",
    "check_not_composite",
    "check_replaceable",
    "files_asked_for",
    "is_description",
    "items_asked_for",
    "make_handler",
    "one_args",
    "providers",
    "step_metadata",
    "stored_handler",
]


def one_args(args: tuple[Any, ...], kwargs: dict[str, Any]) -> args_lib.CheckpointArgs | None:
    """The `CheckpointArgs` object among the arguments, or None where they are fields."""
    given = [value for value in (*args, kwargs.get("args")) if isinstance(value, args_lib.CheckpointArgs)]
    if not given:
        if kwargs.get("args") is not None:
            raise errors.ArgsTypeError(f"args= takes a CheckpointArgs object, not a {type(kwargs['args']).__name__}.")
        return None
    if len(args) + len(kwargs) > 1:
        raise errors.ArgsError(f"{type(given[0]).__name__} already says everything; pass nothing beside it, or its fields alone.")
    return given[0]


def items_asked_for(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str] | None:
    """The items of a composite that a restore with these arguments names; None where it names none."""
    given = one_args(args, kwargs)
    return sorted(given) if isinstance(given, args_lib.Composite) and given else None


def files_asked_for(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a restore with these arguments may read a file, by its path: of a composite, only the items that it names."""
    items = items_asked_for(args, kwargs)
    return lambda path: items is None or "/" not in path or path.partition("/")[0] in items


_DESCRIPTIONS = {INDEX_FILE, SHARDING_FILE, STEP_FILE, STRINGS_FILE, TREE_FILE}


def is_description(path: str) -> bool:
    """Whether a file, by its path, says something about a checkpoint or an item, as opposed to being its content."""
    *folders, name = path.split("/")
    return name in _DESCRIPTIONS or folders[-1:] == [ARRAYS_DIRECTORY]


def belonging_args(
    registry: Registry, handler: CheckpointHandler, given: Any, args: tuple[Any, ...], kwargs: dict[str, Any], use: Use
) -> Any:
    """The args for a handler: those given if they belong to it, else made from the fields."""
    if given is not None:
        registry.check_args(type(handler), given, use)
        return given
    classes = registry.args_for(type(handler), use)
    if not classes:
        raise errors.RegistryError(
            f"{type(handler).__name__} has no args class to {use} with; put @register_with_handler({type(handler).__name__}, "
            f"for_{use}=True) over one."
        )
    fields = {"item" if name == "state" else name: value for name, value in kwargs.items() if name != "args"}
    return args_lib.make_args(classes[0], args, fields)


def make_handler(handler_class: type[CheckpointHandler], registry: Registry | None) -> CheckpointHandler:
    """A handler of this class that looks things up in `registry`."""
    handler = handler_class()
    if handler.registry is None:
        handler.registry = registry
    return handler


def attempts(registry: Registry, path: str | os.PathLike[str]) -> Iterator[finding.Attempt]:
    """Attempts at reading the checkpoint at a path: see `finding.attempts`."""
    return finding.attempts(lambda: _resolved(registry, registry.location(path)))


def _resolved(registry: Registry, location: Location) -> Location:
    """Where the checkpoint is to be read: see `finding.resolve`; or a single file that a storage backend recognises."""
    if location.local_path is not None and os.path.isfile(location.local_path) and answers.recognising(registry, location):
        return location
    return finding.resolve(location)


def step_metadata(location: Location) -> StepMetadata:
    """What `_CHECKPOINT_METADATA` says; empty where the file is missing, as in older checkpoints."""
    if not location.exists(STEP_FILE):
        return StepMetadata()
    return decode_step(location.read_bytes(STEP_FILE), f"{location.url}/{STEP_FILE}")


def providers(registry: Registry, recorded: str | dict[str, str]) -> dict[str, str]:
    """Who provides the handlers that a checkpoint records, by type string; nobody for one that is not registered."""
    typestrs = {recorded} if isinstance(recorded, str) else set(recorded.values())
    found: dict[str, str] = {}
    for typestr in sorted(typestrs):
        with contextlib.suppress(errors.RegistryError):
            found[typestr] = registry.provider_of(typestr)
    return found


def stored_handler(registry: Registry, location: Location, own: Registry | None = None) -> CheckpointHandler:
    """The handler that a checkpoint asks for: by its recorded type string, else by the files that are there.

    Raises:
      errors.RegistryError: the recorded handler is not registered here.
      errors.FormatError: nothing that is there tells.
    """
    recorded = step_metadata(location).item_handlers
    if isinstance(recorded, str):
        return make_handler(handler_class_for(registry, location, recorded), own)
    if recorded:
        return make_handler(registry.handler_for_args(args_lib.Composite, use="restore"), own)
    if (args_class := args_for_files(location, registry)) is not None:
        return make_handler(registry.handler_for_args(args_class, use="restore"), own)
    if recorded is not None or item_folders(location, registry):  # release 0.10.0 recorded an empty object of whatever it saved
        return make_handler(registry.handler_for_args(args_lib.Composite, use="restore"), own)
    raise errors.FormatError(
        f"{location.url} is no checkpoint: neither it nor a directory in it holds {TREE_FILE}. It holds: {held_by(location)}."
    )


def check_not_composite(location: Location, restore_args: args_lib.CheckpointArgs) -> None:
    """Refuses args for one tree where the checkpoint is a composite of several items.

    Raises:
      errors.ArgsError: names the items, and how to restore them.
    """
    recorded = step_metadata(location).item_handlers
    if recorded and isinstance(recorded, dict) and not isinstance(restore_args, args_lib.Composite):
        raise errors.ArgsError(
            f"{location.url} is a composite of {', '.join(sorted(recorded))}; restore it with "
            f"ckptkit.args.Composite(name={type(restore_args).__name__}(...)), or without args to get every item."
        )


_ROOT_MARKS = frozenset({FILE_LIST, STEP_FILE})
_FILE_MARKS = _ROOT_MARKS | _DESCRIPTIONS | {"manifest.ocdbt"}
_DIRECTORY_MARK = re.compile(rf"{ARRAYS_DIRECTORY}|ocdbt\.process_\d+")


def check_replaceable(location: Location) -> None:
    """Refuses to replace what is no checkpoint: somebody's other files, or a directory that checkpoints lie in.

    A single file and a link are replaced, and so is what is left of a checkpoint, as long as a file says that it was one.
    Whatever else lies beside such a file goes with it. Checkpoints of old releases in which nothing but a user's file can be told
    from them are refused too: to move one away costs less than to lose the other.

    Raises:
      errors.ExistsError: names what is there.
      errors.StorageError: it cannot be listed.
    """
    if location.local_path is not None and os.path.islink(location.local_path):
        return  # what it leads to stays
    names = location.names()
    folders = sorted(name for name, is_directory in names.items() if is_directory and not is_of_commits(name))
    within = [name for name in folders if _is_root(location.child(name))]
    if not names or (not within and any(_is_mark(name, is_directory=names[name]) for name in names)):
        return
    held = f"checkpoints{errors.first_of(within)}" if within else f"something else{errors.first_of(sorted(names))}"
    raise errors.ExistsError(
        f"Destination {location.url} is no checkpoint, and force=True replaces nothing else: it holds {held}. Save to another "
        "path, or move it away or delete it first."
    )


def _is_mark(name: str, *, is_directory: bool) -> bool:
    """Whether a file or directory of this name, where a checkpoint would be, says that there was one; others may be gone."""
    return is_of_commits(name) or (_DIRECTORY_MARK.fullmatch(name) is not None if is_directory else name in _FILE_MARKS)


def _is_root(location: Location) -> bool:
    """Whether a directory is that of a whole checkpoint, as opposed to that of an item of one."""
    with contextlib.suppress(errors.FormatError):  # a link that leads elsewhere
        return any(
            is_of_commits(name) if is_directory else name in _ROOT_MARKS for name, is_directory in location.names().items()
        )
    return False
