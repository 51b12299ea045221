"""The small files that describe a saved tree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptkit.index import INDEX_FILE, IndexDocument, array_text, encode_index
from ckptkit.leaves.base import LeafSpec
from ckptkit.metadata import arrays as array_documents
from ckptkit.metadata import sharding as sharding_documents
from ckptkit.metadata.rich import encode_rich
from ckptkit.metadata.tree import TREE_FILE, Entry, Key, TreeDocument, encode_tree
from ckptkit.pipeline.plan import SavePlan
from ckptkit.registry import Registry

__all__ = ["documents"]


def documents(
    plan: SavePlan, checksums: Mapping[str, list[str]], custom_metadata: Any, registry: Registry, *, rich: bool
) -> Iterator[tuple[str, bytes]]:
    """The name and the bytes of each, one at a time, since together they outweigh many small leaves; `_METADATA` is last."""
    words = {group.handler.typestr: group.handler.orbax_typestr for group in plan.groups}
    names = plan.structure.names
    leaves = [(name, spec) for name, spec in zip(names, plan.nodes, strict=True) if isinstance(spec, LeafSpec)]
    index = _index(leaves, words, checksums, registry)
    index.storage = {plan.backend.name: registry.owner_of(plan.backend).provider}
    yield INDEX_FILE, encode_index(index)
    del index
    shardings = {name: spec.sharding for name, spec in leaves if spec.sharding is not None}
    yield sharding_documents.SHARDING_FILE, sharding_documents.encode_file(shardings)
    records = {name: _array_record(spec) for name, spec in leaves if words[spec.typestr] == "jax.Array"}
    if records:
        yield array_documents.arrays_file(0), array_documents.encode_arrays(records)
    strings = {name: spec.inline for name, spec in leaves if words[spec.typestr] == "string"}
    if strings:
        yield array_documents.STRINGS_FILE, array_documents.encode_strings(strings)
    del shardings, records, strings
    yield TREE_FILE, encode_tree(_tree(plan, words, custom_metadata, rich=rich))


def _index(
    leaves: Sequence[tuple[str, LeafSpec]], words: Mapping[str, str], checksums: Mapping[str, list[str]], registry: Registry
) -> IndexDocument:
    """Checksums, and for leaves that Orbax has no word for, what it takes to restore them."""
    foreign = [(name, spec) for name, spec in leaves if words[spec.typestr] != spec.typestr]
    typestrs = {name: spec.typestr for name, spec in foreign}
    arrays: dict[str, list[str]] = {}
    for _, spec in leaves:
        if spec.array is not None:
            arrays.setdefault(array_text(spec.array), []).append(spec.array.name)
    return IndexDocument(
        checksums=dict(checksums),
        typestrs=typestrs,
        providers={typestr: registry.provider_of(typestr) for typestr in set(typestrs.values())},
        extras={name: dict(spec.extra) for name, spec in foreign},
        arrays=arrays,
    )


def _tree(plan: SavePlan, words: Mapping[str, str], custom_metadata: Any, *, rich: bool) -> TreeDocument:
    entries = [_entry(keys, node, words) for keys, node in zip(plan.structure.keys, plan.nodes, strict=True)]
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


def _entry(keys: tuple[Key, ...], node: Any, words: Mapping[str, str]) -> Entry:
    if not isinstance(node, LeafSpec):
        return Entry(keys, _empty_word(node), skip=True)
    write_shape = node.extra.get("write_shape")
    return Entry(keys, words[node.typestr], write_shape=tuple(write_shape) if write_shape is not None else None)


def _empty_word(node: Any) -> str:
    if node is None:
        return "None"
    if isinstance(node, Mapping):
        return "Dict"
    if isinstance(node, list):
        return "List"
    return "NamedTuple" if hasattr(node, "_fields") else "Tuple"
