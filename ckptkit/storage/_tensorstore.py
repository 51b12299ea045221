"""What TensorStore says went wrong, as our errors. It raises builtin exceptions whose text begins with a status code."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from ckptkit import errors

__all__ = ["mapped_tensorstore_errors", "reading_error", "writing_error"]

_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

# The store, not the data, is at fault.
_UNAVAILABLE = re.compile(
    r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN):"
)


def writing_error(error: BaseException, path: str) -> errors.CheckpointError:
    """The error for a failed write below `path`, with the operating system's number where the text has one."""
    return _os_error(error, path, "write") or errors.StorageError(None, f"cannot write: {error}", path)


def reading_error(error: BaseException, path: str) -> errors.CheckpointError:
    """The error for a failed read below `path`: missing, unavailable, or damaged."""
    if mapped := _os_error(error, path, "read"):
        return mapped
    text = str(error)
    if text.startswith("NOT_FOUND:"):
        return errors.NotFoundError(errno.ENOENT, f"a required file is missing: {text}", path)
    if _UNAVAILABLE.match(text):
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
