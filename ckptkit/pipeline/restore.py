"""Restoring: needs (every problem in one error) > read > verify > assemble, one batch read while another is assembled."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ckptkit import errors, reports
from ckptkit._casts import can_cast, unheld
from ckptkit._warnings import warn
from ckptkit.grid import Array, ArraySpec, Index, chunk_indices, index_nbytes, index_shape, is_cell
from ckptkit.index import IndexDocument
from ckptkit.leaves.base import LeafSpec, Problem, RestoreArgs, TypeHandler
from ckptkit.options import OnCorrupt
from ckptkit.pipeline import answers
from ckptkit.pipeline.check import ChunkRead, chunk_problems, start_reading
from ckptkit.pipeline.limits import BATCH_BYTE_SIZE, BATCH_LEAVES
from ckptkit.pipeline.memory import aligned_empty
from ckptkit.pipeline.sharing import Sharing
from ckptkit.processes import Job
from ckptkit.registry import Registry
from ckptkit.restoration import current_restoration
from ckptkit.storage.base import PartialReader, Reader

__all__ = ["RestoreItem", "restore_leaves", "unrestorable"]


KeyPath = tuple[str, ...]


class RestoreItem(NamedTuple):
    """One leaf to restore.

    Attributes:
      key_path: where it is, for messages.
      spec: what is stored.
      handler: who restores it.
      request: what is wanted.
    """

    key_path: KeyPath
    spec: LeafSpec
    handler: TypeHandler[Any]
    request: RestoreArgs


def restore_leaves(
    items: Sequence[RestoreItem],
    registry: Registry,
    reader: Reader,
    index: IndexDocument | None,
    max_inflight_bytes: int,
    where: str,
    on_corrupt: OnCorrupt = "raise",
    lost: Mapping[KeyPath, errors.CheckpointError] = MappingProxyType({}),
) -> list[Any]:
    """The leaves, in the order of `items`; `...` in the place of one that `on_corrupt='skip'` leaves out.

    Args:
      items: what to restore.
      registry: knows whose type handlers and reader they are.
      reader: gives the chunks.
      index: their checksums; None where none were written.
      max_inflight_bytes: bound of the bytes that are read ahead of what is assembled (one leaf may exceed it).
      where: the checkpoint, for messages.
      on_corrupt: what happens where stored bytes are damaged: 'raise' reads everything else, to tell what is whole, and raises;
        'skip' warns.
      lost: leaves that are not among `items` because they are known to be damaged.

    Raises:
      errors.TargetError: lists every leaf that cannot be restored as requested.
      errors.ProcessError: processes that read for each other do not restore the same.
      errors.CorruptCheckpointError: lists every chunk whose bytes differ from its checksum.
      errors.NotFoundError, errors.FormatError, errors.StorageError: chunks are missing or cannot be read.
      errors.PluginError: a type handler or the reader did not do what it must.
    """
    needs = _needs(items, registry, where)
    _warn_of_casts(items)
    meeting = current_restoration()
    if meeting.job.others and on_corrupt == "skip":
        raise errors.ArgsError(
            "on_corrupt='skip' and MultiprocessingOptions(single_reader=True) exclude each other; leave out one."
        )
    sharing = Sharing(meeting, registry, items, needs)
    tracker = reports.current_tracker("restore")
    tracker.verified = tracker.verified and index is not None
    fetches = _parts if index is None and isinstance(reader, PartialReader) else _cells
    batches = list(_restore_batches(items, needs, sharing, max_inflight_bytes))
    tracker.expect(sum(batch.byte_count for batch in batches), len(items))
    leaves: list[Any] = [...] * len(items)
    wrapped: list[str] = []
    damage = {path: [error] for path, error in lost.items()}
    ahead: list[_Reading] = []
    sharing.begin([batch.positions for batch in batches], where, max_inflight_bytes)
    try:
        for following in [*batches, None]:
            if following is not None:
                ahead.append(_start_reading(following, items, needs, sharing, registry, reader, index, fetches))
            if ahead and (following is None or len(ahead) > 1):
                reading = ahead.pop(0)
                for key_path, error in _damage(reading, registry, reader, index):
                    damage.setdefault(key_path, []).append(error)
                sharing.exchange(reading.parts, failed=bool(damage))
                if not (damage or sharing.failed) or on_corrupt == "skip":
                    _assemble(reading, items, registry, damage, leaves, wrapped)
                tracker.advance(reading.batch.byte_count)
    except BaseException as error:
        sharing.give_up(error)
        raise
    if damage:
        _tell(damage, [item.key_path for item in items if item.key_path not in damage], where, on_corrupt)
        tracker.corrupt += damage
    sharing.end()
    _refuse(items, leaves, where)
    _warn_of_wrapped(wrapped)
    return leaves


def unrestorable(items: Sequence[RestoreItem], registry: Registry) -> list[str]:
    """For each leaf that cannot be restored as requested, its key path and why."""
    needs = zip(items, _answers(items, registry), strict=True)
    return [f"{item.key_path}: {need.message}" for item, need in needs if isinstance(need, Problem)]


def _answers(items: Sequence[RestoreItem], registry: Registry) -> list[Any]:
    """For each leaf the parts that must be read, or the `Problem` with it."""
    needs: list[Any] = [None] * len(items)
    for handler, members in _grouped(items).items():
        specs, requests = [items[i].spec for i in members], [items[i].request for i in members]
        found = answers.needed(registry, handler, specs, requests, Job())
        for i, need in zip(members, found, strict=True):
            needs[i] = need
    return needs


def _needs(items: Sequence[RestoreItem], registry: Registry, where: str) -> list[Sequence[Index]]:
    needs = _answers(items, registry)
    _refuse(items, needs, where)
    return needs


def _refuse(items: Sequence[RestoreItem], found: Sequence[Any], where: str) -> None:
    """Raises where a `Problem` was found for a leaf."""
    problems = [(item.key_path, each) for item, each in zip(items, found, strict=True) if isinstance(each, Problem)]
    if not problems:
        return
    lines = [f"{path}: {problem.message}" for path, problem in problems]
    if all(problem.topology for _, problem in problems):
        paths = ", ".join(str(path) for path, _ in problems[:3])
        raise errors.TopologyError(
            f"{problems[0][1].message} It concerns {len(problems)} of {len(items)} leaves of {where}, the first at {paths}."
        )
    raise errors.TargetError(
        f"{where}: {len(problems)} of {len(items)} leaves cannot be restored as asked:{errors.listing(lines)}"
    )


def _grouped(items: Sequence[RestoreItem]) -> dict[TypeHandler[Any], list[int]]:
    groups: dict[TypeHandler[Any], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault(item.handler, []).append(i)
    return groups


def _warn_of_casts(items: Sequence[RestoreItem]) -> None:
    """One warning that names the leaves whose requested dtype is another kind of number."""
    pairs: dict[Any, bool] = {}
    changed = []
    for item in items:
        wanted = item.request.dtype
        if wanted is None or item.spec.array is None:
            continue
        pair = (item.spec.array.dtype, wanted)
        if pair not in pairs:
            pairs[pair] = _changes_kind(*pair)
        if pairs[pair]:
            changed.append(f"{item.key_path}: {pair[0]} -> {np.dtype(wanted)}")
    if changed:
        warn(
            f"{len(changed)} leaves change their kind of number on restore; casting='same_kind' makes this an error:"
            f"{errors.listing(changed, 10)}"
        )


def _changes_kind(stored: np.dtype[Any], wanted: Any) -> bool:
    """Whether a cast goes to a kind of number that does not hold the stored one, as from complex to real."""
    try:
        return not can_cast(stored, np.dtype(wanted), "same_kind")
    except TypeError:  # a dtype of jax's own, such as a PRNG key's
        return False


def _held(item: RestoreItem, parts: Mapping[Index, Array], leaf: Any, wrapped: list[str]) -> Any:
    """The leaf, or a `Problem` where integers among its parts are none of the requested dtype; if allowed, `wrapped` tells so."""
    array, wanted = item.spec.array, item.request.dtype
    if array is None or wanted is None or wanted == array.dtype or isinstance(leaf, Problem):
        return leaf
    try:
        dtype: np.dtype[Any] = np.dtype(wanted)
    except TypeError:  # as above
        return leaf
    number = next((each for part in parts.values() if (each := unheld(part, dtype)) is not None), None)
    if number is None:
        return leaf
    if item.request.defaults.casting != "unsafe":
        return Problem(f"the number {number} is stored, which {dtype} cannot hold; ask for {array.dtype}.")
    wrapped.append(f"{item.key_path}: {array.dtype} -> {dtype}, of which the first is {number}")
    return leaf


def _warn_of_wrapped(wrapped: Sequence[str]) -> None:
    """One warning that names the leaves with integers that became others."""
    if wrapped:
        warn(
            f"{len(wrapped)} leaves hold integers beyond the requested dtype, which became others on restore; "
            f"casting='same_kind' makes this an error:{errors.listing(wrapped, 10)}"
        )


class _Batch(NamedTuple):
    """Leaves of one type handler that are read together.

    Attributes:
      positions: of the leaves.
      byte_count: of what this process reads of them.
    """

    positions: list[int]
    byte_count: int


def _restore_batches(
    items: Sequence[RestoreItem], needs: Sequence[Sequence[Index]], sharing: Sharing, max_inflight_bytes: int
) -> Iterator[_Batch]:
    limit = min(BATCH_BYTE_SIZE, max(1, max_inflight_bytes // 2))  # half: one batch is read while another is assembled
    for members in _grouped(items).values():
        batch: list[int] = []
        total = read = 0
        for i in members:
            array = items[i].spec.array
            size = mine = sum([index_nbytes(array, index) for index in needs[i]]) if array else 0
            if sharing.several and array:  # then the batches must be the same on all processes, whatever each needs
                size, mine = array.nbytes, sum([index_nbytes(array, index) for index in sharing.reads(i)])
            if batch and (total + size > limit or len(batch) >= BATCH_LEAVES):
                yield _Batch(batch, read)
                batch, total, read = [], 0, 0
            batch.append(i)
            total += size
            read += mine
        if batch:
            yield _Batch(batch, read)


class _Fetched(NamedTuple):
    """A chunk that is being read into `out`, and where its values go besides."""

    item: RestoreItem
    array: ArraySpec
    part: Index
    out: Array
    copies: Sequence[tuple[Array, tuple[slice, ...]]]


class _Reading(NamedTuple):
    """A batch that is being read."""

    batch: _Batch
    parts: list[dict[Index, Array]]
    fetched: list[_Fetched]
    chunks: list[ChunkRead]
    future: Future[Any]


_Fetches = Callable[[RestoreItem, ArraySpec, Mapping[Index, Array]], Iterable[_Fetched]]


def _start_reading(
    batch: _Batch,
    items: Sequence[RestoreItem],
    needs: Sequence[Sequence[Index]],
    sharing: Sharing,
    registry: Registry,
    reader: Reader,
    index: IndexDocument | None,
    fetches: _Fetches,
) -> _Reading:
    parts: list[dict[Index, Array]] = []
    fetched: list[_Fetched] = []
    for i in batch.positions:
        item = items[i]
        array = item.spec.array
        buffers = {index: aligned_empty(index_shape(index), array.dtype) for index in needs[i]} if array else {}
        parts.append(buffers)
        if array is not None:
            fetched += fetches(item, array, {index: buffers[index] for index in sharing.reads(i)})
    chunks = [ChunkRead(f.array, f.part, f.out) for f in fetched]
    return _Reading(batch, parts, fetched, chunks, start_reading(chunks, registry, reader, index))


def _parts(item: RestoreItem, array: ArraySpec, buffers: Mapping[Index, Array]) -> Iterator[_Fetched]:
    """The buffers themselves, whatever chunks they lie in."""
    return (_Fetched(item, array, index, buffer, ()) for index, buffer in buffers.items() if buffer.size)


def _cells(item: RestoreItem, array: ArraySpec, buffers: Mapping[Index, Array]) -> Iterator[_Fetched]:
    """The chunks that fill the buffers, each once: straight into its place where it fits there as a whole in one run."""
    if len(buffers) == 1:
        ((index, buffer),) = buffers.items()
        if buffer.shape == array.shape == array.chunk_shape:  # most arrays, of which there may be many
            yield _Fetched(item, array, index, buffer, ())
            return
    if all(is_cell(array, index) for index in buffers):  # as where nothing is sharded anew
        yield from _parts(item, array, buffers)
        return
    cells: dict[Index, list[tuple[Index, Array]]] = {}
    for index, buffer in buffers.items():
        for cell in chunk_indices(array, index):
            cells.setdefault(cell, []).append((index, buffer))
    for cell, wanted in cells.items():
        views = [(_overlap(buffer, index, cell), _overlap_slices(cell, index)) for index, buffer in wanted]
        direct = next(
            (k for k, (view, _) in enumerate(views) if view.shape == index_shape(cell) and view.flags.c_contiguous), None
        )
        out = aligned_empty(index_shape(cell), array.dtype) if direct is None else views.pop(direct)[0]
        yield _Fetched(item, array, cell, out, views)


def _overlap(buffer: Array, index: Index, cell: Index) -> Array:
    """The part of `buffer`, which holds `index`, that lies in `cell`."""
    return buffer[_overlap_slices(index, cell)]


def _overlap_slices(inside: Index, other: Index) -> tuple[slice, ...]:
    """The overlap of two indices, in coordinates of the first."""
    return tuple([slice(max(a, c) - a, min(b, d) - a) for (a, b), (c, d) in zip(inside, other, strict=True)])


def _damage(
    reading: _Reading, registry: Registry, reader: Reader, index: IndexDocument | None
) -> list[tuple[KeyPath, errors.CheckpointError]]:
    """What is wrong with what was read, by leaf; chunks that did not go straight into their places are copied there."""
    problems = chunk_problems(reading.chunks, reading.future, registry, reader, index)
    for fetched in reading.fetched:
        for view, inner in fetched.copies:
            view[...] = fetched.out[inner]
    return [(reading.fetched[i].item.key_path, _naming(error, reading.fetched[i].part)) for i, error in problems.items()]


def _naming(error: errors.CheckpointError, index: Index) -> errors.CheckpointError:
    if type(error) is errors.CorruptCheckpointError:
        error.args = (f"chunk {index}: {error}",)
    return error


def _tell(
    damage: Mapping[KeyPath, Sequence[errors.CheckpointError]], whole: Sequence[KeyPath], where: str, on_corrupt: OnCorrupt
) -> None:
    """Raises, or warns, that leaves are damaged, and tells which are not."""
    lines = [f"{path}: {error}" for path, found in damage.items() for error in found]
    text = (
        f"{where}: {len(damage)} of {len(damage) + len(whole)} leaves differ from what was written:{errors.listing(lines)}\n"
        f"{len(whole)} are whole{errors.first_of(whole)}."
    )
    if on_corrupt == "skip":
        warn(f"{text} Those that are not are `...` in the restored tree.")
        return
    every = [error for found in damage.values() for error in found]
    if not any(isinstance(error, errors.CorruptCheckpointError) for error in every):
        every[0].add_note(text)
        raise every[0]
    error = errors.CorruptCheckpointError(
        f"{text} Restore another checkpoint, or a copy of this one; on_corrupt='skip' restores the leaves that are whole."
    )
    error.corrupt, error.whole = tuple(damage), tuple(whole)
    raise error


def _assemble(
    reading: _Reading,
    items: Sequence[RestoreItem],
    registry: Registry,
    damage: Container[KeyPath],
    leaves: list[Any],
    wrapped: list[str],
) -> None:
    """Puts the leaves that are whole into their places, and lines about those whose integers became others into `wrapped`."""
    whole = [(i, part) for i, part in zip(reading.batch.positions, reading.parts, strict=True) if items[i].key_path not in damage]
    if not whole:
        return
    members = [items[i] for i, _ in whole]
    specs, requests = [item.spec for item in members], [item.request for item in members]
    made = answers.assembled(registry, members[0].handler, specs, requests, [part for _, part in whole])
    for (i, parts), item, leaf in zip(whole, members, made, strict=True):
        leaves[i] = _held(item, parts, leaf, wrapped)
