"""What there is: the plugins that are installed, and what a checkpoint holds and needs. No array is read, no device used."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import attrs
import pluggy

from ckptkit import args as args_lib
from ckptkit import choosing, discovery, errors, hookspecs, providers
from ckptkit._names import name_of
from ckptkit.file_list import read_file_list, relying_on
from ckptkit.handlers._stored import StoredTree, args_for_files, item_folders
from ckptkit.index import INDEX_FILE, IndexDocument, decode_index
from ckptkit.location import Location
from ckptkit.metadata.tree import TREE_FILE, decode_tree, is_empty_node
from ckptkit.pipeline import answers
from ckptkit.registry import Owner, Registry

__all__ = ["CheckpointInfo", "ItemInfo", "Need", "PluginInfo", "info", "plugins"]

_WORDS: Final = {
    "args class (for save)": "save_args",
    "args class (for restore)": "restore_args",
    "type string of a handler": "handlers",
    "leaf type": "leaf_types",
    "type string of a type handler": "type_handlers",
    "storage backend": "storage",
    "scheme": "schemes",
}


@attrs.frozen(kw_only=True)
class PluginInfo:
    """A plugin, loaded or not.

    Attributes:
      distribution: the installed package that brought it.
      version: of the distribution.
      entry_point: its name in group `ckptkit`; None for what is built in.
      module: what the entry point names.
      registered: what it added, by kind: 'save_args', 'restore_args', 'handlers' (type strings), 'leaf_types', 'type_handlers'
        (type strings), 'storage', 'schemes'; each name with the class behind it. Not what another plugin has overridden.
      hooks: those that it implements.
      error: the traceback of what kept it from loading; None where it is loaded.
    """

    distribution: str | None
    version: str | None
    entry_point: str | None
    module: str
    registered: Mapping[str, Mapping[str, str]]
    hooks: Sequence[str]
    error: str | None = None


@attrs.frozen(kw_only=True)
class Need:
    """Something that a restore looks up in the registry.

    Attributes:
      kind: what it is.
      name: its type string, or the name of the backend.
      written_by: who provided it when the checkpoint was written, as 'distribution version'; None where that is not recorded.
      here: who provides it here; None where it is missing.
      way_out: how to get it, where it is missing.
    """

    kind: Literal["handler", "leaf type", "storage backend"]
    name: str
    written_by: str | None
    here: str | None
    way_out: str | None


@attrs.frozen(kw_only=True)
class ItemInfo:
    """One item of a composite, or the whole of another checkpoint.

    Attributes:
      name: of the item; '' for the checkpoint itself.
      handler: type string of the handler that restores it.
      recorded: whether the checkpoint names that handler; otherwise its files tell.
      storage: name of the storage backend of its arrays; None where it has none that is known.
      leaf_typestrs: how many leaves there are of each type string; empty for what is no tree.
      byte_count: of the arrays in memory; None where they cannot be listed.
    """

    name: str
    handler: str
    recorded: bool
    storage: str | None
    leaf_typestrs: Mapping[str, int]
    byte_count: int | None


@attrs.frozen(kw_only=True)
class CheckpointInfo:
    """What a checkpoint holds, and what it takes to restore it.

    Attributes:
      path: the checkpoint.
      has_checksums: whether it has a list of its files; Orbax's have none.
      items: its items, one without a name where it is no composite.
      needs: everything that has to be registered.
    """

    path: str
    has_checksums: bool
    items: Sequence[ItemInfo]
    needs: Sequence[Need]

    @property
    def missing(self) -> list[Need]:
        """What is not registered here."""
        return [need for need in self.needs if need.here is None]


def plugins(registry: Registry | None = None) -> list[PluginInfo]:
    """Every plugin, what is built in first, those that failed to load last."""
    registry = discovery.ready(registry)
    loaded = [_plugin(registry, each.owner, _hooks(each.plugin)) for each in registry.plugins]
    return loaded + [
        _plugin(registry, each.owner, (), "".join(traceback.format_exception(each.error))) for each in registry.failures
    ]


def _plugin(registry: Registry, owner: Owner, hooks: Sequence[str], error: str | None = None) -> PluginInfo:
    registered: dict[str, dict[str, str]] = {}
    for what, key, value, its_owner in registry.registrations():
        if its_owner == owner:
            registered.setdefault(_WORDS[what], {})[_name(key)] = _name(value)
    return PluginInfo(
        distribution=owner.distribution,
        version=owner.version,
        entry_point=owner.entry_point,
        module=owner.module,
        registered=registered,
        hooks=hooks,
        error=error,
    )


def _name(thing: Hashable) -> str:
    if isinstance(thing, str):
        return thing
    return name_of(thing if hasattr(thing, "__qualname__") else type(thing))


def _hooks(plugin: object) -> list[str]:
    host = pluggy.PluginManager(hookspecs.PROJECT)
    host.register(plugin)
    return sorted(caller.name for caller in host.get_hookcallers(plugin) or ())


def info(path: str | os.PathLike[str], *, registry: Registry | None = None) -> CheckpointInfo:
    """What the checkpoint at `path` holds and needs, also where packages that it needs are missing.

    Args:
      path: a path or URL.
      registry: what there is here; None for the default one.

    Raises:
      errors.NotFoundError, errors.IncompleteError, errors.FormatError: there is no checkpoint at `path`, or what describes it is
        missing.
      errors.CorruptCheckpointError: what describes it is damaged.
    """
    registry = discovery.ready(registry)
    for attempt in choosing.attempts(registry, path):
        with attempt as location:
            found = _info(location, registry)
    return found


def _info(location: Location, registry: Registry) -> CheckpointInfo:
    listed = read_file_list(location)
    if listed is not None:
        listed.check(location, choosing.is_description)
    recorded = choosing.step_metadata(location).item_handlers
    handlers = {"": recorded} if isinstance(recorded, str) else recorded or _inferred(location, registry)
    written_by = {} if listed is None else listed.providers
    needs = {("handler", typestr): _handler_need(registry, typestr, written_by.get(typestr)) for typestr in handlers.values()}
    items = []
    for name, typestr in handlers.items():
        place = location.child(name) if name else location
        with relying_on(location, listed):
            trees = [_Tree(folder, registry) for folder in _tree_folders(place, registry)]
        leaves: Counter[str] = sum([tree.leaves for tree in trees], Counter())
        sizes = [tree.byte_count for tree in trees]
        for tree in trees:
            needs |= {(need.kind, need.name): need for need in tree.needs()}
        items.append(
            ItemInfo(
                name=name,
                handler=typestr,
                recorded=bool(recorded),
                storage=next((tree.storage for tree in trees if tree.storage), None),
                leaf_typestrs=dict(leaves),
                byte_count=sum([size for size in sizes if size is not None]) if trees and None not in sizes else None,
            )
        )
    return CheckpointInfo(path=location.url, has_checksums=listed is not None, items=items, needs=list(needs.values()))


def _inferred(location: Location, registry: Registry) -> dict[str, str]:
    """Type strings by item, where nothing is recorded."""

    def typestr(place: Location) -> str | None:
        args_class = args_for_files(place, registry)
        return None if args_class is None else registry.handler_for_args(args_class, use="restore").typestr()

    if (own := typestr(location)) is not None:
        return {"": own}
    found = {name: typestr(location.child(name)) for name in item_folders(location, registry)}
    if not found:
        return {"": choosing.stored_handler(registry, location).typestr()}  # raises: nothing tells
    return {name: known for name, known in found.items() if known is not None}


def _tree_folders(place: Location, registry: Registry) -> Iterator[Location]:
    """The directories that hold arrays: this one, or those in it (a random key has one of its own)."""
    for folder in (place, *(place.child(name) for name in item_folders(place, registry))):
        if args_for_files(folder, registry) is args_lib.PyTreeRestore:
            yield folder
            if folder is place:
                return


class _Tree:
    """What the files of a tree say.

    Attributes:
      storage: name of the backend, as recorded or recognised; None for a tree without arrays.
      leaves: how many there are of each type string.
      byte_count: of the arrays; None where the backend is missing.
    """

    def __init__(self, location: Location, registry: Registry) -> None:
        self._registry = registry
        self._index: IndexDocument | None = None
        if location.exists(INDEX_FILE):
            self._index = decode_index(location.read_bytes(INDEX_FILE), f"{location.url}/{INDEX_FILE}")
        backend = answers.recognising(registry, location)
        self._written_by = {} if self._index is None else self._index.storage
        self.storage: str | None = next(iter(self._written_by), None if backend is None else backend.name)
        self.byte_count: int | None = None
        self.leaves: Counter[str]
        if backend is None and self.storage is not None:
            self.leaves = self._listed(location)
            return
        with StoredTree(location, registry) as stored:
            specs = [stored.leaf(entry)[1] for entry in stored.document.entries if not is_empty_node(entry)]
        self.leaves = Counter(spec.typestr for spec in specs)
        self.byte_count = sum(spec.array.nbytes for spec in specs if spec.array is not None)

    def _listed(self, location: Location) -> Counter[str]:
        """The leaves, where no backend reads their arrays."""
        document = decode_tree(location.read_bytes(TREE_FILE), f"{location.url}/{TREE_FILE}")
        typestrs = {} if self._index is None else self._index.typestrs
        entries = [entry for entry in document.entries if not is_empty_node(entry)]
        return Counter(typestrs.get(entry.name, entry.value_type) for entry in entries)

    def needs(self) -> Iterator[Need]:
        recorded = {} if self._index is None else self._index.providers
        for typestr in self.leaves:
            handler = self._registry.type_handler_named(typestr)
            here = None if handler is None else self._registry.owner_of(handler).provider
            yield _need("leaf type", typestr, recorded.get(typestr), here)
        if self.storage is not None:
            known = {backend.name: self._registry.owner_of(backend).provider for backend in self._registry.storages()}
            yield _need("storage backend", self.storage, self._written_by.get(self.storage), known.get(self.storage))


def _handler_need(registry: Registry, typestr: str, written_by: str | None) -> Need:
    try:
        handler_class: Any = registry.handler_for_typestr(typestr)
    except errors.RegistryError:
        return _need("handler", typestr, written_by, None)
    return _need("handler", typestr, written_by, registry.owner_of(handler_class).provider)


def _need(kind: Literal["handler", "leaf type", "storage backend"], name: str, written_by: str | None, here: str | None) -> Need:
    return Need(kind=kind, name=name, written_by=written_by, here=here, way_out=None if here else providers.way_out(written_by))
