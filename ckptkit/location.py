"""Where a checkpoint is: a directory for small files, and the base of a key-value store for large data.

A place is not a format: every storage backend writes through a `Location`. Schemes are registered with
`Registry.add_scheme`; a path without a scheme is a `FileLocation`. Making a checkpoint visible is `commit`'s affair.
"""

from __future__ import annotations

import abc
import contextlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, Final, Literal

from ckptkit import errors

__all__ = ["FileLocation", "Location", "mapped_os_errors"]

_BLOCK_BYTE_SIZE: Final = 1 << 20


class Location(abc.ABC):
    """A directory somewhere, which need not exist yet.

    Attributes:
      commit_policy: 'rename' where a directory can be renamed atomically, else 'marker'.
      url: names the place in messages and reports.
    """

    commit_policy: ClassVar[Literal["rename", "marker"]]
    url: str

    @abc.abstractmethod
    def child(self, name: str) -> Location:
        """The directory `name` in this one.

        Raises:
          errors.FormatError: a name that would lead elsewhere ('..', absolute, NUL).
        """

    @abc.abstractmethod
    def kvstore(self) -> dict[str, Any]:
        """TensorStore's JSON for a key-value store over this directory; its path ends in '/'."""

    @property
    def local_path(self) -> str | None:
        """The directory's path on this machine, or None where there is none."""
        return None

    @abc.abstractmethod
    def read_bytes(self, name: str, limit: int = 1 << 30) -> bytes:
        """The file `name`.

        Raises:
          errors.NotFoundError: there is none.
          errors.FormatError: it is larger than `limit` bytes.
        """

    @abc.abstractmethod
    def write_bytes(self, name: str, data: bytes) -> None:
        """Makes the file `name`, and the directories above it."""

    @abc.abstractmethod
    def exists(self, name: str = "") -> bool:
        """Whether there is a file or directory `name`, or this directory itself."""

    @abc.abstractmethod
    def names(self) -> Mapping[str, bool]:
        """What is in the directory: name -> whether it is a directory. Empty where it does not exist."""

    def files(self, without: Collection[str] = ()) -> list[str]:
        """The paths of all files below the directory, except those in the directories `without`, by their paths."""
        found = []
        pending: list[tuple[str, Location]] = [("", self)]
        while pending:
            prefix, location = pending.pop()
            for name, is_directory in location.names().items():
                if not is_directory:
                    found.append(prefix + name)
                elif prefix + name not in without:
                    pending.append((f"{prefix}{name}/", location.child(name)))
        return sorted(found)

    def blocks(self, name: str) -> Iterator[bytes | memoryview]:
        """The bytes of the file `name`, however large it is, part by part; a part is gone when the next is asked for.

        Raises:
          errors.NotFoundError: there is none.
        """
        yield self.read_bytes(name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def _raise(error: OSError) -> None:
    raise error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextlib.contextmanager
def mapped_os_errors(path: str, doing: str) -> Iterator[None]:
    """Turns what the operating system says about `path` into our errors."""
    try:
        yield
    except errors.CheckpointError:
        raise
    except FileNotFoundError as error:
        raise errors.NotFoundError(error.errno, f"cannot {doing}: no such file or directory", path) from error
    except OSError as error:
        raise errors.StorageError(error.errno, f"cannot {doing}: {error.strerror or error}", path) from error


class FileLocation(Location):
    """A directory on a file system of this machine."""

    commit_policy = "rename"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(os.fspath(path))
        self.url = self._path

    def child(self, name: str) -> FileLocation:
        return FileLocation(self._inside(name))

    def kvstore(self) -> dict[str, Any]:
        return {"driver": "file", "path": self._path.rstrip(os.sep) + "/"}

    @property
    def local_path(self) -> str:
        return self._path

    def read_bytes(self, name: str, limit: int = 1 << 30) -> bytes:
        path = self._inside(name)
        with mapped_os_errors(path, "read"), open(path, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise errors.FormatError(f"{path}: larger than {limit} bytes, more than a file of this kind ever is.")
        return data

    def write_bytes(self, name: str, data: bytes) -> None:
        path = self._inside(name)
        with mapped_os_errors(path, "write"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(data)

    def exists(self, name: str = "") -> bool:
        return os.path.exists(self._inside(name) if name else self._path)

    def names(self) -> Mapping[str, bool]:
        try:
            with os.scandir(self._path) as entries:
                return {entry.name: entry.is_dir() for entry in entries}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise errors.StorageError(error.errno, f"cannot list: {error.strerror}", self._path) from error

    def files(self, without: Collection[str] = ()) -> list[str]:
        found = []
        with mapped_os_errors(self._path, "list"):
            for directory, folders, names in os.walk(self._path, onerror=_raise):  # links to directories are not followed
                prefix = "" if directory == self._path else f"{os.path.relpath(directory, self._path)}/".replace(os.sep, "/")
                folders[:] = [folder for folder in folders if prefix + folder not in without]
                found += [prefix + name for name in names]
        return sorted(found)

    def blocks(self, name: str) -> Iterator[memoryview]:
        path = self._inside(name)
        buffer = memoryview(bytearray(_BLOCK_BYTE_SIZE))
        # Opening a named pipe would wait for a writer, and a checkpoint may come from a stranger.
        with mapped_os_errors(path, "read"), open(path, "rb", buffering=0, opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise errors.FormatError(f"{path}: expected a regular file.")
            while count := file.readinto(buffer):
                yield buffer[:count]

    def _inside(self, name: str) -> str:
        """The path of `name`, which must lie below this directory: names may come from a stranger's checkpoint."""
        parts = name.replace(os.sep, "/").split("/")
        if "\0" in name or os.path.isabs(name) or os.path.splitdrive(name)[0] or any(p in ("", ".", "..") for p in parts):
            raise errors.FormatError(f"{self._path}: the name {name!r} does not stay inside the directory.")
        return os.path.join(self._path, *parts)
