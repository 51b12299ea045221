"""The general handler of trees, under Standard (and whatever else stores arrays by name)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Literal

import attrs
import jax

from ckptkit import args as args_lib
from ckptkit import discovery, errors, tree
from ckptkit._checks import flag, given_options, optional, positive, text
from ckptkit._gc import paused_gc
from ckptkit.handlers._documents import documents
from ckptkit.handlers._stored import StoredTree
from ckptkit.handlers.base import DeferredPathAsyncCheckpointHandler, PathAwaitingCreation, created, folded_args
from ckptkit.leaves.base import ArrayRestoreArgs, LeafSpec, RestoreArgs, TypeHandler
from ckptkit.metadata import sharding as sharding_documents
from ckptkit.metadata.json import checked_custom
from ckptkit.metadata.rich import decode_rich
from ckptkit.metadata.tree import TREE_FILE, Entry, is_empty_node, nest
from ckptkit.metadata.values import ArrayMetadata, ScalarMetadata, StorageMetadata, StringMetadata, TreeMetadata
from ckptkit.options import MultiprocessingOptions, PyTreeMetadataOptions, RestoreDefaults, StorageOptions
from ckptkit.pipeline import answers
from ckptkit.pipeline.plan import PLAIN, LeafRules, plan_save
from ckptkit.pipeline.restore import RestoreItem, restore_leaves, unrestorable
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
        with paused_gc():
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
            wanted = _Wanted(registry, stored, defaults, typed_by_target=typed_by_target)
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
    items = _every_item(registry, stored, defaults)
    values: list[Any] = [None if is_empty_node(entry) else ... for entry in stored.document.entries]
    leaves = _read(registry, stored, list(items.values()), defaults, max_inflight_bytes)
    for position, leaf in zip(items, leaves, strict=True):
        values[position] = leaf
    return values


@paused_gc()
def _every_item(registry: Registry, stored: StoredTree, defaults: RestoreDefaults) -> dict[int, RestoreItem]:
    """Every leaf, as it was saved, by the position of its entry."""
    entries = stored.document.entries
    specs = {i: stored.found(entry, defaults.on_corrupt) for i, entry in enumerate(entries) if not is_empty_node(entry)}
    found = {position: spec for position, spec in specs.items() if spec is not None}
    requests = _requests(registry, [(stored.type_handler(spec), None, spec) for spec in found.values()], defaults)
    return {
        position: RestoreItem(tree.key_path(entries[position].keys), spec, stored.restoring_handler(spec, request), request)
        for (position, spec), request in zip(found.items(), requests, strict=True)
    }


def _requests(
    registry: Registry, leaves: Sequence[tuple[TypeHandler[Any], Any, LeafSpec]], defaults: RestoreDefaults
) -> list[RestoreArgs]:
    """The request for each (type handler, target or None, what is stored); a type handler is asked once."""
    members: dict[TypeHandler[Any], list[int]] = {}
    for i, (handler, _, _) in enumerate(leaves):
        members.setdefault(handler, []).append(i)
    made: dict[int, RestoreArgs] = {}
    for handler, positions in members.items():
        targets, specs = [leaves[i][1] for i in positions], [leaves[i][2] for i in positions]
        made |= zip(positions, answers.requested(registry, handler, targets, specs, defaults), strict=True)
    return [made[i] for i in range(len(leaves))]


def _read(
    registry: Registry, stored: StoredTree, items: Sequence[RestoreItem], defaults: RestoreDefaults, max_inflight_bytes: int
) -> list[Any]:
    where, how = stored.location.url, defaults.on_corrupt
    return restore_leaves(items, registry, stored.reader, stored.index, max_inflight_bytes, where, how, stored.lost)


@attrs.define
class _Pair:
    """A leaf that is stored and asked for.

    Attributes:
      position: among the target's leaves.
      path: where it is.
      spec: what is stored.
      request: how it is restored; None where nothing says so yet.
    """

    position: int
    path: tuple[str, ...]
    spec: LeafSpec
    request: RestoreArgs | None


class _Wanted:
    """A target laid over a stored tree.

    Attributes:
      items: the leaves to read.
      positions: where each of them stands among the target's leaves.
      values: the target's leaves, those that need no reading already in place.
    """

    def __init__(self, registry: Registry, stored: StoredTree, defaults: RestoreDefaults, *, typed_by_target: bool) -> None:
        self.items: list[RestoreItem] = []
        self.positions: list[int] = []
        self.values: list[Any] = []
        self._pairs: list[_Pair] = []
        self._typed: list[tuple[_Pair, TypeHandler[Any], Any]] = []
        self._registry = registry
        self._stored = stored
        self._defaults = defaults
        self._typed_by_target = typed_by_target

    @paused_gc()
    def match(self, target: Any, restore_args: Any, *, partial: bool) -> tree.Structure:
        """Pairs the leaves; the structure of the result is returned.

        Raises:
          errors.TargetError: lists what is missing on either side, and leaves that cannot become what was asked for.
        """
        values, structure = tree.flatten(restore_args if target is None else target)
        requests = values if target is None else [None] * len(values)
        if target is not None and restore_args is not None:
            requests = tree.flatten_alike(structure, restore_args, "restore_args")
        entries = {self._stored.path(entry.keys): entry for entry in self._stored.document.entries}
        paths = [(name,) for name in structure.names] if self._stored.only_names else structure.paths
        absent = [(path, value) for path, value in zip(paths, values, strict=True) if path not in entries and value is not ...]
        missing = [str(path) for path, value in absent if not (self._stored.only_names and tree.is_empty_node(value))]
        unexpected = [] if partial else [str(path) for path in entries.keys() - set(paths)]
        mismatched: list[str] = []
        if not missing:
            for position, (path, value) in enumerate(zip(paths, values, strict=True)):
                self.values.append(value)
                if value is ... or (
                    target is not None and (value is None or self._is_empty_too(path, entries.get(path), value, mismatched))
                ):
                    continue
                self._add(position, path, entries[path], value if target is not None else None, requests[position], mismatched)
        self._settle(mismatched)
        if missing or unexpected or mismatched:  # then what else is wrong is told too
            self._refuse(missing, sorted(unexpected), [*mismatched, *unrestorable(self.items, self._registry)])
        return structure

    def _is_empty_too(self, path: tuple[str, ...], entry: Entry | None, value: Any, mismatched: list[str]) -> bool:
        """Whether the target has an empty node here; one where a leaf is stored does not fit."""
        if not tree.is_empty_node(value):
            return False
        if entry is not None and not is_empty_node(entry):
            mismatched.append(
                f"{path}: an empty {type(value).__name__} was asked for, but a leaf is stored; None leaves it unread"
            )
        return True

    def _add(self, position: int, path: tuple[str, ...], entry: Entry, target: Any, request: Any, mismatched: list[str]) -> None:
        if is_empty_node(entry):
            if target is None:
                self.values[position] = nest([entry._replace(keys=())], [None])
            else:
                mismatched.append(
                    f"{path}: a {type(target).__name__} was asked for, but an empty node ({entry.value_type}) is stored"
                )
            return
        if (spec := self._stored.found(entry, self._defaults.on_corrupt)) is None:
            self.values[position] = ...
            return
        if request is not None and not isinstance(request, RestoreArgs):
            mismatched.append(f"{path}: restore_args holds a {type(request).__name__} here; expected RestoreArgs or None")
            return
        pair = _Pair(position, path, spec, request)
        if request is None and target is not None and self._typed_by_target:
            if (handler := self._registry.type_handler_for(type(target))) is None:
                mismatched.append(f"{path}: Unsupported type: {type(target)}; a target's leaves say what to restore into")
                return
            self._typed.append((pair, handler, target))
        self._pairs.append(pair)

    def _settle(self, mismatched: list[str]) -> None:
        """Who restores each leaf, and how: as `restore_args` say, else as the target's leaf does, else as it was saved."""
        made = _requests(self._registry, [(handler, target, pair.spec) for pair, handler, target in self._typed], self._defaults)
        for (pair, _, _), request in zip(self._typed, made, strict=True):
            pair.request = request
        settled: list[tuple[_Pair, TypeHandler[Any]]] = []
        for pair in self._pairs:
            kind = _kind(pair.request)
            handler = self._stored.type_handler(pair.spec) if kind is None else self._registry.type_handler_for(kind)
            if handler is not None:
                settled.append((pair, handler))
            else:
                mismatched.append(
                    f"{pair.path}: no type handler is registered for restore_type={kind!r}; give a registered leaf type"
                )
        as_saved = [(pair, handler) for pair, handler in settled if _kind(pair.request) is None]
        made = _requests(self._registry, [(handler, None, pair.spec) for pair, handler in as_saved], self._defaults)
        for (pair, _), request in zip(as_saved, made, strict=True):
            pair.request = request if pair.request is None else attrs.evolve(request, dtype=pair.request.dtype)
        for pair, handler in settled:
            assert pair.request is not None
            request = pair.request
            if request.defaults is not self._defaults:
                request = attrs.evolve(request, defaults=self._defaults)
            self.items.append(RestoreItem(pair.path, pair.spec, handler, request))
            self.positions.append(pair.position)

    def _refuse(self, missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str]) -> None:
        sections = []
        if missing:
            sections.append(f"\n{len(missing)} in the target, but not in the checkpoint:{errors.listing(missing)}")
        if unexpected:
            sections.append(
                f"\n{len(unexpected)} in the checkpoint, but not in the target (PyTreeRestore(partial_restore=True) leaves them "
                f"out):{errors.listing(unexpected)}"
            )
        if mismatched:
            sections.append(f"\n{len(mismatched)} that do not fit:{errors.listing(mismatched)}")
        raise errors.TargetError(f"The target and the checkpoint {self._stored.location.url} differ." + "".join(sections))


def _kind(request: RestoreArgs | None) -> Any:
    """The type that a request asks for; None for a leaf as it was saved."""
    if request is not None and request.restore_type is None and isinstance(request, ArrayRestoreArgs):
        return jax.Array
    return request and request.restore_type


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
