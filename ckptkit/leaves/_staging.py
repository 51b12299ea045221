"""From devices to the host: cells of the grid as numpy arrays, straight or by way of pinned host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ckptkit import errors
from ckptkit.grid import Array, ArraySpec, Index, index_shape
from ckptkit.leaves._keys import raw
from ckptkit.leaves._shares import local_bounds
from ckptkit.leaves.base import LeafSpec

__all__ = ["has_pinned_host", "in_pinned_host", "is_on_host", "staged", "stored_array"]

_PINNED_HOST = "pinned_host"


def staged(pieces: Sequence[tuple[jax.Array, LeafSpec, Index]], pinned: Mapping[int, jax.Array]) -> list[Array]:
    """The values of cells, C-contiguous and of the dtypes that are stored; `pinned` are in pinned memory, by their position."""
    firsts = {id(piece[1]): piece for piece in pieces}  # leaves that share a spec are alike
    kinds = {number: (leaf, stored_array(spec)) for number, (leaf, spec, _) in firsts.items()}
    _start_transfers(pieces, pinned, {number for number, (leaf, _) in kinds.items() if not is_on_host(leaf)})
    if not pinned and all(array.chunk_shape == leaf.shape and array.dtype == leaf.dtype for leaf, array in kinds.values()):
        found = [np.asarray(leaf) for leaf, _, _ in pieces]  # what a training mostly saves, without a question to each
    else:
        found = _cut_and_cast(pieces, pinned)
    return [data if data.flags.c_contiguous else np.ascontiguousarray(data) for data in found]


def is_on_host(leaf: jax.Array) -> bool:
    """Whether an array's devices are the CPU's, so that there is nothing to copy to the host."""
    device: Any = next(iter(leaf.sharding.device_set))
    on_host: bool = device.platform == "cpu"
    return on_host


def _start_transfers(
    pieces: Sequence[tuple[jax.Array, LeafSpec, Index]], pinned: Mapping[int, jax.Array], away: set[int]
) -> None:
    """Starts to copy the leaves whose specs are `away` to the host, so that the transfers of a batch overlap."""
    if away:
        for i, (leaf, spec, _) in enumerate(pieces):
            if i not in pinned and id(spec) in away:
                raw(leaf).copy_to_host_async()


def _cut_and_cast(pieces: Sequence[tuple[jax.Array, LeafSpec, Index]], pinned: Mapping[int, jax.Array]) -> list[Array]:
    """Cells of any leaves, each cast as soon as it is there; those that are in pinned memory already, by their position."""
    cutters: dict[int, Callable[[Index], Array]] = {}
    found = []
    for i, (leaf, spec, index) in enumerate(pieces):
        array = stored_array(spec)
        if i in pinned:
            data = np.asarray(pinned[i])
        elif array.chunk_shape == leaf.shape:  # so of one shard; a key's data has an axis more than the key
            data = np.asarray(leaf)
        else:
            if (cut := cutters.get(id(leaf))) is None:
                cut = cutters[id(leaf)] = _cutter(raw(leaf))
            data = cut(index)
        found.append(data if data.dtype == array.dtype else data.astype(array.dtype))
    return found


def stored_array(spec: LeafSpec) -> ArraySpec:
    """What is stored of a jax.Array, which always is an array."""
    assert spec.array is not None
    return spec.array


@functools.lru_cache
def has_pinned_host(sharding: jax.sharding.Sharding) -> bool:
    """Whether arrays of a sharding lie elsewhere, on devices that have pinned host memory."""
    devices: Any = sharding.addressable_devices
    kinds = {memory.kind for device in devices for memory in device.addressable_memories()}
    return _PINNED_HOST in kinds and sharding.memory_kind != _PINNED_HOST


def in_pinned_host(value: jax.Array, index: Index) -> jax.Array:
    """A cell of the grid in pinned host memory, on its way there; cut out on the device, so that no more is copied."""
    shard, inner = _holder(value)(index)
    if shard.shape != index_shape(index):
        # Not by indexing, which compiles anew for every place.
        shard = jax.lax.dynamic_slice(shard, [each.start for each in inner], index_shape(index))
    pinned: jax.Array = jax.device_put(shard, shard.sharding.with_memory_kind(_PINNED_HOST))
    return pinned


def _cutter(value: jax.Array) -> Callable[[Index], Array]:
    """A function from a cell of the grid to its values, from whichever local shard holds it."""
    holder = _holder(value)

    def cut(index: Index) -> Array:
        shard, inner = holder(index)
        return np.asarray(shard)[inner]

    return cut


def _holder(value: jax.Array) -> Callable[[Index], tuple[jax.Array, tuple[slice, ...]]]:
    """A function from a cell of the grid to a local shard that holds it, and where it is in there."""
    if len(value.sharding.device_set) == 1:
        return lambda index: (value, _slices(index))
    bounds = local_bounds(value.sharding, value.shape)
    shards = {bounds[shard.device]: shard.data for shard in value.addressable_shards}

    def hold(index: Index) -> tuple[jax.Array, tuple[slice, ...]]:
        if (whole_shard := shards.get(index)) is not None:  # as a rule; to compare bounds takes as long as all the rest
            return whole_shard, (slice(None),) * len(index)
        for outer, data in shards.items():
            if all(a <= start and stop <= b for (a, b), (start, stop) in zip(outer, index, strict=True)):
                return data, _slices([(start - a, stop - a) for (a, _), (start, stop) in zip(outer, index, strict=True)])
        raise errors.TreeError(f"no local shard of a jax.Array holds {index}")

    return hold


def _slices(index: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple([slice(start, stop) for start, stop in index])
