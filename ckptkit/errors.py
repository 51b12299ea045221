"""Every error that ckptkit raises on purpose. Each is a `CheckpointError` and the builtin people already catch.

    CheckpointError
    ├── TreeError                (ValueError)         a tree, or a leaf of it, that cannot be saved
    ├── TargetError              (ValueError)         a checkpoint and the target to restore into do not agree
    │   └── TopologyError                             the saved devices are not here
    ├── ArgsError                (ValueError)         args that do not fit the handler, or each other
    │   └── ArgsTypeError        (TypeError)          the same, where people expect a TypeError
    ├── RegistryError            (ValueError)         something is not registered, or registered twice
    │   └── ConflictError                             two owners claim one name
    ├── UnknownItemError         (KeyError)           a composite checkpoint has no item of that name
    ├── PluginError              (RuntimeError)       an installed plugin is broken
    ├── NotFoundError            (FileNotFoundError)  no checkpoint, or a required file of it is missing
    ├── ExistsError              (ValueError, FileExistsError)   the destination is taken
    ├── IncompleteError          (ValueError)         a save that never finished
    ├── FormatError              (ValueError)         files that are not a checkpoint this version can read
    ├── CorruptCheckpointError   (ValueError)         bytes differ from what was written
    ├── StorageError             (OSError)            the disk or the store failed
    ├── BusyError                (RuntimeError)       another writer holds the destination
    ├── TimeoutError             (builtins.TimeoutError)         a wait that has an end came to it
    ├── ProcessError             (RuntimeError)       another process failed, or does not do the same
    ├── ClosedError              (RuntimeError)       use after `close()`
    ├── ForkedError              (RuntimeError)       use in a process forked from one that had used ckptkit
    └── AsyncSaveError           (RuntimeError)       a background save failed with something that is not ours

A message says what was found, what was expected, the key path or the file, and what to do.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Sequence

__all__ = [
    "ArgsError",
    "ArgsTypeError",
    "AsyncSaveError",
    "BusyError",
    "CheckpointError",
    "ClosedError",
    "ConflictError",
    "CorruptCheckpointError",
    "ExistsError",
    "ForkedError",
    "FormatError",
    "IncompleteError",
    "NotFoundError",
    "PluginError",
    "ProcessError",
    "RegistryError",
    "StorageError",
    "TargetError",
    "TimeoutError",
    "TopologyError",
    "TreeError",
    "UnknownItemError",
    "first_of",
    "listing",
]


class CheckpointError(Exception):
    """Above every error that ckptkit raises on purpose."""


class TreeError(CheckpointError, ValueError):
    """A tree given to save holds something that cannot be saved; lists every such leaf."""


class TargetError(CheckpointError, ValueError):
    """The checkpoint and the target disagree; lists every disagreement."""


class TopologyError(TargetError):
    """The devices that the checkpoint names are not here, and nothing says where to put its arrays."""


class ArgsError(CheckpointError, ValueError):
    """Args that do not belong to the handler, or whose fields contradict each other."""


class ArgsTypeError(ArgsError, TypeError):
    """An argument of a type that can never work."""


class RegistryError(CheckpointError, ValueError):
    """A class, name or type string that nothing registered provides."""


class ConflictError(RegistryError):
    """Two owners claim the same class, name, type or type string."""


class UnknownItemError(CheckpointError, KeyError):
    """A composite has no item of that name; lists those it has."""

    __str__ = Exception.__str__  # KeyError's would show the message as a quoted string


class PluginError(CheckpointError, RuntimeError):
    """An installed plugin failed to load, or returned what its hook must not return."""


class NotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path, or a file that it cannot do without is missing."""


class ExistsError(CheckpointError, ValueError, FileExistsError):
    """The destination exists, and `force=True` was not given, or it is no checkpoint."""


class IncompleteError(CheckpointError, ValueError):
    """The directory was left by a save that never committed."""


class FormatError(CheckpointError, ValueError):
    """Files that are not a checkpoint, or one that this version does not understand."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """Stored bytes differ from what was written.

    Attributes:
      corrupt: key paths of the leaves that are not whole, where leaves were being restored.
      whole: key paths of those that are.
    """

    corrupt: Sequence[tuple[str, ...]] = ()
    whole: Sequence[tuple[str, ...]] = ()


class StorageError(CheckpointError, OSError):
    """The operating system or the object store refused a read or a write; carries `errno` where there is one."""


class BusyError(CheckpointError, RuntimeError):
    """Another writer is saving to the same destination, or replaces what is there again and again while it is read."""


class TimeoutError(CheckpointError, builtins.TimeoutError):  # noqa: A001 - the field's word; always used as errors.TimeoutError
    """Waiting took longer than the caller allowed.

    Attributes:
      missing: the processes that were waited for, where it was for others of the job.
    """

    missing: tuple[int, ...] = ()


class ProcessError(CheckpointError, RuntimeError):
    """Another process of the job failed with something that is not a `CheckpointError`, or the processes do not do the same."""


class ClosedError(CheckpointError, RuntimeError):
    """The object was closed before this call."""


class ForkedError(CheckpointError, RuntimeError):
    """This process was forked from one whose threads and locks it does not have."""


class AsyncSaveError(CheckpointError, RuntimeError):
    """A save in the background failed with an exception that is not a `CheckpointError`; that one is the cause."""


def first_of(names: Sequence[object]) -> str:
    """The first of some names in parentheses, with a space in front; '' for none."""
    return f" ({', '.join(map(str, names[:3]))}{', ...' if len(names) > 3 else ''})" if names else ""


def listing(lines: Iterable[str], limit: int = 50) -> str:
    """Indented lines for the body of an error message; past `limit` only their number is told."""
    lines = list(lines)
    shown = [f"\n  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"\n  ... and {len(lines) - limit} more")
    return "".join(shown)
