"""Saving: flatten > describe (every problem of the tree in one error) > stage > write > documents."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple

import attrs
import numpy as np

from ckptkit import errors, reports, tree
from ckptkit.grid import ArraySpec, Chunk, Index, index_shape
from ckptkit.index import Checksums
from ckptkit.leaves.base import Leaf, LeafSpec, Problem, SaveArgs, TypeHandler
from ckptkit.location import Location
from ckptkit.options import StorageOptions
from ckptkit.pipeline.limits import BATCH_BYTE_SIZE, BATCH_LEAVES
from ckptkit.processes import Job
from ckptkit.registry import Registry
from ckptkit.storage.base import StorageBackend

__all__ = ["PLAIN", "LeafRules", "SavePlan", "plan_save", "start_save"]


@attrs.frozen
class LeafRules:
    """What a handler wants of leaf types.

    Attributes:
      refusal: for a type that it does not take, what to do about it; None for others.
      as_array: whether leaves of a type are saved as np.ndarray though they have a type handler.
      arrays_from_protocol: leaves without a type handler are saved as np.ndarray where they have `__array__`.
    """

    refusal: Callable[[type], str | None] = lambda kind: None
    as_array: Callable[[type], bool] = lambda kind: False
    arrays_from_protocol: bool = False


PLAIN = LeafRules()


class Group(NamedTuple):
    """Leaves of one type handler, in the order of the tree."""

    handler: TypeHandler[Any]
    leaves: Sequence[Leaf]
    specs: Sequence[LeafSpec]


@attrs.frozen(eq=False)
class SavePlan:
    """A tree that can be saved.

    Attributes:
      structure: of the tree, empty nodes included.
      nodes: per leaf of the structure, its spec, or the empty node itself.
      groups: the leaves that are stored, by type handler.
      backend: where their chunks go.
      options: for the backend.
    """

    structure: tree.Structure
    nodes: Sequence[LeafSpec | Any]
    groups: Sequence[Group]
    backend: StorageBackend
    options: StorageOptions

    @property
    def arrays(self) -> list[ArraySpec]:
        return [spec.array for group in self.groups for spec in group.specs if spec.array is not None]


def plan_save(
    item: Any,
    save_args: Any,
    registry: Registry,
    backend: StorageBackend,
    options: StorageOptions,
    rules: LeafRules = PLAIN,
) -> SavePlan:
    """What saving `item` will write. No I/O, no copy of data.

    Args:
      item: the tree.
      save_args: a tree of `SaveArgs` or None with the structure of `item`; None for all defaults.
      registry: finds the type handler of each leaf.
      backend: refuses arrays that it cannot store.
      options: for the backend.
      rules: what the handler above wants of leaf types.

    Raises:
      errors.TreeError: lists every leaf that cannot be saved.
    """
    values, structure = tree.flatten(item)
    args = [None] * len(values) if save_args is None else tree.flatten_alike(structure, save_args, "save_args")
    problems: dict[int, str] = {}
    positions = _by_handler(values, registry, rules, problems)
    nodes: list[Any] = list(values)
    groups = []
    for handler, members in positions.items():
        leaves = [
            Leaf(structure.paths[i], structure.names[i], values[i], _checked(args[i], i, problems)) for i in members
        ]
        specs = _described(handler, leaves, members, problems)
        for i, spec in zip(members, specs, strict=True):
            nodes[i] = spec
        groups.append(Group(handler, leaves, specs))
    stored = sorted(i for members in positions.values() for i in members)
    _refusals(backend, [(i, nodes[i].array) for i in stored if i not in problems and nodes[i].array is not None], problems)
    lines = [f"{structure.paths[i]}: {problems[i]}" for i in sorted(problems)]
    lines += tree.name_collisions(structure, stored)
    if lines:
        raise errors.TreeError(f"{len(lines)} of {len(values)} leaves cannot be saved:{errors.listing(lines)}")
    return SavePlan(structure, nodes, groups, backend, options)


class _Route(NamedTuple):
    """What becomes of leaves of one Python type."""

    handler: TypeHandler[Any] | None
    as_array: bool = False
    refusal: str | None = None


def _by_handler(
    values: list[Any], registry: Registry, rules: LeafRules, problems: dict[int, str]
) -> dict[TypeHandler[Any], list[int]]:
    """Positions of the leaves by type handler; leaves that are saved as arrays are replaced by them, in place."""
    positions: dict[TypeHandler[Any], list[int]] = {}
    routes: dict[type, _Route] = {}
    for i, value in enumerate(values):
        kind = type(value)
        if (route := routes.get(kind)) is None:
            route = routes[kind] = _route(kind, registry, rules)
        if route.as_array:
            values[i] = np.asarray(value)
        if route.handler is not None:
            positions.setdefault(route.handler, []).append(i)
        elif not tree.is_empty_node(value):
            problems[i] = f"Unsupported type: {kind}; {route.refusal}"
    return positions


def _route(kind: type, registry: Registry, rules: LeafRules) -> _Route:
    if (refusal := rules.refusal(kind)) is not None:
        return _Route(None, refusal=refusal)
    if rules.as_array(kind):
        return _Route(registry.type_handler_for(np.ndarray), as_array=True)
    handler = registry.type_handler_for(kind)
    if handler is None and rules.arrays_from_protocol and hasattr(kind, "__array__"):
        return _Route(registry.type_handler_for(np.ndarray), as_array=True)
    return _Route(handler, refusal="convert it to an array, a number or a str, or register a TypeHandler for it.")


def _checked(args: Any, position: int, problems: dict[int, str]) -> SaveArgs | None:
    if args is None or isinstance(args, SaveArgs):
        if args is not None and args.aggregate:
            problems[position] = "Unsupported option `aggregate`: every leaf is stored on its own; leave the option out."
        return args
    problems[position] = f"save_args holds a {type(args).__name__} here; expected SaveArgs or None."
    return None


def _described(
    handler: TypeHandler[Any], leaves: Sequence[Leaf], members: Sequence[int], problems: dict[int, str]
) -> Sequence[LeafSpec]:
    described = handler.describe(leaves)
    if len(described) != len(leaves):
        raise errors.PluginError(f"{type(handler)}.describe returned {len(described)} results for {len(leaves)} leaves.")
    for i, spec in zip(members, described, strict=True):
        if isinstance(spec, Problem):
            problems.setdefault(i, spec.message)
    return described  # type: ignore[return-value]  # where a Problem is among them, the plan is never made


def _refusals(backend: StorageBackend, arrays: Sequence[tuple[int, ArraySpec]], problems: dict[int, str]) -> None:
    reasons = backend.refuse([array for _, array in arrays])
    for (i, _), reason in zip(arrays, reasons, strict=True):
        if reason is not None:
            problems[i] = reason


class _Staged(NamedTuple):
    """A batch on its way to storage.

    Attributes:
      chunks: what to write.
      held: host memory that it takes beside the caller's arrays, in bytes.
    """

    chunks: Sequence[Chunk]
    held: int


class _SaveFuture(Future[None]):
    """Done when the writing thread has ended; cancelling asks it to end early."""

    def __init__(self) -> None:
        super().__init__()
        self.cancel_requested = threading.Event()

    def cancel(self) -> bool:
        """Makes the writer stop before its next batch; the future ends with an error once nothing is written any more."""
        self.cancel_requested.set()
        return False


class _Budget:
    """Host memory in flight. `acquire` waits until a batch fits; one batch always does."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._open = True
        self._changed = threading.Condition()

    def fits(self, size: int) -> bool:
        return self._used == 0 or self._used + size <= self._limit

    def acquire(self, size: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self.fits(size))
            self._used += size

    def release(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more: the writer has ended."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


def start_save(
    plan: SavePlan,
    location: Location,
    max_inflight_bytes: int,
    documents: Callable[[Mapping[str, list[str]]], Mapping[str, bytes]],
) -> Future[None]:
    """Stages every leaf, and writes in a thread; returns when the caller may change or donate its arrays.

    Staged copies are held to `max_inflight_bytes` (one chunk may exceed it): past that, the call waits for the writer.

    Args:
      plan: what to save.
      location: an existing, empty directory.
      max_inflight_bytes: bound of the host memory that staged copies take.
      documents: called in the writing thread with the checksums per array; returns the small files to write last.

    Returns:
      a future that is done when every file is written.
    """
    result = _SaveFuture()
    batches: SimpleQueue[_Staged | None] = SimpleQueue()
    budget = _Budget(max_inflight_bytes)
    tracker = reports.current_tracker("save")
    tracker.expect(sum(array.nbytes for array in plan.arrays), sum(len(group.leaves) for group in plan.groups))
    # Not a daemon: the interpreter waits for it at exit, so that a save under way is finished.
    writer = threading.Thread(
        target=_write, args=(plan, location, batches, budget, documents, tracker, result), name="ckptkit-write", daemon=False
    )
    try:
        for batch in _batches(plan, max_inflight_bytes):
            if not budget.fits(batch.held) and not writer.ident:
                writer.start()
            budget.acquire(batch.held)
            if result.done():
                break
            batches.put(_Staged(_stage(batch), batch.held))
    except BaseException:
        result.cancel()
        raise
    finally:
        batches.put(None)
        if not writer.ident:
            writer.start()
    return result


@attrs.frozen
class _Piece:
    """One cell of a leaf's grid that this process writes."""

    leaf: Leaf
    spec: LeafSpec
    index: Index


class _Batch(NamedTuple):
    """What is staged together.

    Attributes:
      handler: of all its leaves.
      pieces: the cells.
      held: host memory that staging them takes beside the caller's arrays, in bytes.
    """

    handler: TypeHandler[Any]
    pieces: Sequence[_Piece]
    held: int


def _batches(plan: SavePlan, max_inflight_bytes: int) -> Iterator[_Batch]:
    """Everything to stage; a batch fits into half the budget, or is one piece."""
    limit = min(BATCH_BYTE_SIZE, max(1, max_inflight_bytes // 2))
    for handler, leaves, specs in plan.groups:
        owned = handler.owned(leaves, specs, Job())
        pieces = [_Piece(leaf, spec, cell) for leaf, spec, cells in zip(leaves, specs, owned, strict=True) for cell in cells]
        sizes = handler.staged_nbytes([(piece.leaf.value, piece.spec, piece.index) for piece in pieces])
        start = held = 0
        for i, size in enumerate(sizes):
            if i > start and (held + size > limit or i - start >= BATCH_LEAVES):
                yield _Batch(handler, pieces[start:i], held)
                start, held = i, 0
            held += size
        if pieces:
            yield _Batch(handler, pieces[start:], held)


def _stage(batch: _Batch) -> Sequence[Chunk]:
    handler, pieces, _ = batch
    staged = handler.stage([(piece.leaf.value, piece.spec, piece.index) for piece in pieces])
    if len(staged) != len(pieces):
        raise errors.PluginError(f"{type(handler)}.stage returned {len(staged)} arrays for {len(pieces)} pieces.")
    chunks = []
    for piece, data in zip(pieces, staged, strict=True):
        array = piece.spec.array
        assert array is not None
        if data.dtype != array.dtype or data.shape != index_shape(piece.index) or not data.flags.c_contiguous:
            raise errors.PluginError(
                f"{type(handler)}.stage returned a {data.dtype} array of shape {data.shape} for {piece.leaf.key_path}; "
                f"expected a C-contiguous {array.dtype} array of shape {index_shape(piece.index)}."
            )
        chunks.append(Chunk(array, piece.index, data))
    return chunks


def _write(
    plan: SavePlan,
    location: Location,
    batches: SimpleQueue[_Staged | None],
    budget: _Budget,
    documents: Callable[[Mapping[str, list[str]]], Mapping[str, bytes]],
    tracker: reports.Tracker,
    result: _SaveFuture,
) -> None:
    """The writing thread: what is staged goes to the backend, then the documents go to the location."""
    checksums = {array.name: Checksums(array) for array in plan.arrays}
    try:
        writer = plan.backend.writer(location, plan.arrays, plan.options, Job())
        try:
            while (batch := batches.get()) is not None:
                if result.cancel_requested.is_set():
                    break
                written = writer.write(batch.chunks)
                written.add_done_callback(_Written(budget, batch.held, tracker, sum(chunk.data.nbytes for chunk in batch.chunks)))
                for chunk in batch.chunks:
                    checksums[chunk.array.name].add(chunk.index, chunk.data)
                del batch, chunk  # a view keeps jax from reusing a donated buffer; let it go as soon as its bytes are written
            if result.cancel_requested.is_set():
                raise errors.CheckpointError("the save was given up.")
            writer.commit()
        except BaseException:
            writer.abort()
            raise
        for name, data in documents({name: sums.texts() for name, sums in checksums.items()}).items():
            location.write_bytes(name, data)
    except BaseException as error:  # noqa: BLE001 - it is raised again where the future's result is asked for
        result.set_exception(error)
    else:
        result.set_result(None)
    finally:
        budget.close()


@attrs.frozen
class _Written:
    """Called when the data of a batch is no longer referenced."""

    budget: _Budget
    held: int
    tracker: reports.Tracker
    byte_count: int

    def __call__(self, _: Future[None]) -> None:
        self.budget.release(self.held)
        self.tracker.advance(self.byte_count)
