"""The general handler of trees, under Standard (and whatever else stores arrays by name)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import attrs

from ckptkit import args as args_lib
from ckptkit import discovery
from ckptkit._checks import flag, given_options, optional, positive, text
from ckptkit._gc import paused_gc
from ckptkit.handlers._documents import documents
from ckptkit.handlers._stored import StoredTree
from ckptkit.handlers._wanted import Wanted, every_item
from ckptkit.handlers.base import DeferredPathAsyncCheckpointHandler, PathAwaitingCreation, created, folded_args
from ckptkit.metadata import sharding as sharding_documents
from ckptkit.metadata.json import checked_custom
from ckptkit.metadata.rich import decode_rich
from ckptkit.metadata.tree import TREE_FILE, Entry, is_empty_node, nest
from ckptkit.metadata.values import ArrayMetadata, ScalarMetadata, StorageMetadata, StringMetadata, TreeMetadata
from ckptkit.options import MultiprocessingOptions, PyTreeMetadataOptions, RestoreDefaults, StorageOptions
from ckptkit.pipeline.plan import PLAIN, LeafRules, plan_save
from ckptkit.pipeline.restore import RestoreItem, restore_leaves
from ckptkit.pipeline.save import start_save
from ckptkit.processes import job_of
from ckptkit.registry import Registry

if TYPE_CHECKING:
    from etils import epath

__all__ = ["PyTreeCheckpointHandler"]

_GB = 10**9


class PyTreeCheckpointHandler(DeferredPathAsyncCheckpointHandler):
    """Saves and restores any tree whose leaves have a type handler."""

    further_typestrs = ("orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler",)

    def __init__(  # noqa: PLR0913 - what Orbax takes, and what it does not have
        self,
        *,
        save_concurrent_gb: float | None = None,
        restore_concurrent_gb: float | None = None,
        save_device_host_concurrent_gb: float | Literal["auto"] | None = None,
        multiprocessing_options: MultiprocessingOptions | None = None,
        pytree_metadata_options: PyTreeMetadataOptions | None = None,
        use_ocdbt: bool = True,
        use_zarr3: bool = False,
        zarr3_crc32c: bool = False,
        compression: Literal["auto", "zstd"] | None = "auto",
        use_compression: bool | None = None,
        enable_pinned_host_transfer: bool | None = None,
        aggregate_filename: str | None = None,
        storage: str | None = None,
        target_data_file_size: int | None = None,
    ) -> None:
        """Sets what holds for every save and restore of this handler.

        Args:
          save_concurrent_gb: bound of the host memory that staged copies take while they are written, in 10**9 bytes; 96
            where it is None.
          restore_concurrent_gb: bound of what is read ahead of what is assembled, in 10**9 bytes; 96 where it is None.
          save_device_host_concurrent_gb: a second bound of the same; the lower of the two holds. 'auto' is none.
          multiprocessing_options: which processes take part.
          pytree_metadata_options: whether tuples and named tuples come back as such where there is no target.
          use_ocdbt: False is short for `storage='zarr'`.
          use_zarr3: write zarr version 3 documents.
          zarr3_crc32c: with `use_zarr3`, add zarr's own checksum to every chunk, for programs that do not read ckptkit's; it
            takes a quarter of the speed of writing, and half of that of reading.
          compression: 'zstd' compresses every chunk, at level 1: less on disk for values that repeat, several times slower, and
            8 % smaller for random floats. None compresses nothing. 'auto' compresses, in OCDBT databases alone, arrays with cells
            of 1 MiB and more where a sample says that they shrink to a quarter.
          use_compression: True and False are Orbax's words for 'zstd' and None.
          enable_pinned_host_transfer: arrays go from their devices to the host by way of its pinned memory, chunk by chunk, where
            the devices have such memory; None means False.
          aggregate_filename: of the msgpack file in which old releases of Orbax kept leaves; 'checkpoint' where it is None.
          storage: name of the storage backend; 'ocdbt' where it is None.
          target_data_file_size: bytes after which a backend that packs arrays into files starts the next; None is the backend's
            own default.

        Raises:
          errors.ArgsError: an argument of another type, a bound or a size that is not above 0, or `zarr3_crc32c` without
            `use_zarr3`.
        """
        flags = {"use_ocdbt": use_ocdbt, "use_zarr3": use_zarr3, "zarr3_crc32c": zarr3_crc32c}
        for name, given in flags.items():
            flag(self, name, given)
        optional(text)(self, "storage", storage)
        optional(text)(self, "aggregate_filename", aggregate_filename)
        optional(flag)(self, "use_compression", use_compression)
        if use_compression is not None:
            compression = "zstd" if use_compression else None
        optional(flag)(self, "enable_pinned_host_transfer", enable_pinned_host_transfer)
        if save_device_host_concurrent_gb == "auto":
            save_device_host_concurrent_gb = None
        self._save_bytes = min(
            _bytes(self, "save_concurrent_gb", save_concurrent_gb),
            _bytes(self, "save_device_host_concurrent_gb", save_device_host_concurrent_gb),
        )
        self._restore_bytes = _bytes(self, "restore_concurrent_gb", restore_concurrent_gb)
        self._processes = given_options(self, "multiprocessing_options", multiprocessing_options, MultiprocessingOptions)
        self._rich = given_options(
            self, "pytree_metadata_options", pytree_metadata_options, PyTreeMetadataOptions
        ).support_rich_types
        self._storage = storage or ("ocdbt" if use_ocdbt else "zarr")
        self._options = StorageOptions(
            use_zarr3=use_zarr3,
            compression=compression,
            zarr3_crc32c=zarr3_crc32c,
            target_data_file_size=target_data_file_size,
        )
        self._aggregate_file = aggregate_filename
        self._pinned_host = bool(enable_pinned_host_transfer)

    @classmethod
    def typestr(cls) -> str:
        return "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"

    async def async_save(
        self,
        directory: epath.Path | PathAwaitingCreation,
        item: Any = None,
        save_args: Any = None,
        args: args_lib.PyTreeSave | None = None,
    ) -> list[Future[Any]]:
        """Stages the tree and starts to write it; see `start_save`. `item` and `save_args` are deprecated: `args` says the same.

        Raises:
          errors.TreeError: lists every leaf that cannot be saved; nothing was written.
        """
        return self.start_save(directory, folded_args(args_lib.PyTreeSave, args, item=item, save_args=save_args))

    @paused_gc()
    def start_save(
        self, directory: epath.Path | PathAwaitingCreation, args: args_lib.PyTreeSave, rules: LeafRules = PLAIN
    ) -> list[Future[Any]]:
        """What `async_save` does, for leaves as `rules` want them."""
        job_of(self._processes)  # refuses a save that would never be committed
        registry = discovery.ready(self.registry)
        custom_metadata = checked_custom(args.custom_metadata, "custom_metadata")
        options = self._options
        if args.ocdbt_target_data_file_size is not None:
            options = attrs.evolve(options, target_data_file_size=args.ocdbt_target_data_file_size)
        plan, values = plan_save(
            args.item,
            args.save_args,
            registry,
            registry.storage(self._storage),
            options,
            self._save_bytes,
            attrs.evolve(rules, pinned_host=self._pinned_host),
        )

        def describe(checksums: Mapping[str, list[str]]) -> Iterable[tuple[str, bytes]]:
            return documents(plan, checksums, custom_metadata, registry, rich=self._rich)

        return [start_save(plan, values, lambda: registry.location(created(directory)), describe)]

    def restore(
        self, directory: epath.Path, item: Any = None, restore_args: Any = None, args: args_lib.PyTreeRestore | None = None
    ) -> Any:
        """The tree as saved, shaped like `args.item` if there is one; `args.restore_args` says how each leaf is restored.

        `item` and `restore_args` are deprecated: `args` says the same.

        Raises:
          errors.TargetError: lists every disagreement between checkpoint and target.
          errors.CorruptCheckpointError: bytes differ from what was written.
        """
        args = folded_args(args_lib.PyTreeRestore, args, item=item, restore_args=restore_args)
        return self.restore_tree(
            directory,
            args.item,
            restore_args=args.restore_args,
            defaults=RestoreDefaults(casting=args.casting, on_corrupt=args.on_corrupt),
            partial=args.partial_restore,
        )

    @paused_gc()
    def restore_tree(
        self,
        directory: epath.Path,
        target: Any,
        *,
        restore_args: Any = None,
        typed_by_target: bool = False,
        defaults: RestoreDefaults,
        partial: bool = False,
    ) -> Any:
        """The one path of every restore.

        Args:
          directory: what to read.
          target: the tree to shape the result like, or None.
          restore_args: a tree of `RestoreArgs` (or None) like the target, or like the stored tree where there is no target.
          typed_by_target: the target's leaves say what each leaf becomes, where `restore_args` does not.
          defaults: what holds for every leaf.
          partial: leave out what the target does not name, instead of refusing it.
        """
        registry = discovery.ready(self.registry)
        with StoredTree(registry.location(directory), registry, self._aggregate_file) as stored:
            if target is None and restore_args is None:
                return self._nested(stored, _restore_all(registry, stored, defaults, self._restore_bytes))
            wanted = Wanted(registry, stored, defaults, typed_by_target=typed_by_target)
            structure = wanted.match(target, restore_args, partial=partial)
            leaves = _read(registry, stored, wanted.items, defaults, self._restore_bytes)
            for position, leaf in zip(wanted.positions, leaves, strict=True):
                wanted.values[position] = leaf
            return structure.unflatten(wanted.values)

    @paused_gc()
    def metadata(self, directory: epath.Path) -> TreeMetadata:
        """The tree with the metadata of each leaf in its place; no array is read."""
        registry = discovery.ready(self.registry)
        with StoredTree(registry.location(directory), registry, self._aggregate_file) as stored:
            entries = stored.document.entries
            values = [None if is_empty_node(entry) else _leaf_metadata(stored, entry, directory) for entry in entries]
            return TreeMetadata(tree=self._nested(stored, values), custom_metadata=stored.document.custom_metadata)

    def _nested(self, stored: StoredTree, values: Sequence[Any]) -> Any:
        """The tree, of containers as they were recorded, with the value of each entry in its place."""
        document = stored.document
        if self._rich and document.value_metadata_tree is not None:
            return decode_rich(document.value_metadata_tree, document.entries, values, f"{stored.location.url}/{TREE_FILE}")
        return nest(document.entries, values)


def _bytes(owner: PyTreeCheckpointHandler, name: str, gigabytes: float | None) -> int:
    optional(positive)(owner, name, gigabytes)
    return int(min((96 if gigabytes is None else gigabytes) * _GB, sys.maxsize))


def _restore_all(registry: Registry, stored: StoredTree, defaults: RestoreDefaults, max_inflight_bytes: int) -> list[Any]:
    """For each entry the leaf as it was saved; None for an empty node."""
    items = every_item(registry, stored, defaults)
    values: list[Any] = [None if is_empty_node(entry) else ... for entry in stored.document.entries]
    leaves = _read(registry, stored, list(items.values()), defaults, max_inflight_bytes)
    for position, leaf in zip(items, leaves, strict=True):
        values[position] = leaf
    return values


def _read(
    registry: Registry, stored: StoredTree, items: Sequence[RestoreItem], defaults: RestoreDefaults, max_inflight_bytes: int
) -> list[Any]:
    where, how = stored.location.url, defaults.on_corrupt
    return restore_leaves(items, registry, stored.reader, stored.index, max_inflight_bytes, where, how, stored.lost)


def _leaf_metadata(stored: StoredTree, entry: Entry, directory: epath.Path) -> Any:
    name, spec = stored.leaf(entry)
    if spec.array is None:
        return StringMetadata(name=name, directory=directory)
    if entry.value_type == "scalar":
        return ScalarMetadata(name=name, directory=directory, dtype=spec.array.dtype)
    return ArrayMetadata(
        name=name,
        directory=directory,
        shape=spec.array.shape,
        dtype=spec.array.dtype,
        sharding=None if spec.sharding is None else sharding_documents.ShardingMetadata(spec.sharding),
        storage=StorageMetadata(chunk_shape=spec.array.chunk_shape, write_shape=spec.extra.get("write_shape")),
    )
