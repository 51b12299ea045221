"""jax.Array leaves under any sharding, typed PRNG keys among them: what is stored of them.

How their values come to the host is `_staging`'s affair, where they go when they are restored `_goals`'s.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ckptkit.grid import Array, ArraySpec, Index, chunk_indices, fit_chunk_shape, index_nbytes
from ckptkit.leaves._goals import assembled, goals_of, sharers_of
from ckptkit.leaves._keys import KEY_IMPL, is_key, raw
from ckptkit.leaves._shares import Shares, holding_processes
from ckptkit.leaves._staging import has_pinned_host, in_pinned_host, is_on_host, staged, stored_array
from ckptkit.leaves.base import ArrayRestoreArgs, Kinds, Leaf, LeafSpec, Problem, RestoreArgs, SaveArgs, TypeHandler
from ckptkit.metadata.sharding import ShardingMetadata, encode_sharding
from ckptkit.metadata.values import ArrayMetadata
from ckptkit.options import MAX_CHUNK_BYTE_SIZE, RestoreDefaults

if TYPE_CHECKING:
    from ckptkit.processes import Job

__all__ = ["JaxArrayHandler"]

_DEFAULT_ARGS = SaveArgs()

_MIN_SHARE_NBYTES = 1 << 20
"""Below this, an array that several processes hold is written by one of them."""


class JaxArrayHandler(TypeHandler[jax.Array]):
    """Arrays on devices. On the CPU backend staging is a view, which jax keeps valid through donation and deletion."""

    typestr = "jax.Array"
    orbax_typestr = "jax.Array"

    def __init__(self, *, pinned_host: bool = False) -> None:
        """Takes whether to stage by way of the devices' pinned host memory, where they have some."""
        self._pinned_host = pinned_host

    def through_pinned_host(self) -> JaxArrayHandler:
        return _through_pinned_host()

    def describe(self, leaves: Sequence[Leaf]) -> Sequence[LeafSpec | Problem]:
        problems = _problems([leaf.value for leaf in leaves])
        layouts: dict[Any, tuple[_Layout, Any]] = {}
        if not problems:
            return [_describe(leaf, layouts) for leaf in leaves]
        return [problems.get(i) or _describe(leaf, layouts) for i, leaf in enumerate(leaves)]

    def kinds(self, leaves: Sequence[jax.Array]) -> Kinds | None:
        if _problems(leaves):
            return None
        return _kinds(_Seen([leaf.aval for leaf in leaves], [leaf.sharding for leaf in leaves]))

    def owned(self, leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job) -> Sequence[Sequence[Index] | Problem]:
        shardings = {id(sharding): sharding for sharding in [leaf.value.sharding for leaf in leaves]}  # few, and slow to ask
        if job.others or not all(sharding.is_fully_addressable for sharding in shardings.values()):
            shares = Shares(job)
            return [shares.of(stored_array(spec), raw(leaf.value).sharding) for leaf, spec in zip(leaves, specs, strict=True)]
        known: dict[Any, Sequence[Index]] = {}
        owned = []
        for spec in specs:
            array = stored_array(spec)
            key = array[1:]
            if (cells := known.get(key)) is None:
                cells = known[key] = list(chunk_indices(array))
            owned.append(cells)
        return owned

    def staged_nbytes(self, pieces: Sequence[tuple[jax.Array, LeafSpec, Index]]) -> Sequence[int]:
        is_view = self._viewed()
        return [0 if is_view(leaf, spec) else index_nbytes(spec.array, index) for leaf, spec, index in pieces if spec.array]

    def stage(self, pieces: Sequence[tuple[jax.Array, LeafSpec, Index]]) -> Sequence[Array]:
        pinned: dict[int, jax.Array] = {}
        if self._pinned_host:
            pinned = {i: in_pinned_host(raw(leaf), index) for i, (leaf, _, index) in enumerate(pieces) if self._pins(leaf)}
        return staged(pieces, pinned)

    def _pins(self, leaf: jax.Array) -> bool:
        return self._pinned_host and has_pinned_host(leaf.sharding)

    def _viewed(self) -> Callable[[jax.Array, LeafSpec], bool]:
        """A function that tells whether staging a leaf hands out jax's own memory: on the CPU, where no cast is asked for."""
        known: dict[Any, bool] = {}

        def is_view(leaf: jax.Array, spec: LeafSpec) -> bool:
            sharding = leaf.sharding
            key = (id(sharding), leaf.dtype, spec.array and spec.array.dtype)
            if (view := known.get(key)) is None:
                plain = not is_key(leaf) and spec.array is not None and spec.array.dtype == leaf.dtype
                on_host = is_on_host(leaf) and leaf.dtype.name not in ("int4", "uint4", "int2", "uint2")
                view = known[key] = plain and on_host and not self._pins(leaf)
            return view

        return is_view

    def request(self, target: Any, spec: LeafSpec, defaults: RestoreDefaults) -> RestoreArgs:
        if isinstance(target, ArrayMetadata) and KEY_IMPL in spec.extra:
            target = None  # it tells of the keys' data only
        sharding = None if target is None else target.sharding
        if isinstance(sharding, ShardingMetadata):  # what `metadata()` returned is a target too, on the saved sharding
            sharding = None
        if sharding is None and defaults.devices is not None and spec.typestr == self.typestr:
            if defaults.devices == "numpy":
                return RestoreArgs(restore_type=np.ndarray, dtype=target and target.dtype, target=target, defaults=defaults)
            sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if target is None:
            return ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding, strict=defaults.strict, defaults=defaults)
        if defaults.support_layout and sharding is not None:
            sharding = getattr(target, "format", None) or sharding
        placed = sharding is not None or spec.sharding or (defaults.fallback_sharding and spec.typestr == self.typestr)
        restore_type = jax.Array if placed or isinstance(target, jax.Array) else np.ndarray
        return ArrayRestoreArgs(
            restore_type=restore_type,
            dtype=target.dtype,
            sharding=sharding,
            global_shape=tuple(target.shape),
            strict=defaults.strict,
            target=target,
            defaults=defaults,
        )

    def needs(self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job) -> Sequence[Sequence[Index] | Problem]:
        goals = goals_of(specs, requests)
        return [goal if isinstance(goal, Problem) else goal.needs for goal in goals]

    def sharers(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job
    ) -> Sequence[Mapping[Index, tuple[int, ...]]]:
        goals = goals_of(specs, requests)  # leaves of which everything is alike share one
        known: dict[int, Mapping[Index, tuple[int, ...]]] = {}
        shared = []
        for spec, goal in zip(specs, goals, strict=True):
            if id(goal) not in known:
                known[id(goal)] = {} if isinstance(goal, Problem) else sharers_of(goal, stored_array(spec).shape, job)
            shared.append(known[id(goal)])
        return shared

    def assemble(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], parts: Sequence[Mapping[Index, Array]]
    ) -> Sequence[jax.Array]:
        return [assembled(*leaf) for leaf in zip(specs, goals_of(specs, requests), parts, strict=True)]


class _Seen(NamedTuple):
    """What tells of which kind arrays are; training gives the same objects for the next step's arrays."""

    avals: Sequence[Any]
    shardings: Sequence[jax.sharding.Sharding]

    def is_same(self, other: _Seen) -> bool:
        """Whether both saw the same objects."""
        if len(self.avals) != len(other.avals):
            return False
        return all(map(operator.is_, self.avals, other.avals)) and all(map(operator.is_, self.shardings, other.shardings))

    def kinds(self) -> Kinds:
        """The kinds, by identity at first: arrays share a few objects, but jit gives each that it returns an equal sharding."""
        avals = dict(zip(map(id, self.avals), self.avals, strict=True))
        shardings = dict(zip(map(id, self.shardings), self.shardings, strict=True))
        numbers: dict[Any, int] = {}
        by_ids = dict.fromkeys(self._ids(), 0)
        for aval_id, sharding_id in by_ids:
            aval = avals[aval_id]
            kind = (aval.shape, aval.dtype, shardings[sharding_id])
            by_ids[aval_id, sharding_id] = numbers.setdefault(kind, len(numbers))
        return Kinds(tuple(map(by_ids.__getitem__, self._ids())), tuple(numbers))

    def _ids(self) -> Iterator[tuple[int, int]]:
        return zip(map(id, self.avals), map(id, self.shardings), strict=True)


_known: tuple[tuple[_Seen, Kinds], ...] = ()
"""What was seen of the last trees, the last one first."""


def _kinds(seen: _Seen) -> Kinds:
    global _known  # noqa: PLW0603 - replaced as a whole, so that no lock is needed
    for before, kinds in _known:
        if before.is_same(seen):
            return kinds
    kinds = seen.kinds()
    _known = ((seen, kinds), *_known[:3])
    return kinds


class _Layout(NamedTuple):
    """What every array of one shape, dtype and sharding has in common."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    sharding: Mapping[str, Any] | None
    extra: Mapping[str, Any]


def _problems(values: Sequence[Any]) -> Mapping[int, Problem]:
    """What is wrong, by position. Where nothing is, a question to all of them tells; asking 10,000 one by one takes long."""
    kinds = set(map(type, values))
    arrays = all(issubclass(kind, jax.Array) and not issubclass(kind, jax.core.Tracer) for kind in kinds)
    if arrays and not any([value.is_deleted() for value in values]):  # noqa: C419 - half of the time
        return {}
    return {i: problem for i, value in enumerate(values) if (problem := _problem(value))}


def _problem(value: Any) -> Problem | None:
    if isinstance(value, jax.core.Tracer):
        return Problem("a traced value has no data; save outside of jit, grad and vmap.")
    if not isinstance(value, jax.Array):
        return Problem(f"a {type(value).__name__} describes an array but holds no data; it is a target for restore.")
    if value.is_deleted():
        return Problem("the array was deleted or donated; save before the call that donates it.")
    return None


def _describe(leaf: Leaf, layouts: dict[Any, tuple[_Layout, Any]]) -> LeafSpec:
    value = leaf.value
    sharding = value.sharding  # of an array of keys a new object every time, which the entry keeps, so that its id stays its own
    key = (value.shape, value.dtype, id(sharding), id(leaf.save_args))
    if (known := layouts.get(key)) is None:
        known = layouts[key] = _layout(value, leaf.save_args or _DEFAULT_ARGS), sharding
    layout, _ = known
    array = ArraySpec(leaf.name, layout.shape, layout.dtype, layout.chunk_shape)
    return LeafSpec("jax.Array", array, sharding=layout.sharding, extra=layout.extra)


def _layout(value: jax.Array, args: SaveArgs) -> _Layout:
    stored = raw(value)
    extra = {KEY_IMPL: str(jax.random.key_impl(value))} if is_key(value) else {}
    dtype = np.dtype(stored.dtype if args.dtype is None or extra else args.dtype)
    shard = stored.sharding.shard_shape(stored.shape)
    limit = args.chunk_byte_size or _max_chunk_nbytes(stored, shard)
    cell = fit_chunk_shape(stored.shape, dtype.itemsize, limit, args.shard_axes, shard)
    return _Layout(stored.shape, dtype, cell, encode_sharding(value.sharding), {"write_shape": list(shard), **extra})


def _max_chunk_nbytes(value: jax.Array, shard: tuple[int, ...]) -> int:
    """Smaller where several processes hold the same, so that each has something to write of it."""
    processes = holding_processes(value.sharding, value.shape)
    if processes == 1:
        return MAX_CHUNK_BYTE_SIZE
    return min(MAX_CHUNK_BYTE_SIZE, max(_MIN_SHARE_NBYTES, math.prod(shard) * value.dtype.itemsize // processes))


@functools.cache
def _through_pinned_host() -> JaxArrayHandler:
    """One for all, since plans are kept by type handler."""
    return JaxArrayHandler(pinned_host=True)
