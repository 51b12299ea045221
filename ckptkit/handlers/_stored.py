"""A tree on storage: what its files say, before any array is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from ckptkit import errors
from ckptkit.grid import Array, ArraySpec, Index
from ckptkit.index import INDEX_FILE, IndexDocument, decode_index
from ckptkit.leaves.base import LeafSpec, TypeHandler
from ckptkit.location import Location
from ckptkit.metadata import arrays as array_documents
from ckptkit.metadata import sharding as sharding_documents
from ckptkit.metadata.tree import TREE_FILE, Entry, TreeDocument, decode_tree
from ckptkit.registry import Registry
from ckptkit.storage.base import Reader

__all__ = ["StoredTree"]


class StoredTree:
    """One directory that a PyTree handler wrote, opened for reading; a context manager.

    Attributes:
      location: the directory.
      document: what `_METADATA` says.
      index: checksums and type strings; None where another program wrote the checkpoint.
      reader: gives the chunks.
    """

    def __init__(self, location: Location, registry: Registry) -> None:
        """Reads the small files and lists the arrays.

        Raises:
          errors.NotFoundError: a file that a checkpoint cannot do without is missing.
          errors.FormatError: a file that cannot be understood.
        """
        self.location = location
        self._registry = registry
        if not location.exists(TREE_FILE):
            raise errors.NotFoundError(
                f"{location.url} holds no {TREE_FILE}, so it is not a saved tree. It holds: {_shown(location.names())}."
            )
        self.document: TreeDocument = decode_tree(location.read_bytes(TREE_FILE), f"{location.url}/{TREE_FILE}")
        self.index = self._index()
        self.reader: Reader = self._open() if any(map(_has_array, self.document.entries)) else _NoArrays()
        try:
            self._arrays: Mapping[str, ArraySpec] = self.reader.arrays()
            self._shardings = self._optional(sharding_documents.SHARDING_FILE, sharding_documents.decode_file)
            self._strings = self._optional(array_documents.STRINGS_FILE, self._decode_strings)
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
          errors.FormatError: it was written in a way that this version does not read.
        """
        name = entry.name
        if entry.skip:
            raise errors.FormatError(
                f"{self._where(entry)} is kept in the file of an aggregate checkpoint, which this version does not read."
            )
        typestr = entry.value_type if self.index is None else self.index.typestrs.get(name, entry.value_type)
        if name in self._strings:
            return name, LeafSpec(typestr, None, inline=self._strings[name])
        if (array := self._arrays.get(name)) is None:
            raise errors.NotFoundError(
                f"{self._where(entry)} is listed in {TREE_FILE}, but no array {name!r} is on storage; the checkpoint is damaged, "
                "or was not copied as a whole."
            )
        record = self._records.get(name)
        extra: Mapping[str, Any] = {"write_shape": entry.write_shape, **((record and record.ext_metadata) or {})}
        if self.index is not None and name in self.index.extras:
            extra = self.index.extras[name]
        return name, LeafSpec(typestr, array, sharding=self._shardings.get(name), extra=extra)

    def _where(self, entry: Entry) -> str:
        return f"{self.location.url}: leaf {tuple(key.name for key in entry.keys)}"

    def type_handler(self, spec: LeafSpec) -> TypeHandler[Any]:
        """The type handler that wrote a leaf.

        Raises:
          errors.RegistryError: none is registered under its type string; names who provides it.
        """
        handler = self._registry.type_handler_named(spec.typestr)
        if handler is None:
            provider = self.index.providers.get(spec.typestr) if self.index is not None else None
            advice = f"install it ({provider} wrote this checkpoint)" if provider else "register a type handler for it"
            raise errors.RegistryError(
                f"{self.location.url} holds leaves of type {spec.typestr!r}, for which no type handler is registered; {advice}, "
                f"or restore into another type with a target.{self._registry.failures_note()}"
            )
        return handler

    def _index(self) -> IndexDocument | None:
        if not self.location.exists(INDEX_FILE):
            return None
        return decode_index(self.location.read_bytes(INDEX_FILE), f"{self.location.url}/{INDEX_FILE}")

    def _decode_strings(self, data: bytes, where: str) -> Mapping[str, str]:
        names = [entry.name for entry in self.document.entries if entry.value_type == "string"]
        return array_documents.decode_strings(data, names, where)

    def _array_records(self) -> Mapping[str, array_documents.ArrayRecord]:
        """What each process that saved recorded of its arrays."""
        records: dict[str, array_documents.ArrayRecord] = {}
        directory = self.location.child(array_documents.ARRAYS_DIRECTORY)
        for name in directory.names():
            records |= array_documents.decode_arrays(directory.read_bytes(name), f"{directory.url}/{name}")
        return records

    def _open(self) -> Reader:
        for backend in self._registry.storages():
            if backend.recognises(self.location):
                return backend.reader(self.location)
        known = ", ".join(repr(backend.name) for backend in self._registry.storages())
        raise errors.NotFoundError(
            f"{self.location.url} has a {TREE_FILE}, but no array data that a storage backend recognises (known: {known}; "
            f"OCDBT needs manifest.ocdbt). It holds: {_shown(self.location.names())}."
        )

    def _optional(self, name: str, decode: Any) -> Mapping[str, Any]:
        if not self.location.exists(name):
            return {}
        decoded: Mapping[str, Any] = decode(self.location.read_bytes(name), f"{self.location.url}/{name}")
        return decoded


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


def _shown(names: Mapping[str, bool]) -> str:
    return ", ".join(sorted(f"{name}/" if is_directory else name for name, is_directory in names.items())[:20]) or "nothing"
