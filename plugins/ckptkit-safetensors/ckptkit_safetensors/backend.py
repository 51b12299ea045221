"""The storage backend: which arrays it takes, and who writes and reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ckptkit import errors
from ckptkit.options import StorageOptions
from ckptkit.storage import ArraySpec, Job, Location, Reader, StorageBackend, Writer
from ckptkit_safetensors.files import is_data_file, is_index
from ckptkit_safetensors.header import METADATA_KEY, WORDS
from ckptkit_safetensors.reader import SafetensorsReader
from ckptkit_safetensors.writer import SafetensorsWriter

__all__ = ["SafetensorsBackend"]

_FILE_NBYTES: Final = 5 * 10**9
"""How large a file grows unless asked otherwise: what the Hugging Face Hub recommends."""


class SafetensorsBackend(StorageBackend):
    """Arrays one after the other in safetensors files on this machine.

    `StorageOptions.target_data_file_size` bounds the arrays of one file, in bytes (5 * 10**9 where it is None); a larger array
    has a file of its own.
    """

    name = "safetensors"

    def refuse(self, arrays: Sequence[ArraySpec]) -> Sequence[str | None]:
        return [_dtype_refusal(array.dtype) for array in arrays]

    def refuse_names(self, names: Sequence[str]) -> Sequence[str | None]:
        if METADATA_KEY not in names and _encodable("".join(names)):  # 10,000 names at once, since a save waits for it
            return [None] * len(names)
        return [_name_refusal(name) for name in names]

    def writer(self, location: Location, arrays: Sequence[ArraySpec], options: StorageOptions, job: Job) -> Writer:
        """A writer into an empty directory.

        Raises:
          errors.ArgsError: the location is no directory of this machine, or the options ask for what the format has not.
        """
        if options.compression == "zstd" or options.use_zarr3:
            raise errors.ArgsError(
                "storage='safetensors' keeps the bytes of arrays as they are in memory: leave out use_compression and use_zarr3, "
                "or use OCDBT."
            )
        return SafetensorsWriter(_local(location), arrays, options.target_data_file_size or _FILE_NBYTES)

    def reader(self, location: Location) -> Reader:
        """A reader of a file, or of a directory of files, whatever program wrote them.

        Raises:
          errors.ArgsError: the location is not on this machine.
        """
        return SafetensorsReader(location, _local(location))

    def recognises(self, location: Location) -> bool:
        names = location.names()
        if not names:  # a file, unless there is nothing at all
            return is_data_file(location.url) and location.exists()
        return any((is_data_file(name) or is_index(name)) and not is_directory for name, is_directory in names.items())

    def keys_of(self, name: str) -> tuple[str, ...]:
        """The name itself: a file is a flat dict, as for the library's own loaders."""
        return (name,)


def _dtype_refusal(dtype: np.dtype[Any]) -> str | None:
    if dtype in WORDS:
        return None
    return (
        f"safetensors has no dtype {dtype}: cast it with SaveArgs(dtype=...), or save with OCDBT. It has: "
        f"{', '.join(sorted(map(str, WORDS)))}."
    )


def _name_refusal(name: str) -> str | None:
    if name == METADATA_KEY:
        return f"the name {METADATA_KEY!r} is taken in a safetensors file: rename it, or save with OCDBT."
    if not _encodable(name):
        return f"the name {name!a} cannot be encoded as UTF-8: rename it."
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _local(location: Location) -> str:
    if location.local_path is None:
        raise errors.ArgsError(
            f"{location.url} is not on this machine, where storage='safetensors' needs its files; use OCDBT there, or copy them "
            "here."
        )
    return location.local_path
