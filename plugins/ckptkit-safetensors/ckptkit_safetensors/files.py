"""Which files make a checkpoint: one, or several with an index that says which array is in which.

The names are those of the Hugging Face Hub (https://huggingface.co/docs/transformers/big_models).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from ckptkit import errors
from ckptkit.storage import ArraySpec, Location, mapped_os_errors, saved_names
from ckptkit_safetensors.header import LENGTH_NBYTES, MAX_NBYTES, parse, sizes

__all__ = ["INDEX_FILE", "Place", "encode_index", "file_names", "is_data_file", "is_index", "opened", "places", "split"]

INDEX_FILE: Final = "model.safetensors.index.json"
_SUFFIX: Final = ".safetensors"
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_MAX_INDEX_NBYTES: Final = 1 << 30
_PART: Final = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors")


class Place(NamedTuple):
    """Where an array lies.

    Attributes:
      array: the array.
      path: of its file.
      offset: the byte at which it begins there.
      exact: as in `Tensor`.
    """

    array: ArraySpec
    path: str
    offset: int
    exact: bool = True


def is_data_file(name: str) -> bool:
    """Whether a file is called as those that hold arrays."""
    return name.endswith(_SUFFIX)


def is_index(name: str) -> bool:
    """Whether a file is called as those that say which array is in which file."""
    return name.endswith(_INDEX_SUFFIX)


def split(arrays: Sequence[ArraySpec], limit: int) -> list[list[ArraySpec]]:
    """The arrays of each file, in the order given; a file holds at most `limit` bytes of them, or one array."""
    files: list[list[ArraySpec]] = [[]]
    size = 0
    for array, nbytes in zip(arrays, sizes(arrays), strict=True):
        if files[-1] and size + nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(array)
        size += nbytes
    return files


def file_names(count: int) -> list[str]:
    """The names of so many files, as the loaders of the Hugging Face Hub know them."""
    return ["model.safetensors"] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def encode_index(files: Mapping[str, Sequence[ArraySpec]]) -> bytes:
    """The index of the arrays of several files."""
    total = sum([array.nbytes for arrays in files.values() for array in arrays])
    weights = {array.name: name for name, arrays in files.items() for array in arrays}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weights}, ensure_ascii=False, indent=1).encode()


def places(location: Location, path: str) -> dict[str, Place]:
    """Every array in a file, or in the files of a directory, with its place.

    Where a checkpoint has a list of its files, those that came later are none of its own, whatever they are called.

    Args:
      location: of the file or the directory.
      path: the same on this machine.

    Raises:
      errors.NotFoundError: a file that others tell of is missing.
      errors.FormatError: a file that cannot be understood, that is no file of this directory, or two arrays of one name.
    """
    if not os.path.isdir(path):
        return _tensors(path, None)
    names = sorted(saved_names(location))
    index = _index_among(names, path)
    return _every(names, path) if index is None else _listed(index, names, path)


def _index_among(names: Sequence[str], path: str) -> str | None:
    found = [name for name in names if is_index(name)]
    if len(found) > 1 and INDEX_FILE not in found:
        raise errors.FormatError(f"{path} holds several models: {', '.join(found)}. Keep each in a directory of its own.")
    return None if not found else INDEX_FILE if INDEX_FILE in found else found[0]


def _every(names: Sequence[str], path: str) -> dict[str, Place]:
    """The arrays of all files, which together hold no name twice."""
    files = [name for name in names if is_data_file(name) and not os.path.isdir(os.path.join(path, name))]
    _check_complete(files, path)
    found: dict[str, Place] = {}
    for file in files:
        tensors = _tensors(os.path.join(path, file), path)
        if taken := [name for name in tensors if name in found]:
            other = os.path.basename(found[taken[0]].path)
            raise errors.FormatError(
                f"{path}: array {taken[0][:100]!r} is in {other} and in {file}; restore one of the files by its own path."
            )
        found |= tensors
    return found


def _check_complete(files: Sequence[str], path: str) -> None:
    """No file of a numbered series is missing."""
    for stem, count in {match.groups() for match in map(_PART.fullmatch, files) if match}:
        series = [f"{stem}-{i:05}-of-{count}{_SUFFIX}" for i in range(1, int(count) + 1)]
        if absent := sorted(set(series) - set(files)):
            raise _missing(absent[0], path)


def _listed(index: str, names: Sequence[str], path: str) -> dict[str, Place]:
    """The arrays that an index lists; whatever else there is belongs to something else."""
    weights = _weight_map(os.path.join(path, index), path)
    found: dict[str, Place] = {}
    for file in dict.fromkeys(weights.values()):
        if os.path.basename(file) != file or not is_data_file(file):
            raise errors.FormatError(
                f"{path}/{index}: {file[:200]!r} is not the name of a safetensors file in the same directory."
            )
        if file not in names:
            raise _missing(file, path)
        tensors = _tensors(os.path.join(path, file), path)
        found |= {name: place for name, place in tensors.items() if weights.get(name) == file}
    if absent := [name for name in weights if name not in found]:
        what = f"{index} says that array {absent[0][:100]!r} is in {weights[absent[0]]}, where it is not"
        raise errors.NotFoundError(errno.ENOENT, what, path)
    return found


def _weight_map(index: str, path: str) -> Mapping[str, str]:
    with opened(index, path) as (descriptor, size):
        text = _read(descriptor, 0, _checked_size(size, _MAX_INDEX_NBYTES, index))
    try:
        document = json.loads(text.decode())
        weights = document["weight_map"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise errors.FormatError(f"{index}: not an index of safetensors files: {type(error).__name__}: {error}.") from error
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise errors.FormatError(f"{index}: expected weight_map to be an object of texts.")
    return weights


def _tensors(path: str, directory: str | None) -> dict[str, Place]:
    """The arrays of one file."""
    with opened(path, directory) as (descriptor, size):
        length = int.from_bytes(_read(descriptor, 0, LENGTH_NBYTES), "little")
        start = LENGTH_NBYTES + length
        if size < LENGTH_NBYTES or start > size:
            raise errors.FormatError(
                f"{path}: not a safetensors file: a header of {length} bytes does not fit into its {size} bytes."
            )
        header = parse(_read(descriptor, LENGTH_NBYTES, _checked_size(length, MAX_NBYTES, path)), size - start, path)
    return {name: Place(array, path, start + offset, exact) for name, (array, offset, exact) in header.items()}


@contextlib.contextmanager
def opened(path: str, directory: str | None) -> Iterator[tuple[int, int]]:
    """The descriptor of a file, open for reading, and its size in bytes.

    Args:
      path: of the file.
      directory: where it was found; a link that leads out of it is refused, but to the store of the Hugging Face cache, which
        keeps files in `blobs` and links to them from `snapshots/<revision>`. None: the user named the file, wherever it leads.

    Raises:
      errors.FormatError: such a link, or what is no regular file.
      errors.NotFoundError, errors.StorageError: what the system says.
    """
    with mapped_os_errors(path, "read"):
        if directory is not None:
            _check_link(path, directory)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or a named pipe would wait for its writer
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise errors.FormatError(f"{path}: expected a regular file.")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)


def _check_link(path: str, directory: str) -> None:
    target, root = os.path.realpath(path), os.path.realpath(directory)
    blobs = os.path.realpath(os.path.join(root, "..", "..", "blobs"))
    if not target.startswith((root + os.sep, blobs + os.sep)):
        raise errors.FormatError(f"{path}: the link leads out of {directory}; copy the file in its place.")


def _checked_size(size: int, limit: int, path: str) -> int:
    if size > limit:
        raise errors.FormatError(f"{path}: a description of {size} bytes, expected at most {limit}.")
    return size


def _read(descriptor: int, offset: int, size: int) -> bytes:
    """So many bytes, or those that there are."""
    parts = []
    while size and (part := os.pread(descriptor, min(size, 1 << 20), offset)):
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def _missing(file: str, path: str) -> errors.NotFoundError:
    return errors.NotFoundError(errno.ENOENT, f"{file} is missing beside the other files of the model; copy it there", path)
