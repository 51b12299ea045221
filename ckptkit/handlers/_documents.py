"""The small files that describe a saved tree."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ckptkit._gc import paused_gc
from ckptkit.index import INDEX_FILE, IndexDocument, array_text, encode_index
from ckptkit.leaves.base import LeafSpec
from ckptkit.metadata import arrays as array_documents
from ckptkit.metadata import sharding as sharding_documents
from ckptkit.metadata.rich import encode_rich
from ckptkit.metadata.tree import TREE_FILE, Entry, TreeDocument, encode_tree
from ckptkit.pipeline.plan import SavePlan
from ckptkit.registry import Registry
from ckptkit.storage.base import StorageBackend

__all__ = ["documents"]


class _Kind(NamedTuple):
    """Leaves that are alike.

    Attributes:
      names: theirs.
      word: Orbax's for their type.
      spec: what is stored of the first of them; of the others too, but for the name of the array.
    """

    names: Sequence[str]
    word: str
    spec: LeafSpec


def documents(
    plan: SavePlan, checksums: Mapping[str, list[str]], custom_metadata: Any, registry: Registry, *, rich: bool
) -> Iterator[tuple[str, bytes]]:
    """The name and the bytes of each, one at a time, since together they outweigh many small leaves; `_METADATA` is last."""
    kinds = list(_kinds(plan))
    makers: dict[str, Callable[[], bytes]] = {
        INDEX_FILE: lambda: encode_index(_index(kinds, checksums, plan.backend, registry)),
        sharding_documents.SHARDING_FILE: lambda: _shardings(kinds),
        array_documents.arrays_file(0): lambda: _records(kinds),
        array_documents.STRINGS_FILE: lambda: _strings(kinds),
        TREE_FILE: lambda: encode_tree(_tree(plan, custom_metadata, rich=rich)),
    }
    for name, make in makers.items():
        with paused_gc():  # but not while the caller writes
            data = make()
        if data:
            yield name, data


def _kinds(plan: SavePlan) -> Iterator[_Kind]:
    for group in plan.groups:
        names: list[list[str]] = [[] for _ in group.specs]
        for position, number in zip(group.positions, group.numbers, strict=True):
            names[number].append(plan.structure.names[position])
        yield from map(_Kind, names, itertools.repeat(group.handler.orbax_typestr), group.specs)


def _index(
    kinds: Sequence[_Kind], checksums: Mapping[str, list[str]], backend: StorageBackend, registry: Registry
) -> IndexDocument:
    """Checksums, and for leaves that Orbax has no word for, what it takes to restore them."""
    foreign = [(name, spec) for names, word, spec in kinds if word != spec.typestr for name in names]
    typestrs = {name: spec.typestr for name, spec in foreign}
    arrays: dict[str, list[str]] = {}
    for names, _, spec in kinds:
        if spec.array is not None:
            arrays.setdefault(array_text(spec.array), []).extend(names)
    return IndexDocument(
        checksums=dict(checksums),
        typestrs=typestrs,
        providers={typestr: registry.provider_of(typestr) for typestr in set(typestrs.values())},
        storage={backend.name: registry.owner_of(backend).provider},
        extras={name: dict(spec.extra) for name, spec in foreign},
        arrays=arrays,
    )


def _shardings(kinds: Sequence[_Kind]) -> bytes:
    return sharding_documents.encode_file(
        {name: spec.sharding for names, _, spec in kinds if spec.sharding is not None for name in names}
    )


def _records(kinds: Sequence[_Kind]) -> bytes:
    described = [(names, _array_record(spec)) for names, word, spec in kinds if word == "jax.Array"]
    records = {name: record for names, record in described for name in names}
    return array_documents.encode_arrays(records) if records else b""


def _strings(kinds: Sequence[_Kind]) -> bytes:
    strings = {name: spec.inline for names, word, spec in kinds if word == "string" for name in names}
    return array_documents.encode_strings(strings) if strings else b""


def _tree(plan: SavePlan, custom_metadata: Any, *, rich: bool) -> TreeDocument:
    entries = _entries(plan)
    return TreeDocument(
        entries=entries,
        use_ocdbt=plan.backend.name == "ocdbt",
        use_zarr3=plan.options.use_zarr3,
        store_array_data_equal_to_fill_value=True,
        custom_metadata=custom_metadata,
        value_metadata_tree=encode_rich(entries, plan.structure.unflatten) if rich else None,
    )


def _array_record(spec: LeafSpec) -> array_documents.ArrayRecord:
    assert spec.array is not None
    extra = dict(spec.extra)
    write_shape = tuple(extra.pop("write_shape", None) or spec.array.chunk_shape)
    return array_documents.ArrayRecord(write_shape, spec.array.chunk_shape, extra or None)


def _entries(plan: SavePlan) -> Sequence[Entry]:
    """One for each leaf and empty node, in the order of the tree."""
    keys = plan.structure.keys
    entries = {position: Entry(keys[position], _empty_word(node), skip=True) for position, node in plan.empty.items()}
    for group in plan.groups:
        word, shapes = group.handler.orbax_typestr, [_write_shape(spec) for spec in group.specs]
        for position, number in zip(group.positions, group.numbers, strict=True):
            entries[position] = Entry(keys[position], word, False, shapes[number])  # noqa: FBT003 - names take as long as the rest
    return [entries[position] for position in range(len(entries))]


def _write_shape(spec: LeafSpec) -> tuple[int, ...] | None:
    shape = spec.extra.get("write_shape")
    return None if shape is None else tuple(shape)


def _empty_word(node: Any) -> str:
    if node is None:
        return "None"
    if isinstance(node, Mapping):
        return "Dict"
    if isinstance(node, list):
        return "List"
    return "NamedTuple" if hasattr(node, "_fields") else "Tuple"
