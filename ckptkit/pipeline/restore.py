"""Restoring: needs (every problem in one error) > read > verify > assemble, one batch read while another is assembled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import attrs
import numpy as np

from ckptkit import errors, reports
from ckptkit._gc import paused_gc
from ckptkit.grid import Array, ArraySpec, Index, chunk_indices, index_nbytes, index_shape
from ckptkit.index import IndexDocument
from ckptkit.leaves.base import LeafSpec, Problem, RestoreArgs, TypeHandler
from ckptkit.pipeline.limits import BATCH_BYTE_SIZE, BATCH_LEAVES
from ckptkit.processes import Job
from ckptkit.storage.base import Reader

__all__ = ["RestoreItem", "aligned_empty", "restore_leaves", "unrestorable"]


class RestoreItem(NamedTuple):
    """One leaf to restore.

    Attributes:
      key_path: where it is, for messages.
      spec: what is stored.
      handler: who restores it.
      request: what is wanted.
    """

    key_path: tuple[str, ...]
    spec: LeafSpec
    handler: TypeHandler[Any]
    request: RestoreArgs


def restore_leaves(
    items: Sequence[RestoreItem], reader: Reader, index: IndexDocument | None, max_inflight_bytes: int, where: str
) -> list[Any]:
    """The leaves, in the order of `items`.

    Args:
      items: what to restore.
      reader: gives the chunks.
      index: their checksums; None where none were written.
      max_inflight_bytes: bound of the bytes that are read ahead of what is assembled (one leaf may exceed it).
      where: the checkpoint, for messages.

    Raises:
      errors.TargetError: lists every leaf that cannot be restored as requested.
      errors.CorruptCheckpointError: lists every chunk whose bytes differ from its checksum.
    """
    needs = _needs(items, where)
    _warn_of_casts(items)
    tracker = reports.current_tracker("restore")
    tracker.verified = tracker.verified and index is not None
    batches = list(_restore_batches(items, needs, max_inflight_bytes))
    tracker.expect(sum(batch.byte_count for batch in batches), len(items))
    leaves: list[Any] = [None] * len(items)
    ahead: list[_Reading] = []
    for following in [*batches, None]:
        if following is not None:
            ahead.append(_start_reading(following, items, needs, reader))
        if ahead and (following is None or len(ahead) > 1):
            reading = ahead.pop(0)
            reading.future.result()
            _verify(reading, index, where)
            for i, leaf in zip(reading.batch.positions, _assemble(reading, items), strict=True):
                leaves[i] = leaf
            tracker.advance(reading.batch.byte_count)
    return leaves


def unrestorable(items: Sequence[RestoreItem]) -> list[str]:
    """For each leaf that cannot be restored as requested, its key path and why."""
    answers = zip(items, _answers(items), strict=True)
    return [f"{item.key_path}: {answer.message}" for item, answer in answers if isinstance(answer, Problem)]


def _answers(items: Sequence[RestoreItem]) -> list[Any]:
    """For each leaf the parts that must be read, or the `Problem` with it."""
    answers: list[Any] = [None] * len(items)
    for handler, members in _grouped(items).items():
        found = handler.needs([items[i].spec for i in members], [items[i].request for i in members], Job())
        for i, answer in zip(members, found, strict=True):
            answers[i] = answer
    return answers


@paused_gc()
def _needs(items: Sequence[RestoreItem], where: str) -> list[Sequence[Index]]:
    needs = _answers(items)
    problems = [(item.key_path, need) for item, need in zip(items, needs, strict=True) if isinstance(need, Problem)]
    if not problems:
        return needs
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
        warnings.warn(
            f"{len(changed)} leaves change their kind of number on restore; casting='same_kind' makes this an error:"
            f"{errors.listing(changed, 10)}",
            stacklevel=6,
        )


def _changes_kind(stored: np.dtype[Any], wanted: Any) -> bool:
    """Whether a cast goes from complex to real, or from floating to integer or bool."""
    try:
        wanted = np.dtype(wanted)
    except TypeError:  # a dtype of jax's own, such as a PRNG key's
        return False
    if np.can_cast(stored, wanted, "same_kind"):
        return False
    if stored.kind == "c":
        return True
    return not np.can_cast(stored, np.int64, "same_kind") and np.can_cast(wanted, np.int64, "same_kind")


class _Batch(NamedTuple):
    """Leaves of one type handler that are read together."""

    positions: list[int]
    byte_count: int


def _restore_batches(items: Sequence[RestoreItem], needs: Sequence[Sequence[Index]], max_inflight_bytes: int) -> Iterator[_Batch]:
    limit = min(BATCH_BYTE_SIZE, max(1, max_inflight_bytes // 2))  # half: one batch is read while another is assembled
    for members in _grouped(items).values():
        batch: list[int] = []
        total = 0
        for i in members:
            array = items[i].spec.array
            size = sum([index_nbytes(array, index) for index in needs[i]]) if array else 0
            if batch and (total + size > limit or len(batch) >= BATCH_LEAVES):
                yield _Batch(batch, total)
                batch, total = [], 0
            batch.append(i)
            total += size
        if batch:
            yield _Batch(batch, total)


@attrs.frozen
class _Fetched:
    """A chunk that is being read into `out`, and where its values go besides."""

    item: RestoreItem
    index: Index
    out: Array
    copies: Sequence[tuple[Array, tuple[slice, ...]]]


class _Reading(NamedTuple):
    """A batch that is being read."""

    batch: _Batch
    parts: list[dict[Index, Array]]
    fetched: list[_Fetched]
    future: Future[None]


@paused_gc()
def _start_reading(batch: _Batch, items: Sequence[RestoreItem], needs: Sequence[Sequence[Index]], reader: Reader) -> _Reading:
    parts: list[dict[Index, Array]] = []
    fetched: list[_Fetched] = []
    for i in batch.positions:
        item = items[i]
        array = item.spec.array
        buffers = {index: aligned_empty(index_shape(index), array.dtype) for index in needs[i]} if array else {}
        parts.append(buffers)
        if array is not None:
            fetched += _fetches(item, array, buffers)
    future = reader.read([(f.item.spec.array.name, f.index, f.out) for f in fetched if f.item.spec.array is not None])
    return _Reading(batch, parts, fetched, future)


def _fetches(item: RestoreItem, array: ArraySpec, buffers: Mapping[Index, Array]) -> Iterator[_Fetched]:
    """The chunks that fill the buffers, each once: straight into its place where it fits there as a whole in one run."""
    if len(buffers) == 1:
        ((index, buffer),) = buffers.items()
        if buffer.size and index == tuple([(0, min(n, c)) for n, c in zip(array.shape, array.chunk_shape, strict=True)]):
            yield _Fetched(item, index, buffer, ())
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
        yield _Fetched(item, cell, out, views)


def _overlap(buffer: Array, index: Index, cell: Index) -> Array:
    """The part of `buffer`, which holds `index`, that lies in `cell`."""
    return buffer[_overlap_slices(index, cell)]


def _overlap_slices(inside: Index, other: Index) -> tuple[slice, ...]:
    """The overlap of two indices, in coordinates of the first."""
    return tuple([slice(max(a, c) - a, min(b, d) - a) for (a, b), (c, d) in zip(inside, other, strict=True)])


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised C-contiguous array whose memory starts at a multiple of 64 bytes.

    jax's CPU backend adopts such memory without a copy (512 MB: 2 ms instead of 640 ms).
    """
    size = dtype.itemsize
    for n in shape:
        size *= n
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def _verify(reading: _Reading, index: IndexDocument | None, where: str) -> None:
    """Checks what was read, and copies chunks that did not go straight into their places."""
    wrong = []
    for fetched in reading.fetched:
        array = fetched.item.spec.array
        assert array is not None
        if index is not None and (reason := index.check(array, fetched.index, fetched.out)) is not None:
            wrong.append(f"{fetched.item.key_path}, chunk {fetched.index}: {reason}")
        for view, inner in fetched.copies:
            view[...] = fetched.out[inner]
    if wrong:
        raise errors.CorruptCheckpointError(
            f"{where}: {len(wrong)} chunks differ from what was written:{errors.listing(wrong)}\n"
            "Restore another checkpoint, or a copy of this one; PyTreeRestore(partial_restore=True) can leave these leaves out."
        )


@paused_gc()
def _assemble(reading: _Reading, items: Sequence[RestoreItem]) -> Sequence[Any]:
    members = [items[i] for i in reading.batch.positions]
    handler = members[0].handler
    leaves = handler.assemble([item.spec for item in members], [item.request for item in members], reading.parts)
    if len(leaves) != len(members):
        raise errors.PluginError(f"{type(handler)}.assemble returned {len(leaves)} leaves for {len(members)}.")
    return leaves
