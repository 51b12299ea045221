"""Where a checkpoint is: a directory for small files, and the base of a key-value store for large data.

A place is not a format: every storage backend writes through a `Location`. Schemes are registered with
`Registry.add_scheme`; a path without a scheme is a `FileLocation`. Making a checkpoint visible is `commit`'s affair: by a
rename where the place is a directory of this machine, by a file written last where it is a `MarkerLocation`.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import io
import os
import shutil
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

from etils import epath

from ckptkit import errors

__all__ = ["FileLocation", "Location", "LocationPath", "MarkerLocation", "checked_parts", "mapped_os_errors"]

_BLOCK_BYTE_SIZE: Final = 1 << 20


class Location(abc.ABC):
    """A directory somewhere, which need not exist yet.

    Attributes:
      url: names the place in messages and reports; its scheme's factory makes an equal location of it.
    """

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

    @property
    def path(self) -> Any:
        """The directory as handlers are given it: an `epath.Path`, or a `LocationPath` where that knows no such place."""
        return LocationPath(self)

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
        """What is in the directory: name -> whether it is a directory. Empty where it does not exist, or is a file."""

    @abc.abstractmethod
    def delete(self, name: str = "") -> None:
        """Removes the file or directory `name`, or this directory itself, with all that is below; nothing where it is not there.

        Raises:
          errors.StorageError: the system or the store refused.
        """

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
        yield self.read_bytes(name, limit=sys.maxsize)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class MarkerLocation(Location):
    """A place without directories that can be renamed, such as an object store: a file written last commits a checkpoint.

    Each of its files appears whole or not at all, and is visible to everyone once `write_bytes` has returned.
    """

    @abc.abstractmethod
    def replace_bytes(self, name: str, expected: bytes | None, data: bytes) -> bool:
        """Makes `data` the content of the file `name` if it is still `expected` (None: there is no such file).

        Of several writers that expect the same, one succeeds. `data` must differ from what any other writer gives.

        Returns:
          whether `data` is in the file now.

        Raises:
          errors.StorageError: the store failed; the file may hold either.
        """


class LocationPath(os.PathLike[str]):
    """A path in a place that is on no file system, with the part of `epath.Path` that handlers need.

    Directories come into being with the files in them, and go with the last one.
    """

    def __init__(self, location: Location, name: str = "") -> None:
        """The directory `location`, or the file or directory `name` below it."""
        self._location = location
        self._name = name

    @property
    def location(self) -> Location:
        """The directory that the path names."""
        return self._location.child(self._name) if self._name else self._location

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> LocationPath:
        """The directory above; the place that the path began with is its own parent."""
        return LocationPath(self._location, self._name.rpartition("/")[0])

    def __truediv__(self, name: str | os.PathLike[str]) -> LocationPath:
        parts = checked_parts(os.fspath(name), str(self))
        return LocationPath(self._location, "/".join([self._name, *parts] if self._name else parts))

    def joinpath(self, *names: str | os.PathLike[str]) -> LocationPath:
        """The path below this one."""
        path = self
        for name in names:
            path = path / name
        return path

    def exists(self) -> bool:
        return self._location.exists(self._name)

    def is_dir(self) -> bool:
        return bool(self.location.names())

    def is_file(self) -> bool:
        return self.exists() and not self.is_dir()

    def iterdir(self) -> Iterator[LocationPath]:
        for name in sorted(self.location.names()):
            yield self / name

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - pathlib's
        """Makes nothing, since a directory comes into being with the first file in it.

        Raises:
          errors.ExistsError: there is a file or directory of this name, and `exist_ok` is False.
        """
        if not exist_ok and self.exists():
            raise errors.ExistsError(errno.EEXIST, "cannot make the directory: it exists", str(self))

    def read_bytes(self) -> bytes:
        return self._location.read_bytes(self._name)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        self._location.write_bytes(self._name, data)
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8") -> int:
        return self.write_bytes(text.encode(encoding))

    def unlink(self, missing_ok: bool = False) -> None:  # noqa: FBT001, FBT002 - pathlib's
        """Removes the file.

        Raises:
          errors.NotFoundError: there is none, and `missing_ok` is False.
        """
        if not missing_ok and not self.exists():
            raise errors.NotFoundError(errno.ENOENT, "cannot remove: no such file", str(self))
        self._location.delete(self._name)

    def rmtree(self) -> None:
        """Removes the directory with all that is below."""
        self._location.delete(self._name)

    def __fspath__(self) -> str:
        return f"{self._location.url}/{self._name}" if self._name else self._location.url

    def __str__(self) -> str:
        return self.__fspath__()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocationPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))


def checked_parts(name: str, where: str) -> list[str]:
    """The parts of a name, which must stay below `where`: names may come from a stranger's checkpoint.

    Raises:
      errors.FormatError: it leads elsewhere, or has a part that is empty, '.' or '..'.
    """
    parts = name.replace(os.sep, "/").split("/")
    if "\0" in name or os.path.isabs(name) or os.path.splitdrive(name)[0] or any(p in ("", ".", "..") for p in parts):
        raise errors.FormatError(f"{where}: the name {name!r} does not stay inside the directory.")
    return parts


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
    except MemoryError as error:
        raise errors.StorageError(errno.ENOMEM, f"cannot {doing}: there is no memory for it", path) from error


class FileLocation(Location):
    """A directory on a file system of this machine."""

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

    @property
    def path(self) -> epath.Path:
        return epath.Path(self._path)

    def read_bytes(self, name: str, limit: int = 1 << 30) -> bytes:
        with self._opened(name) as file:
            if os.fstat(file.fileno()).st_size > limit:
                raise errors.FormatError(f"{file.name}: larger than {limit} bytes, more than a file of this kind ever is.")
            return file.read()

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
        except (FileNotFoundError, NotADirectoryError):  # a checkpoint may be a single file
            return {}
        except OSError as error:
            raise errors.StorageError(error.errno, f"cannot list: {error.strerror}", self._path) from error

    def delete(self, name: str = "") -> None:
        path = self._inside(name) if name else self._path
        with mapped_os_errors(path, "delete"), contextlib.suppress(FileNotFoundError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def files(self, without: Collection[str] = ()) -> list[str]:
        found = []
        with mapped_os_errors(self._path, "list"):
            for directory, folders, names in os.walk(self._path, onerror=_raise):  # links to directories are not followed
                prefix = "" if directory == self._path else f"{os.path.relpath(directory, self._path)}/".replace(os.sep, "/")
                folders[:] = [folder for folder in folders if prefix + folder not in without]
                found += [prefix + name for name in names]
        return sorted(found)

    def blocks(self, name: str) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(_BLOCK_BYTE_SIZE))
        with self._opened(name) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[io.FileIO]:
        path = self._inside(name)
        with mapped_os_errors(path, "read"), open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise errors.FormatError(f"{path}: expected a regular file, found another kind; restore another checkpoint.")
            yield file

    def _inside(self, name: str) -> str:
        """The path of `name`, which must lie below this directory, links resolved: a stranger may have made both."""
        try:
            os.fsencode(name)
        except UnicodeEncodeError as error:
            raise errors.FormatError(f"{self._path}: the name {name!r} holds what no name of a file does.") from error
        path = self._path
        for part in checked_parts(name, self._path):
            path = os.path.join(path, part)
            if os.path.islink(path) and not os.path.realpath(path).startswith(os.path.join(os.path.realpath(self._path), "")):
                raise errors.FormatError(f"{path}: the link leads out of {self._path}; copy what it leads to in its place.")
        return path


def _raise(error: OSError) -> None:
    raise error


def _open_without_waiting(path: str, flags: int) -> int:
    """A descriptor at once, where the file is a named pipe that nobody writes to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
