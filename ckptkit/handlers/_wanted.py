"""What a restore reads of a stored tree, and how: every leaf as it was saved, or those that a target names as it wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import jax

from ckptkit import errors, tree
from ckptkit.handlers._stored import StoredTree
from ckptkit.leaves.base import ArrayRestoreArgs, LeafSpec, RestoreArgs, TypeHandler
from ckptkit.metadata.tree import Entry, is_empty_node, nest
from ckptkit.options import RestoreDefaults
from ckptkit.pipeline import answers
from ckptkit.pipeline.restore import RestoreItem, unrestorable
from ckptkit.registry import Registry

__all__ = ["Wanted", "every_item"]


def every_item(registry: Registry, stored: StoredTree, defaults: RestoreDefaults) -> dict[int, RestoreItem]:
    """Every leaf, as it was saved, by the position of its entry."""
    entries = stored.document.entries
    specs = {i: stored.found(entry, defaults.on_corrupt) for i, entry in enumerate(entries) if not is_empty_node(entry)}
    found = {position: spec for position, spec in specs.items() if spec is not None}
    requests = _requests(registry, [(stored.type_handler(spec), None, spec) for spec in found.values()], defaults)
    return {
        position: RestoreItem(tree.key_path(entries[position].keys), spec, stored.restoring_handler(spec, request), request)
        for (position, spec), request in zip(found.items(), requests, strict=True)
    }


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


class Wanted:
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


def _kind(request: RestoreArgs | None) -> Any:
    """The type that a request asks for; None for a leaf as it was saved."""
    if request is not None and request.restore_type is None and isinstance(request, ArrayRestoreArgs):
        return jax.Array
    return request and request.restore_type
