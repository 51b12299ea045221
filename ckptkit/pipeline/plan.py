"""Planning a save: flatten > describe > refuse, with every problem of the tree in one error. No I/O, no copy of data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import attrs
import numpy as np

from ckptkit import errors, tree
from ckptkit._recent import Recent
from ckptkit.grid import ArraySpec, Index
from ckptkit.leaves.base import Kinds, Leaf, LeafSpec, Problem, SaveArgs, TypeHandler
from ckptkit.meeting import current_meeting
from ckptkit.metadata.tree import MAX_DEPTH
from ckptkit.options import StorageOptions
from ckptkit.pipeline import answers
from ckptkit.pipeline.limits import BATCH_BYTE_SIZE, BATCH_LEAVES
from ckptkit.processes import Job
from ckptkit.registry import Registry
from ckptkit.storage.base import ManyWriters, StorageBackend

__all__ = ["PLAIN", "Batch", "LeafRules", "SavePlan", "plan_save"]


@attrs.frozen
class LeafRules:
    """What a handler wants of leaf types.

    Attributes:
      refusal: for a type that it does not take, what to do about it; None for others.
      as_array: whether leaves of a type are saved as np.ndarray though they have a type handler.
      arrays_from_protocol: leaves without a type handler are saved as np.ndarray where they have `__array__`.
      pinned_host: leaves on devices are staged by way of pinned host memory.
    """

    refusal: Callable[[type], str | None] = lambda kind: None
    as_array: Callable[[type], bool] = lambda kind: False
    arrays_from_protocol: bool = False
    pinned_host: bool = False


PLAIN = LeafRules()


class Batch(NamedTuple):
    """Cells of leaves of one type handler that are staged together.

    Attributes:
      pieces: position of the leaf in the tree, the spec of its kind, the cell.
      held: host memory that staging them takes beside the caller's arrays, in bytes.
    """

    pieces: Sequence[tuple[int, LeafSpec, Index]]
    held: int


class Group(NamedTuple):
    """Leaves of one type handler, in the order of the tree.

    Attributes:
      handler: theirs.
      positions: of the leaves in the tree.
      numbers: for each leaf the number of its kind.
      specs: for each kind what is stored of its first leaf.
      batches: what this process writes.
    """

    handler: TypeHandler[Any]
    positions: Sequence[int]
    numbers: Sequence[int]
    specs: Sequence[LeafSpec]
    batches: Sequence[Batch]


@attrs.frozen(eq=False, slots=False)  # slots would leave no room for the cached property
class SavePlan:
    """What saving a tree will write. It holds no leaf and no container, so that it serves the next tree of the same kind too.

    Attributes:
      structure: of the tree, empty nodes included.
      empty: an empty node like each of the tree's, by position.
      groups: the leaves that are stored, by type handler.
      backend: where their chunks go.
      options: for the backend.
      max_inflight_bytes: bound of the host memory that staged copies take.
      registry: knows whose type handlers and backend they are.
    """

    structure: tree.Structure
    empty: Mapping[int, Any]
    groups: Sequence[Group]
    backend: StorageBackend
    options: StorageOptions
    max_inflight_bytes: int
    registry: Registry

    @functools.cached_property
    def arrays(self) -> Mapping[int, ArraySpec]:
        """The arrays that hold leaves, by the position of the leaf; made after the caller was let go."""
        names = self.structure.names
        arrays: dict[int, ArraySpec] = {}
        for group in self.groups:
            layouts = [spec.array[1:] if spec.array is not None else None for spec in group.specs]
            each = zip(group.positions, [layouts[number] for number in group.numbers], strict=True)
            arrays.update({i: ArraySpec(names[i], *layout) for i, layout in each if layout is not None})
        return arrays

    @functools.cached_property
    def nodes(self) -> Sequence[LeafSpec | Any]:
        """Per leaf of the structure, its spec, or an empty node like the tree's; made after the caller was let go."""
        nodes = dict(self.empty)
        for group in self.groups:
            for position, number in zip(group.positions, group.numbers, strict=True):
                typestr, _, *rest = group.specs[number]
                nodes[position] = LeafSpec(typestr, self.arrays.get(position), *rest)
        return [nodes[position] for position in range(len(nodes))]


_plans: Recent[Hashable, SavePlan] = Recent(4)


def plan_save(
    item: Any,
    save_args: Any,
    registry: Registry,
    backend: StorageBackend,
    options: StorageOptions,
    max_inflight_bytes: int,
    rules: LeafRules = PLAIN,
) -> tuple[SavePlan, Sequence[Any]]:
    """How to save `item`, and its leaves. Training saves trees of one kind, so the plan of the last ones is kept.

    Args:
      item: the tree.
      save_args: a tree of `SaveArgs` or None with the structure of `item`; None for all defaults.
      registry: finds the type handler of each leaf.
      backend: refuses arrays that it cannot store.
      options: for the backend.
      max_inflight_bytes: bound of the host memory that staged copies take.
      rules: what the handler above wants of leaf types.

    Raises:
      errors.TreeError: lists every leaf that cannot be saved.
      errors.PluginError: a type handler or the backend did not return what it must.
    """
    values, structure = tree.flatten(item)
    problems: dict[int, str] = {}
    members = _by_handler(values, registry, rules, problems)

    job = current_meeting().job
    _refuse_backend(backend, job)

    def make() -> SavePlan:
        args = [None] * len(values) if save_args is None else tree.flatten_alike(structure, save_args, "save_args")
        alike = {} if job.others or save_args is not None else kinds  # processes share the cells of leaves that are alike
        groups = [_Members(handler, positions, alike.get(handler)) for handler, positions in members.items()]
        return _plan(structure, values, groups, args, registry, backend, options, max_inflight_bytes, problems)

    kinds = {handler: answers.kinds(registry, handler, [values[i] for i in positions]) for handler, positions in members.items()}
    if save_args is not None or problems or None in kinds.values():
        return make(), values
    types = tuple(map(type, values))  # which leaf is whose, and which empty node is which
    key = (structure.shared, types, tuple(kinds.items()), registry, backend, options, max_inflight_bytes, job)
    return _plans.get(key, make), values


def _refuse_backend(backend: StorageBackend, job: Job) -> None:
    if job.others and not isinstance(backend, ManyWriters):
        raise errors.ArgsError(
            f"storage={backend.name!r} is written by one process, and {job.process_count} save here; choose 'ocdbt', or another "
            "backend that several processes can write with."
        )


class _Members:
    """Leaves of one type handler; what holds for a kind of them is asked of the first leaf of the kind.

    Attributes:
      positions: of the leaves in the tree.
      numbers: for each leaf the number of its kind.
      firsts: for each kind its first leaf.
      found: for each kind what describes that leaf.
    """

    def __init__(self, handler: TypeHandler[Any], positions: Sequence[int], kinds: Kinds | None) -> None:
        self.handler = handler
        self.positions = positions
        self.numbers: Sequence[int] = range(len(positions)) if kinds is None else kinds.numbers
        self.firsts: Sequence[Leaf] = ()
        self.found: Sequence[LeafSpec | Problem] = ()

    def first_positions(self) -> list[int]:
        """Where the first leaf of each kind is in the tree."""
        firsts: list[int] = []
        for position, number in zip(self.positions, self.numbers, strict=True):
            if number == len(firsts):
                firsts.append(position)
        return firsts

    def note(self, found: Sequence[Any], problems: dict[int, str]) -> None:
        """Keeps the problems among what was found for each kind."""
        if wrong := {number: each.message for number, each in enumerate(found) if isinstance(each, Problem)}:
            for position, number in zip(self.positions, self.numbers, strict=True):
                if number in wrong:
                    problems.setdefault(position, wrong[number])

    def in_arrays(self) -> Sequence[int]:
        """Where the leaves are that arrays hold."""
        stored = [isinstance(spec, LeafSpec) and spec.array is not None for spec in self.found]
        if all(stored):
            return self.positions
        return [position for position, number in zip(self.positions, self.numbers, strict=True) if stored[number]]


def _plan(  # noqa: PLR0913, PLR0917 - what `plan_save` is given, and what it has found
    structure: tree.Structure,
    values: Sequence[Any],
    members: Sequence[_Members],
    args: Sequence[Any],
    registry: Registry,
    backend: StorageBackend,
    options: StorageOptions,
    max_inflight_bytes: int,
    problems: dict[int, str],
) -> SavePlan:
    job = current_meeting().job
    _refuse_depth(structure)
    for each in members:
        firsts = each.first_positions()
        each.firsts = [
            Leaf(path, structure.names[i], values[i], _checked(args[i], i, problems))
            for i, path in zip(firsts, structure.shared.paths_of(firsts), strict=True)
        ]
        each.found = answers.described(registry, each.handler, each.firsts)
        each.note(each.found, problems)
        each.note(_refused(registry, backend, each.found), problems)
    positions = [i for each in members for i in each.positions]
    stored = sorted(positions) if len(members) > 1 else positions
    _refuse_names(registry, backend, structure.names, [i for each in members for i in each.in_arrays()], problems)
    _raise(structure, problems, tree.name_collisions(structure, stored))
    owned = [answers.owned(registry, each.handler, each.firsts, _sound(each.found), job) for each in members]
    for each, found in zip(members, owned, strict=True):
        each.note(found, problems)
    _raise(structure, problems)
    groups = [
        Group(
            *(each.handler, each.positions, each.numbers, _sound(each.found)),
            list(_batches(registry, each, cells, max_inflight_bytes)),
        )
        for each, cells in zip(members, owned, strict=True)
    ]
    others = set(range(len(values))).difference(stored) if len(stored) < len(values) else ()
    empty = {i: tree.hollow(values[i]) for i in sorted(others)}
    return SavePlan(structure, empty, groups, backend, options, max_inflight_bytes, registry)


def _refuse_depth(structure: tree.Structure) -> None:
    """Refuses a tree that a restore could not build."""
    keys = structure.shared.deepest()
    if len(keys) > MAX_DEPTH:
        raise errors.TreeError(
            f"A leaf lies below {len(keys)} keys ({'.'.join(tree.key_path(keys[:3]))} ...), a checkpoint holds trees of at most "
            f"{MAX_DEPTH}: keep what is nested so deeply in a list."
        )


def _sound(found: Sequence[LeafSpec | Problem]) -> Sequence[LeafSpec]:
    """What was found, once all problems have been raised."""
    return found  # type: ignore[return-value]  # a fact that no type says


def _raise(structure: tree.Structure, problems: Mapping[int, str], further: Sequence[str] = ()) -> None:
    lines = [*(f"{structure.paths[i]}: {problems[i]}" for i in sorted(problems)), *further]
    if lines:
        raise errors.TreeError(f"{len(lines)} of {len(structure.paths)} leaves cannot be saved:{errors.listing(lines)}")


def _batches(registry: Registry, members: _Members, owned: Sequence[Any], max_inflight_bytes: int) -> Iterator[Batch]:
    """The cells that this process writes; a batch fits into half the budget, or is one cell.

    Args:
      registry: knows whose type handler it is.
      members: the leaves.
      owned: for each kind of the members its cells.
      max_inflight_bytes: the budget.
    """
    limit = min(BATCH_BYTE_SIZE, max(1, max_inflight_bytes // 2))
    firsts = list(zip(members.firsts, _sound(members.found), owned, strict=True))
    asked = [(leaf.value, spec, cell) for leaf, spec, cells in firsts for cell in cells]
    sizes = iter(answers.staged_sizes(registry, members.handler, asked))
    sized = [[(spec, cell, next(sizes)) for cell in cells] for _, spec, cells in firsts]
    pieces: list[tuple[int, LeafSpec, Index]] = []
    held = 0
    for position, number in zip(members.positions, members.numbers, strict=True):
        for spec, cell, size in sized[number]:
            if pieces and (held + size > limit or len(pieces) >= BATCH_LEAVES):
                yield Batch(pieces, held)
                pieces, held = [], 0
            pieces.append((position, spec, cell))
            held += size
    if pieces:
        yield Batch(pieces, held)


class _Route(NamedTuple):
    """What becomes of leaves of one Python type."""

    handler: TypeHandler[Any] | None
    as_array: bool = False
    refusal: str | None = None


def _by_handler(
    values: list[Any], registry: Registry, rules: LeafRules, problems: dict[int, str]
) -> dict[TypeHandler[Any], Sequence[int]]:
    """Positions of the leaves by type handler; leaves that are saved as arrays are replaced by them, in place."""
    positions: dict[TypeHandler[Any], Sequence[int]] = {}
    types = list(map(type, values))
    kinds = dict.fromkeys(types)  # a few, which saves asking 10,000 leaves
    for kind in kinds:
        route = _route(kind, registry, rules)
        found: Sequence[int] = range(len(types)) if len(kinds) == 1 else [i for i, each in enumerate(types) if each is kind]
        if route.as_array:
            found = _as_arrays(found, values, problems)
        if route.handler is not None:
            others = positions.get(route.handler)
            positions[route.handler] = sorted([*others, *found]) if others else found
        else:
            unsupported = f"Unsupported type: {kind}; {route.refusal}"
            problems.update({i: unsupported for i in found if not tree.is_empty_node(values[i])})
    return positions


def _as_arrays(found: Sequence[int], values: list[Any], problems: dict[int, str]) -> list[int]:
    """Replaces the leaves at these positions by arrays; which of them could be."""
    made = []
    for i in found:
        try:
            values[i] = np.asarray(values[i])
        except Exception as error:  # noqa: BLE001 - somebody's __array__ may raise anything
            problems[i] = f"{type(values[i])} could not be made an array: {type(error).__name__}: {error}"
        else:
            made.append(i)
    return made


def _route(kind: type, registry: Registry, rules: LeafRules) -> _Route:
    if (refusal := rules.refusal(kind)) is not None:
        return _Route(None, refusal=refusal)
    if rules.as_array(kind):
        return _Route(registry.type_handler_for(np.ndarray), as_array=True)
    handler = registry.type_handler_for(kind)
    if handler is None and rules.arrays_from_protocol and hasattr(kind, "__array__"):
        return _Route(registry.type_handler_for(np.ndarray), as_array=True)
    if handler is not None and rules.pinned_host:
        handler = handler.through_pinned_host()
    return _Route(handler, refusal="convert it to an array, a number or a str, or register a TypeHandler for it.")


def _checked(args: Any, position: int, problems: dict[int, str]) -> SaveArgs | None:
    if args is None or isinstance(args, SaveArgs):
        if args is not None and args.aggregate:
            problems[position] = "Unsupported option `aggregate`: every leaf is stored on its own; leave the option out."
        return args
    problems[position] = f"save_args holds a {type(args).__name__} here; expected SaveArgs or None."
    return None


def _refused(registry: Registry, backend: StorageBackend, found: Sequence[LeafSpec | Problem]) -> Sequence[Problem | None]:
    """For each kind what the backend has against it."""
    asked = {number: spec.array for number, spec in enumerate(found) if isinstance(spec, LeafSpec) and spec.array is not None}
    reasons = dict(zip(asked, answers.refusals(registry, backend, list(asked.values())), strict=True))
    return [None if (reason := reasons.get(number)) is None else Problem(reason) for number in range(len(found))]


def _refuse_names(
    registry: Registry, backend: StorageBackend, names: Sequence[str], positions: Sequence[int], problems: dict[int, str]
) -> None:
    asked = [i for i in positions if i not in problems] if problems else positions
    reasons = answers.name_refusals(registry, backend, [names[i] for i in asked])
    if any(reasons):
        problems.update({i: reason for i, reason in zip(asked, reasons, strict=True) if reason is not None})
