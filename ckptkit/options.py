"""Options objects: plain data with defaults, checked when made. What they switch lives elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import attrs

from ckptkit import errors

__all__ = ["AsyncOptions", "FileOptions", "MultiprocessingOptions", "PyTreeMetadataOptions", "RestoreDefaults", "StorageOptions"]

MAX_CHUNK_BYTE_SIZE = 32 << 20
"""Chunks are no larger than this unless `SaveArgs.chunk_byte_size` says otherwise: reading, checksumming and transfer overlap."""

Devices = Literal["local", "numpy"]
Casting = Literal["no", "equiv", "safe", "same_kind", "unsafe"]
OnCorrupt = Literal["raise", "skip"]


def _positive(instance: Any, attribute: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None and not value > 0:
        raise errors.ArgsError(f"{type(instance).__name__}({attribute.name}={value!r}): expected a number above 0.")


def _permission_bits(instance: Any, attribute: attrs.Attribute[Any], value: int | None) -> None:
    if value is not None and not 0 <= value <= 0o7777:
        raise errors.ArgsError(f"{type(instance).__name__}({attribute.name}={value!r}): expected permission bits such as 0o750.")


@attrs.frozen(kw_only=True)
class AsyncOptions:
    """How saves in the background behave.

    Attributes:
      timeout_secs: how long one save may take, in seconds, before waiting for it raises `errors.TimeoutError`.
      barrier_sync_fn: unused in a single process; kept so that code written for Orbax runs.
      post_finalization_callback: called with no arguments in the background after each commit.
    """

    timeout_secs: float = attrs.field(default=1200, validator=_positive)
    barrier_sync_fn: Callable[..., Any] | None = None
    post_finalization_callback: Callable[[], None] | None = None


@attrs.frozen(kw_only=True)
class MultiprocessingOptions:
    """Which processes of the job take part in a save.

    Attributes:
      primary_host: index of the process that writes metadata and commits.
      active_processes: indices of the processes that take part; None means all.
      barrier_sync_key_prefix: put before the names of barriers.
    """

    primary_host: int | None = 0
    active_processes: set[int] | None = None
    barrier_sync_key_prefix: str | None = None


@attrs.frozen(kw_only=True)
class FileOptions:
    """How files are made.

    Attributes:
      path_permission_mode: permission bits of the checkpoint's directories, such as 0o750; None leaves it to the umask.
    """

    path_permission_mode: int | None = attrs.field(default=None, validator=_permission_bits)


@attrs.frozen(kw_only=True)
class PyTreeMetadataOptions:
    """What is recorded about the containers of a tree.

    Attributes:
      support_rich_types: tuples and named tuples are recorded on save, and on restore without a target come back as such: a
        named tuple as one of a class made for it. False makes them lists and dicts.
    """

    support_rich_types: bool = False


@attrs.frozen(kw_only=True)
class StorageOptions:
    """What a handler asks of a storage backend.

    Attributes:
      use_zarr3: write zarr version 3 documents instead of version 2.
      compression: how chunks are compressed; None to store them as they are in memory.
      zarr3_crc32c: add zarr's own checksum to every chunk of version 3, which TensorStore, and so Orbax, verifies as well.
      target_data_file_size: bytes after which a backend that packs values into files starts the next; None is its own default.
    """

    use_zarr3: bool = False
    compression: Literal["zstd"] | None = attrs.field(default=None, validator=attrs.validators.in_((None, "zstd")))
    zarr3_crc32c: bool = attrs.field(default=False)
    target_data_file_size: int | None = attrs.field(default=None, validator=_positive)

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

    strict: bool = True
    fallback_sharding: Any = None
    casting: Casting = attrs.field(
        default="unsafe", validator=attrs.validators.in_(("no", "equiv", "safe", "same_kind", "unsafe"))
    )
    support_layout: bool = False
    devices: Devices | None = None
    on_corrupt: OnCorrupt = "raise"
