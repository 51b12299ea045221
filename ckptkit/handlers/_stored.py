"""A tree on storage: what its files say, before any array is read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from ckptkit import args as args_lib
from ckptkit import errors, providers, tree
from ckptkit._gc import paused_gc
from ckptkit.file_list import is_stray, read_file_list
from ckptkit.grid import Array, ArraySpec, Index
from ckptkit.handlers._legacy import Aggregate, ArraysReader, document_of_names, read_aggregate
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.index import INDEX_FILE, IndexDocument, decode_index
from ckptkit.leaves.base import LeafSpec, RestoreArgs, TypeHandler
from ckptkit.location import Location
from ckptkit.metadata import arrays as array_documents
from ckptkit.metadata import sharding as sharding_documents
from ckptkit.metadata.msgpack import AGGREGATE_FILE
from ckptkit.metadata.tree import TREE_FILE, Entry, Key, TreeDocument, decode_tree, is_empty_node
from ckptkit.options import OnCorrupt
from ckptkit.pipeline import answers
from ckptkit.registry import Registry
from ckptkit.storage.base import Reader

__all__ = ["StoredTree", "args_for_files", "handler_class_for", "held_by", "item_folders"]

_JSON_FILE = "metadata"


def args_for_files(location: Location, registry: Registry) -> type[args_lib.CheckpointArgs] | None:
    """The args to restore a directory with, by the files in it, where nothing is recorded; None where they do not tell."""
    if (marked := _args_for_marks(location)) is not None:
        return marked
    if any(_args_for_marks(location.child(name)) for name in _folders(location)):
        return None  # a composite, whatever a backend finds in the items' folders
    return args_lib.PyTreeRestore if _names_tell(location, registry) else None


def item_folders(location: Location, registry: Registry) -> list[str]:
    """The folders of a composite that hold an item, where nothing is recorded."""
    return [name for name in _folders(location) if args_for_files(location.child(name), registry)]


def _folders(location: Location) -> list[str]:
    """The folders that may be items; those of an OCDBT database are none."""
    return sorted(name for name, is_directory in location.names().items() if is_directory and not name.startswith("ocdbt."))


def _args_for_marks(location: Location) -> type[args_lib.CheckpointArgs] | None:
    """The args for a file that only one handler writes; an array's directory may have the same name."""
    names = location.names()
    if not (names.get(TREE_FILE, True) and names.get(AGGREGATE_FILE, True)):
        return args_lib.PyTreeRestore
    return None if names.get(_JSON_FILE, True) else args_lib.JsonRestore


def _names_tell(location: Location, registry: Registry) -> bool:
    """Whether there are arrays whose names alone make a tree."""
    if (backend := answers.recognising(registry, location)) is None:
        return False
    with answers.calling(registry, backend, "reader") as asked:
        reader = answers.instance(asked, backend.reader(location), Reader)
    with contextlib.closing(reader):
        return document_of_names(location, answers.keys(registry, backend, _arrays(registry, reader))) is not None


def _arrays(registry: Registry, reader: Reader) -> Mapping[str, ArraySpec]:
    with answers.calling(registry, reader, "arrays") as asked:
        return answers.stored_arrays(asked, reader.arrays())


def handler_class_for(registry: Registry, location: Location, typestr: str) -> type[CheckpointHandler]:
    """The handler class that reads what a checkpoint, or an item of it, records.

    Args:
      registry: where to look.
      location: the checkpoint.
      typestr: what it records.

    Raises:
      errors.RegistryError: none is registered; names who provided it, and how to install that.
    """
    try:
        return registry.handler_for_typestr(typestr)
    except errors.RegistryError as error:
        listed = read_file_list(location)
        advice = providers.way_out(None if listed is None else listed.providers.get(typestr))
        raise errors.RegistryError(f"{location.url}: {error}\nThe handler is missing: {advice}.") from None


def held_by(location: Location) -> str:
    """What there is in a place, in words, for whoever took it for a checkpoint."""
    if location.local_path is not None and os.path.isfile(location.local_path):
        return "no arrays"  # a file that no storage backend recognises is not looked into
    names = [f"{name}/" if is_directory else name for name, is_directory in location.names().items()]
    return ", ".join(sorted(names)[:20]) or "nothing"


class StoredTree:
    """One directory that a PyTree handler wrote, opened for reading; a context manager.

    Attributes:
      location: the directory.
      document: what `_METADATA` says, or what stands in for it in older checkpoints.
      index: checksums and type strings; None where another program wrote the checkpoint.
      reader: gives the chunks.
      only_names: joined names are all that is stored of the tree, so that empty nodes cannot be told, nor keys that hold a '.'.
      lost: what is wrong with leaves that `found` gave up, by key path.
      strays: files that would describe the tree, but came later than the checkpoint's list of files: they are not read.
    """

    @paused_gc()
    def __init__(self, location: Location, registry: Registry, aggregate_file: str | None = None) -> None:
        """Reads the small files and lists the arrays.

        Args:
          location: the directory.
          registry: finds type handlers and storage backends.
          aggregate_file: the name of an old release's msgpack file; None for its usual one.

        Raises:
          errors.NotFoundError: a file that a checkpoint cannot do without is missing.
          errors.FormatError: a file that cannot be understood.
          errors.RegistryError: the storage backend that wrote the arrays is not registered; names who provides it.
        """
        self.location = location
        self._registry = registry
        self._aggregate_file = aggregate_file or AGGREGATE_FILE
        self.lost: dict[tuple[str, ...], errors.CheckpointError] = {}
        self.strays: list[str] = []
        self.index: IndexDocument | None = self._optional(INDEX_FILE, decode_index, None)
        recorded: TreeDocument | None = self._optional(TREE_FILE, decode_tree, None)
        needed = recorded is None or any(map(_is_aggregated, recorded.entries))
        self._aggregate: Aggregate | None = read_aggregate(location, self._aggregate_file) if needed else None
        if recorded is None and self._aggregate is not None:
            recorded = self._aggregate.document
        self.reader: Reader = self._open() if recorded is None or any(map(_has_array, recorded.entries)) else _NoArrays()
        if self._aggregate is not None:
            self.reader = ArraysReader(self._aggregate.arrays, self.reader)
        try:
            self._arrays: Mapping[str, ArraySpec] = self._listed_arrays()
            self.only_names = recorded is None
            self.document: TreeDocument = recorded or self._inferred()
            self._shardings = self._optional(sharding_documents.SHARDING_FILE, self._decode_shardings, {})
            self._strings = self._optional(array_documents.STRINGS_FILE, self._decode_strings, {})
            self._records = self._array_records()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.reader.close()

    def leaf(self, entry: Entry) -> tuple[str, LeafSpec]:
        """The name of an entry that is no empty node, and what is stored of it.

        Raises:
          errors.NotFoundError: its array is not on storage.
          errors.CorruptCheckpointError: what is there is not the array that was written.
          errors.FormatError: it was written in a way that this version does not read.
        """
        if entry.skip:
            return entry.name, self._aggregated(entry)
        name = entry.name if self._aggregate is None else self._aggregate.elsewhere.get(_path(entry), entry.name)
        typestr = entry.value_type if self.index is None else self.index.typestrs.get(name, entry.value_type)
        if name in self._strings:
            return name, LeafSpec(typestr, None, inline=self._strings[name])
        if (array := self._arrays.get(name)) is None:
            raise errors.NotFoundError(
                f"{self._where(entry)} is a leaf of the checkpoint, but no array {name!r} is on storage; the checkpoint is "
                "damaged, or was not copied as a whole."
            )
        if self.index is not None and (wrong := self.index.check_array(array)) is not None:
            raise errors.CorruptCheckpointError(f"{self._where(entry)}: {wrong}; restore another checkpoint.")
        record = self._records.get(name)
        extra: Mapping[str, Any] = {"write_shape": entry.write_shape, **((record and record.ext_metadata) or {})}
        if self.index is not None and name in self.index.extras:
            extra = self.index.extras[name]
        return name, LeafSpec(typestr, array, sharding=self._shardings.get(name), extra=extra)

    def found(self, entry: Entry, on_corrupt: OnCorrupt) -> LeafSpec | None:
        """What is stored of a leaf; None where that is damaged, and damaged leaves are to be left out."""
        try:
            return self.leaf(entry)[1]
        except (errors.NotFoundError, errors.CorruptCheckpointError) as error:
            if on_corrupt == "raise":
                raise
            self.lost[_path(entry)] = error
            return None

    def _listed_arrays(self) -> Mapping[str, ArraySpec]:
        try:
            return _arrays(self._registry, self.reader)
        except errors.FormatError as error:
            if self.index is None:  # another program's, which may have more formats than this one reads
                raise
            raise errors.CorruptCheckpointError(f"{error} ckptkit did not write it so: restore another checkpoint.") from error

    def _aggregated(self, entry: Entry) -> LeafSpec:
        """What is stored of a leaf that was saved with `SaveArgs(aggregate=True)`."""
        path = _path(entry)
        if self._aggregate is not None and path in self._aggregate.strings:
            return LeafSpec(entry.value_type, None, inline=self._aggregate.strings[path])
        array = None if self._aggregate is None else self._arrays.get(self._aggregate.array_name(path))
        if array is None:
            state = "is missing" if self._aggregate is None else "does not hold it"
            raise errors.NotFoundError(
                f"{self._where(entry)} was saved into the file {self._aggregate_file!r}, which {state}; the checkpoint is "
                "damaged, or was not copied as a whole."
            )
        return LeafSpec(entry.value_type, array)

    def _inferred(self) -> TreeDocument:
        """The tree that the names of the arrays tell of.

        Raises:
          errors.NotFoundError: they do not, since the writer had other files to tell of it.
        """
        backend = answers.recognising(self._registry, self.location)
        document = None
        if self.index is None and backend is not None:
            document = document_of_names(self.location, answers.keys(self._registry, backend, self._arrays))
        if document is None:
            raise self._no_tree()
        return document

    def path(self, keys: Sequence[Key]) -> tuple[str, ...]:
        """What tells a leaf from the others: its keys; where joined names are all that is stored, its name."""
        path = tree.key_path(keys)
        return (".".join(path),) if self.only_names else path

    def _no_tree(self) -> errors.NotFoundError:
        items = item_folders(self.location, self._registry)
        hint = f" Items are restored with ckptkit.args.Composite({items[0]}=...)." if items else ""
        return errors.NotFoundError(
            f"{self.location.url} holds no {TREE_FILE}, so it is not a saved tree. It holds: {held_by(self.location)}.{hint}"
        )

    def _where(self, entry: Entry) -> str:
        return f"{self.location.url}: leaf {_path(entry)}"

    def type_handler(self, spec: LeafSpec) -> TypeHandler[Any]:
        """The type handler that wrote a leaf.

        Raises:
          errors.RegistryError: none is registered under its type string; names who provides it.
        """
        handler = self._registry.type_handler_named(spec.typestr)
        if handler is None:
            advice = providers.way_out(self.index.providers.get(spec.typestr) if self.index is not None else None)
            raise errors.RegistryError(
                f"{self.location.url} holds leaves of type {spec.typestr!r}, for which no type handler is registered; {advice}, "
                f"or restore into another type with a target.{self._registry.failures_note()}"
            )
        return handler

    def restoring_handler(self, spec: LeafSpec, request: RestoreArgs) -> TypeHandler[Any]:
        """The type handler that makes what a request names: that of its `restore_type`, or the one that wrote the leaf."""
        named = None if request.restore_type is None else self._registry.type_handler_for(request.restore_type)
        return named or self.type_handler(spec)

    def _decode_shardings(self, data: bytes, where: str) -> Mapping[str, Mapping[str, Any]]:
        return sharding_documents.decode_file(data, where, self._arrays)

    def _decode_strings(self, data: bytes, where: str) -> Mapping[str, str]:
        names = [entry.name for entry in self.document.entries if entry.value_type == "string" and not entry.skip]
        return array_documents.decode_strings(data, names, where)

    def _array_records(self) -> Mapping[str, array_documents.ArrayRecord]:
        """What each process that saved recorded of its arrays."""
        records: dict[str, array_documents.ArrayRecord] = {}
        for name in self.location.child(array_documents.ARRAYS_DIRECTORY).names():
            records |= self._optional(f"{array_documents.ARRAYS_DIRECTORY}/{name}", array_documents.decode_arrays, {})
        return records

    def _open(self) -> Reader:
        writers = {} if self.index is None else self.index.storage
        if (backend := answers.recognising(self._registry, self.location, writers)) is not None:
            with answers.calling(self._registry, backend, "reader") as asked:
                return answers.instance(asked, backend.reader(self.location), Reader)
        for name, provider in writers.items():
            if all(name != known.name for known in self._registry.storages()):
                raise errors.RegistryError(
                    f"{self.location.url} is stored by the storage backend {name!r}, which is not registered here: "
                    f"{providers.way_out(provider)}.{self._registry.failures_note()}"
                )
        if self._aggregate is None and not self.location.exists(TREE_FILE):
            raise self._no_tree()
        known = ", ".join(repr(backend.name) for backend in self._registry.storages())
        raise errors.NotFoundError(
            f"{self.location.url} lists the leaves of a tree, but has no array data that a storage backend recognises (known: "
            f"{known}; OCDBT needs manifest.ocdbt). It holds: {held_by(self.location)}."
        )

    def _optional(self, name: str, decode: Any, missing: Any) -> Any:
        """What a file says, or what its absence means."""
        if not self.location.exists(name):
            return missing
        if is_stray(self.location, name, TREE_FILE):
            self.strays.append(name)
            return missing
        return decode(self.location.read_bytes(name), f"{self.location.url}/{name}")


def _path(entry: Entry) -> tuple[str, ...]:
    return tuple([key.name for key in entry.keys])


def _is_aggregated(entry: Entry) -> bool:
    return entry.skip and not is_empty_node(entry)


def _has_array(entry: Entry) -> bool:
    return not entry.skip and entry.value_type != "string"


class _NoArrays(Reader):
    """Reads a tree of empty nodes and text, for which Orbax writes no database."""

    def arrays(self) -> Mapping[str, ArraySpec]:
        return {}

    def read(self, requests: Sequence[tuple[str, Index, Array]]) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def close(self) -> None:
        pass
