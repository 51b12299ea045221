"""Options objects: plain data with defaults, checked when made. What they switch lives elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import attrs

from ckptkit import errors
from ckptkit._checks import (
    flag,
    function,
    one_of,
    optional,
    positive,
    refuse,
    sharding,
    text,
    validator,
    whole_number,
    whole_numbers,
)

__all__ = [
    "AsyncOptions",
    "FileOptions",
    "MultiprocessingOptions",
    "PyTreeMetadataOptions",
    "RestoreDefaults",
    "StorageOptions",
]

MAX_CHUNK_BYTE_SIZE = 32 << 20
"""Chunks are no larger than this unless `SaveArgs.chunk_byte_size` says otherwise: reading, checksumming and transfer overlap."""

Devices = Literal["local", "numpy"]
Casting = Literal["no", "equiv", "safe", "same_kind", "unsafe"]
OnCorrupt = Literal["raise", "skip"]


def _processes(values: Any) -> frozenset[int] | None:
    if values is None:
        return None
    return frozenset(
        whole_numbers("MultiprocessingOptions", "active_processes", values, "a set of indices of processes, or None")
    )


def _some_processes(options: MultiprocessingOptions, attribute: attrs.Attribute[Any], value: frozenset[int] | None) -> None:
    if value is None:
        return
    if not value or min(value) < 0:
        raise refuse(options, attribute.name, set(value), "indices of processes, at least one", errors.ArgsError)
    if options.primary_host is not None and options.primary_host not in value:
        raise errors.ArgsError(
            f"MultiprocessingOptions(primary_host={options.primary_host}, active_processes={set(value)}): the primary process "
            "must be one of those that take part; pass primary_host too."
        )


@attrs.frozen(kw_only=True)
class AsyncOptions:
    """How saves in the background behave.

    Attributes:
      timeout_secs: how long one save may take, in seconds, before waiting for it raises `errors.TimeoutError`.
      barrier_sync_fn: unused in a single process; kept so that code written for Orbax runs.
      post_finalization_callback: called with no arguments in the background after each commit.
      create_directories_asynchronously: the directory is made in the background, for handlers that take one that is not there
        yet, and several processes meet there; what goes wrong with it (another writer, no permission, a process that saves to
        another path) is then an error of the background too.
    """

    timeout_secs: float = attrs.field(default=1200, validator=validator(positive))
    barrier_sync_fn: Callable[..., Any] | None = attrs.field(default=None, validator=validator(optional(function)))
    post_finalization_callback: Callable[[], None] | None = attrs.field(default=None, validator=validator(optional(function)))
    create_directories_asynchronously: bool = attrs.field(default=True, validator=validator(flag))


@attrs.frozen(kw_only=True)
class MultiprocessingOptions:
    """Which processes of the job take part in a save, and whether they help each other to restore.

    Attributes:
      primary_host: index of the process that writes metadata and commits; None where every process saves to a disk of its own.
      active_processes: indices of the processes that take part, the primary one among them; None means all.
      barrier_sync_key_prefix: put before the names of barriers, of which one process needs none; for several threads that save at
        once, one each.
      timeout_secs: after so long without a sign of life from a process, the others give up the save. Below the 100 s after which
        JAX itself ends a job that lost a process (`jax.distributed.initialize(heartbeat_timeout_seconds=)`), and the same on all.
      single_reader: on restore, what several processes need is read by the first of them, and passed on over the devices; all of
        them must restore at the same time, into the same target. False: each reads all that it needs, by itself.
    """

    primary_host: int | None = attrs.field(
        default=0, validator=validator(optional(whole_number("the index of a process, or None", 0)))
    )
    active_processes: frozenset[int] | None = attrs.field(default=None, converter=_processes, validator=_some_processes)
    barrier_sync_key_prefix: str | None = attrs.field(default=None, validator=validator(optional(text)))
    timeout_secs: float = attrs.field(default=60, validator=validator(positive))
    single_reader: bool = attrs.field(default=False, validator=validator(flag))


@attrs.frozen(kw_only=True)
class FileOptions:
    """How files are made.

    Attributes:
      path_permission_mode: permission bits of the checkpoint's directories, such as 0o750; None leaves it to the umask.
    """

    path_permission_mode: int | None = attrs.field(
        default=None, validator=validator(optional(whole_number("permission bits such as 0o750", 0, 0o7777)))
    )


@attrs.frozen(kw_only=True)
class PyTreeMetadataOptions:
    """What is recorded about the containers of a tree.

    Attributes:
      support_rich_types: tuples and named tuples are recorded on save, and on restore without a target come back as such: a
        named tuple as one of a class made for it. False makes them lists and dicts.
    """

    support_rich_types: bool = attrs.field(default=False, validator=validator(flag))


@attrs.frozen(kw_only=True)
class StorageOptions:
    """What a handler asks of a storage backend.

    Attributes:
      use_zarr3: write zarr version 3 documents instead of version 2.
      compression: how chunks are compressed; None to store them as they are in memory; 'auto' leaves it to the backend, which may
        compress where a sample says that it pays.
      zarr3_crc32c: add zarr's own checksum to every chunk of version 3, which TensorStore, and so Orbax, verifies as well.
      target_data_file_size: bytes after which a backend that packs values into files starts the next; None is its own default.
    """

    use_zarr3: bool = attrs.field(default=False, validator=validator(flag))
    compression: Literal["auto", "zstd"] | None = attrs.field(
        default=None, validator=validator(optional(one_of(["auto", "zstd"], " or None")))
    )
    zarr3_crc32c: bool = attrs.field(default=False, validator=validator(flag))
    target_data_file_size: int | None = attrs.field(default=None, validator=validator(optional(whole_number("bytes above 0", 1))))

    @zarr3_crc32c.validator
    def _check_version(self, attribute: attrs.Attribute[Any], value: bool) -> None:  # noqa: FBT001 - attrs passes it so
        if value and not self.use_zarr3:
            raise errors.ArgsError("zarr3_crc32c=True needs use_zarr3=True: chunks of zarr version 2 have no checksums.")


@attrs.frozen(kw_only=True)
class RestoreDefaults:
    """What holds for every leaf of one restore where the leaf's own request does not say otherwise.

    Attributes:
      strict: a stored shape that differs from the requested one is an error; False pads with zeros or truncates.
      fallback_sharding: a `jax.sharding.Sharding` for arrays whose saved devices are not here.
      casting: numpy's word for the casts allowed from the stored to the requested dtype.
      support_layout: honour the memory layout of a target that carries a `jax.experimental.layout.Format`.
      devices: where jax.Arrays go for which the target names no sharding: 'local', this process's first device; 'numpy', host
        memory, as np.ndarray; None, where they were saved.
      on_corrupt: what happens where stored bytes are damaged: 'raise', an error; 'skip', those leaves are `...`, with a warning.
    """

    strict: bool = attrs.field(default=True, validator=validator(flag))
    fallback_sharding: Any = attrs.field(default=None, validator=validator(optional(sharding)))
    casting: Casting = attrs.field(default="unsafe", validator=validator(one_of(get_args(Casting))))
    support_layout: bool = attrs.field(default=False, validator=validator(flag))
    devices: Devices | None = attrs.field(default=None, validator=validator(optional(one_of(get_args(Devices), " or None"))))
    on_corrupt: OnCorrupt = attrs.field(default="raise", validator=validator(one_of(get_args(OnCorrupt))))
