"""The list of a checkpoint's files, with their sizes and checksums: `ckptkit_files.json` in its root.

It is written when all others are, and has every file, whichever handler wrote it, except those of which a restore uses nothing
but arrays and chunks: the index beside them says what those must be (see `StorageBackend.data_directories`). Of a file that
begins with something else, it has the head (see `Writer.data_files`). Checksums are XXH3 with 64 bits, as in the index. The list
begins with the checksum of the rest of itself. Orbax ignores the file.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, TypeVar

import attrs
import xxhash

from ckptkit import errors
from ckptkit._marker import is_of_commits
from ckptkit._threads import Workers
from ckptkit.location import Location, mapped_os_errors
from ckptkit.metadata import json

T = TypeVar("T")

__all__ = ["FILE_LIST", "FileList", "Listed", "is_stray", "read_file_list", "relying_on", "saved_names", "write_file_list"]

FILE_LIST: Final = "ckptkit_files.json"

_VERSION: Final = 1
_ALGORITHM: Final = "xxh3_64"
_LITTLE_NBYTES: Final = 4 << 20
"""What is read in about the time that starting threads takes."""
_SEAL: Final = re.compile(rb'\{"checksum": "([0-9a-f]{16})", ')


class Listed(NamedTuple):
    """What a file must be.

    Attributes:
      size: in bytes.
      checksum: 16 hexadecimal digits.
      is_head: whether that is said of the first bytes alone: an index says what follows them.
    """

    size: int
    checksum: str
    is_head: bool = False


@attrs.frozen
class FileList:
    """What the list says.

    Attributes:
      files: the files of a checkpoint, by their paths below it.
      providers: who provides the handlers that wrote it, by type string: 'distribution version', or 'module name'.
    """

    files: Mapping[str, Listed]
    providers: Mapping[str, str] = attrs.field(factory=dict)

    def check(self, location: Location, wanted: Callable[[str], bool]) -> None:
        """Reads the files that are `wanted`, by path.

        Raises:
          errors.NotFoundError: files are missing; names them.
          errors.CorruptCheckpointError: files differ from what was written; names them, and those that are missing.
          errors.StorageError: a file cannot be read.
        """
        chosen = {path: listed for path, listed in self.files.items() if wanted(path)}
        problems = self.problems(location, chosen)
        for problem in problems.values():
            if isinstance(problem, errors.StorageError):
                raise problem
        if not problems:
            return
        missing = all(isinstance(problem, errors.NotFoundError) for problem in problems.values())
        what = "are missing" if missing else "differ from what was written"
        whole = [path for path in chosen if path not in problems]
        raise (errors.NotFoundError if missing else errors.CorruptCheckpointError)(
            f"{location.url}: {len(problems)} of {len(chosen)} files {what}:"
            f"{errors.listing(f'{path}: {_reason(problem)}' for path, problem in problems.items())}\n"
            f"{len(whole)} are whole{errors.first_of(whole)}. Restore another checkpoint, or a copy of this one; of a composite, "
            f"items whose files are whole can be restored by name. (Was a file changed on purpose? Then remove {FILE_LIST} too.)"
        )

    def problems(
        self, location: Location, files: Mapping[str, Listed], advance: Callable[[int], None] = lambda nbytes: None
    ) -> dict[str, errors.CheckpointError]:
        """What is wrong with which of some files; `advance` is told the bytes of each once it was read."""

        def problem(path: str, listed: Listed) -> errors.CheckpointError | None:
            try:
                found = _measured(location, path, listed.size if listed.is_head else None)
            except errors.CheckpointError as error:
                return error
            finally:
                advance(listed.size)
            if found == listed:
                return None
            expected = f"{listed.size} bytes with checksum {listed.checksum}"
            return errors.CorruptCheckpointError(f"{found.size} bytes with checksum {found.checksum}, expected {expected}")

        little = location.local_path is not None and sum([listed.size for listed in files.values()]) <= _LITTLE_NBYTES
        found = _each(lambda path: problem(path, files[path]), files, at_once=little)
        return {path: error for path, error in found.items() if error is not None}


_relied_on: ContextVar[tuple[str, FileList] | None] = ContextVar("ckptkit_file_list", default=None)


@contextlib.contextmanager
def relying_on(location: Location, listed: FileList | None) -> Iterator[None]:
    """What is read of a checkpoint meanwhile is held to its list, if it has one, whichever handler reads it: see `is_stray`.

    The same holds for `saved_names`. The list travels in a context variable, since a handler knows its own directory alone, and
    it lies in the checkpoint's.
    """
    token = _relied_on.set(None if listed is None else (f"{location.url.rstrip('/')}/", listed))
    try:
        yield
    finally:
        _relied_on.reset(token)


def is_stray(directory: Location, name: str, beside: str) -> bool:
    """Whether a file came later than the list of the checkpoint, which has the file `beside` it and does not have this one."""
    names = _listed_names(directory, (name, beside))
    return beside in names and name not in names


def saved_names(directory: Location) -> Mapping[str, bool]:
    """What is in a directory of a checkpoint, as `names()` says, without files that came later than the list of the checkpoint.

    All of it where no checkpoint with a list is being read, or where its list has no file of the directory. To be asked in the
    thread that calls a reader or a handler: the list travels in a context variable.
    """
    names = directory.names()
    listed = _listed_names(directory, names)
    return {name: is_folder for name, is_folder in names.items() if is_folder or name in listed} if listed else names


def _listed_names(directory: Location, names: Iterable[str]) -> set[str]:
    """Which of some names in a directory are files that the list of the checkpoint has."""
    if (relied_on := _relied_on.get()) is None:
        return set()
    root, listed = relied_on
    path = f"{directory.url.rstrip('/')}/".removeprefix(root)
    return {name for name in names if path + name in listed.files}


def write_file_list(
    location: Location,
    covered: Collection[str],
    heads: Mapping[str, int],
    late: Mapping[str, bytes],
    providers: Mapping[str, str],
) -> None:
    """Lists what is in a directory.

    Args:
      location: of the checkpoint that is about to be committed.
      covered: URLs of directories whose files an index covers.
      heads: URLs of files that an index covers from a byte on.
      late: files that are written after the list.
      providers: who provides the handlers, by type string.

    Raises:
      errors.ArgsError: a handler wrote a file of the list's own name.
      errors.StorageError: a file cannot be read, or the list cannot be written.
    """
    url = f"{location.url.rstrip('/')}/"
    found = location.files({each.removeprefix(url) for each in covered})
    paths = [path for path in found if not is_of_commits(path)]
    if FILE_LIST in paths:
        raise errors.ArgsError(f"{location.url}: a handler wrote {FILE_LIST!r}, the name of the checkpoint's list of files.")
    root = location.local_path
    known = {path: heads[url + path] for path in paths if url + path in heads}
    whole = [path for path in paths if path not in known]
    with mapped_os_errors(location.url, "list the files"):
        nbytes = 0 if root is None else sum([os.path.getsize(os.path.join(root, path)) for path in whole], sum(known.values()))
    little = root is not None and nbytes <= _LITTLE_NBYTES
    files = _each(lambda path: _measured(location, path, known.get(path)), paths, at_once=little)
    files |= {name: Listed(len(data), xxhash.xxh3_64_hexdigest(data)) for name, data in late.items()}
    location.write_bytes(FILE_LIST, _encode(files, providers))


def read_file_list(location: Location) -> FileList | None:
    """The list of a checkpoint; None where there is none, as in Orbax's.

    Raises:
      errors.CorruptCheckpointError: it is not as it was written.
      errors.FormatError: a later version wrote it.
    """
    if not location.exists(FILE_LIST):
        return None
    return _decode(location.read_bytes(FILE_LIST), f"{location.url}/{FILE_LIST}")


def _each(function: Callable[[str], T], paths: Collection[str], *, at_once: bool) -> dict[str, T]:
    """What a function returns for each path: by threads, or in this one, where starting them would take longer."""
    if at_once:
        return {path: function(path) for path in paths}
    with Workers(max(1, min(4, os.cpu_count() or 1, len(paths))), "ckptkit-files") as workers:
        pending = {path: workers.submit(function, path) for path in paths}
        return {path: future.result() for path, future in pending.items()}


def _measured(location: Location, path: str, head: int | None) -> Listed:
    """A file as it is, or as many bytes of its beginning as `head` says."""
    size, checksum = 0, xxhash.xxh3_64()
    for block in location.blocks(path):
        part = block if head is None else block[: head - size]
        size += len(part)
        checksum.update(part)
        if size == head:
            break
    return Listed(size, checksum.hexdigest(), head is not None)


def _encode(files: Mapping[str, Listed], providers: Mapping[str, str]) -> bytes:
    entries = {path: listed if listed.is_head else listed[:2] for path, listed in files.items()}
    body = json.dump_exact({"version": _VERSION, "algorithm": _ALGORITHM, "providers": providers, "files": entries})[1:]
    return b'{"checksum": "%b", %b' % (xxhash.xxh3_64_hexdigest(body).encode(), body)


def _decode(data: bytes, where: str) -> FileList:
    sealed = _SEAL.match(data)
    if sealed is None or xxhash.xxh3_64_hexdigest(memoryview(data)[sealed.end() :]).encode() != sealed[1]:
        raise errors.CorruptCheckpointError(
            f"{where}: the list of the checkpoint's files differs from what was written; nothing tells what they should be. "
            "Restore another checkpoint, or a copy of this one; removing the list allows to restore without it."
        )
    document = json.expect(json.load(data, where), dict, "the document", where)
    if (document.get("version"), document.get("algorithm")) != (_VERSION, _ALGORITHM):
        raise errors.FormatError(f"{where}: version {document.get('version')!r}, expected {_VERSION}; a newer ckptkit wrote it.")
    files = json.expect(document.get("files"), dict, "files", where)
    providers = json.expect(document.get("providers", {}), dict, "providers", where)
    return FileList(
        {path: _listed(value, path, where) for path, value in files.items()},
        {typestr: json.expect(provider, str, "a provider", where) for typestr, provider in providers.items()},
    )


def _listed(value: Any, path: str, where: str) -> Listed:
    match value:
        case [int(size), str(checksum)] | [int(size), str(checksum), True] if size >= 0:
            return Listed(size, checksum, len(value) == 3)
    raise json.unexpected(where, f"the entry of {path!r}", value, "a size and a checksum")


def _reason(error: errors.CheckpointError) -> str:
    return "missing" if isinstance(error, errors.NotFoundError) else str(error)
