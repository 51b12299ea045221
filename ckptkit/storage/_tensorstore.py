"""What all of our use of TensorStore shares: the context of places that are no local directories, and what its errors mean.

It raises builtin exceptions whose text begins with a status code.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

import tensorstore as ts

from ckptkit import errors
from ckptkit.location import Location

__all__ = ["SHARED_CONTEXT", "context_for", "mapped_tensorstore_errors", "reading_error", "store_error", "writing_error"]

SHARED_CONTEXT = ts.Context()
"""Holds what is kept in memory and the connections to servers, so that every part of the process sees the same."""

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

# The store, not the data, is at fault.
_UNAVAILABLE = re.compile(
    r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN):"
)


def context_for(location: Location) -> ts.Context:
    """The context to open a location's key-value store in; a directory of this machine has one of its own."""
    return SHARED_CONTEXT if location.local_path is None else ts.Context()


def store_error(error: BaseException, path: str, doing: str) -> errors.CheckpointError:
    """The error for an operation on a whole file or a directory, whose content cannot be what is wrong."""
    return _os_error(error, path, doing) or errors.StorageError(None, f"cannot {doing}: {error}", path)


def writing_error(error: BaseException, path: str) -> errors.CheckpointError:
    """The error for a failed write below `path`, with the operating system's number where the text has one."""
    return store_error(error, path, "write")


def reading_error(error: BaseException, path: str) -> errors.CheckpointError:
    """The error for a failed read below `path`: missing, unavailable, or damaged."""
    if mapped := _os_error(error, path, "read"):
        return mapped
    text = str(error)
    if text.startswith("NOT_FOUND:"):
        return errors.NotFoundError(errno.ENOENT, f"a required file is missing: {text}", path)
    if _UNAVAILABLE.match(text) or isinstance(error, TypeError):  # a path or an argument that it does not take is not damaged
        return errors.StorageError(None, f"cannot read: {text}", path)
    return errors.CorruptCheckpointError(f"{path}: cannot be decoded: {text}")


@contextlib.contextmanager
def mapped_tensorstore_errors(path: str) -> Iterator[None]:
    """Turns what TensorStore raises while reading below `path` into our errors."""
    try:
        yield
    except errors.CheckpointError:
        raise
    except Exception as error:
        raise reading_error(error, path) from error


def _os_error(error: BaseException, path: str, doing: str) -> errors.CheckpointError | None:
    found = _OS_ERROR.search(str(error))
    if found is None:
        return None
    number = int(found[1])
    kind = errors.NotFoundError if number == errno.ENOENT and doing == "read" else errors.StorageError
    return kind(number, f"cannot {doing}: {os.strerror(number)} ({error})", path)
