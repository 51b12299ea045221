"""jax.Array leaves under any sharding, typed PRNG keys among them.

A typed key is stored as its raw key data (uint32, the implementation's key shape behind the key's own) with the name
of its implementation, as Orbax stores it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckptkit import errors
from ckptkit.grid import Array, ArraySpec, Index, chunk_indices, fit_chunk_shape, index_nbytes, index_shape
from ckptkit.leaves._requests import Wanted, clip, fit, resolve
from ckptkit.leaves._shares import Shares, holders, holding_processes
from ckptkit.leaves.base import ArrayRestoreArgs, Kinds, Leaf, LeafSpec, Problem, RestoreArgs, SaveArgs, TypeHandler
from ckptkit.metadata.sharding import ShardingMetadata, encode_sharding, to_jax
from ckptkit.metadata.values import ArrayMetadata
from ckptkit.options import MAX_CHUNK_BYTE_SIZE, RestoreDefaults

if TYPE_CHECKING:
    from ckptkit.processes import Job

__all__ = ["JaxArrayHandler"]

_KEY_IMPL = "random_key_impl"
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
        numbers: dict[Any, int] = {}
        shardings = [leaf.sharding for leaf in leaves]
        # By identity, since to hash a sharding takes longer than all the rest, and arrays of a tree share a few of them.
        kinds = zip([leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves], map(id, shardings), strict=True)
        numbered = tuple([numbers.setdefault(kind, len(numbers)) for kind in kinds])
        by_id = dict(zip(map(id, shardings), shardings, strict=True))
        return Kinds(numbered, tuple([(shape, dtype, by_id[number]) for shape, dtype, number in numbers]))

    def owned(self, leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job) -> Sequence[Sequence[Index] | Problem]:
        shardings = {id(sharding): sharding for sharding in [leaf.value.sharding for leaf in leaves]}  # few, and slow to ask
        if job.others or not all(sharding.is_fully_addressable for sharding in shardings.values()):
            shares = Shares(job)
            return [shares.of(_stored_array(spec), _raw(leaf.value).sharding) for leaf, spec in zip(leaves, specs, strict=True)]
        known: dict[Any, Sequence[Index]] = {}
        owned = []
        for spec in specs:
            array = _stored_array(spec)
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
            pinned = {i: _in_pinned_host(_raw(leaf), index) for i, (leaf, _, index) in enumerate(pieces) if self._pins(leaf)}
        _start_transfers([leaf for i, (leaf, _, _) in enumerate(pieces) if i not in pinned])
        kinds = {id(spec): (leaf, _stored_array(spec)) for leaf, spec, _ in pieces}  # the leaves of a kind share one spec
        if not pinned and all(array.chunk_shape == leaf.shape and array.dtype == leaf.dtype for leaf, array in kinds.values()):
            staged = [np.asarray(leaf) for leaf, _, _ in pieces]  # what a training mostly saves, without a question to each
        else:
            staged = _staged(pieces, pinned)
        return [data if data.flags.c_contiguous else np.ascontiguousarray(data) for data in staged]

    def _pins(self, leaf: jax.Array) -> bool:
        return self._pinned_host and _has_pinned_host(leaf.sharding)

    def _viewed(self) -> Callable[[jax.Array, LeafSpec], bool]:
        """A function that tells whether staging a leaf hands out jax's own memory: on the CPU, where no cast is asked for."""
        known: dict[Any, bool] = {}

        def is_view(leaf: jax.Array, spec: LeafSpec) -> bool:
            sharding = leaf.sharding
            key = (id(sharding), leaf.dtype, spec.array and spec.array.dtype)
            if (view := known.get(key)) is None:
                device: Any = next(iter(sharding.device_set))
                plain = not _is_key(leaf) and spec.array is not None and spec.array.dtype == leaf.dtype
                on_host = device.platform == "cpu" and leaf.dtype.name not in ("int4", "uint4", "int2", "uint2")
                view = known[key] = plain and on_host and not self._pins(leaf)
            return view

        return is_view

    def request(self, target: Any, spec: LeafSpec, defaults: RestoreDefaults) -> RestoreArgs:
        if isinstance(target, ArrayMetadata) and _KEY_IMPL in spec.extra:
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
        goals = _goals(specs, requests)
        return [goal if isinstance(goal, Problem) else goal.needs for goal in goals]

    def sharers(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job
    ) -> Sequence[Mapping[Index, tuple[int, ...]]]:
        goals = _goals(specs, requests)  # leaves of which everything is alike share one
        known: dict[int, Mapping[Index, tuple[int, ...]]] = {}
        shared = []
        for spec, goal in zip(specs, goals, strict=True):
            if id(goal) not in known:
                known[id(goal)] = {} if isinstance(goal, Problem) else _sharers(goal, _stored_array(spec).shape, job)
            shared.append(known[id(goal)])
        return shared

    def assemble(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], parts: Sequence[Mapping[Index, Array]]
    ) -> Sequence[jax.Array]:
        return [_assemble(*leaf) for leaf in zip(specs, _goals(specs, requests), parts, strict=True)]


def _stored_array(spec: LeafSpec) -> ArraySpec:
    assert spec.array is not None
    return spec.array


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
    raw = _raw(value)
    extra = {_KEY_IMPL: str(jax.random.key_impl(value))} if _is_key(value) else {}
    dtype = np.dtype(raw.dtype if args.dtype is None or extra else args.dtype)
    shard = raw.sharding.shard_shape(raw.shape)
    cell = fit_chunk_shape(shard, dtype.itemsize, args.chunk_byte_size or _max_chunk_nbytes(raw, shard), args.shard_axes)
    return _Layout(raw.shape, dtype, cell, encode_sharding(value.sharding), {"write_shape": list(shard), **extra})


def _max_chunk_nbytes(value: jax.Array, shard: tuple[int, ...]) -> int:
    """Smaller where several processes hold the same, so that each has something to write of it."""
    processes = holding_processes(value.sharding, value.shape)
    if processes == 1:
        return MAX_CHUNK_BYTE_SIZE
    return min(MAX_CHUNK_BYTE_SIZE, max(_MIN_SHARE_NBYTES, math.prod(shard) * value.dtype.itemsize // processes))


def _is_key(value: Any) -> bool:
    """Whether a jax.Array holds typed PRNG keys, the one kind whose dtype is not numpy's."""
    return not isinstance(value.dtype, np.dtype)


def _raw(value: jax.Array) -> jax.Array:
    return jax.random.key_data(value) if _is_key(value) else value


def _start_transfers(values: Sequence[jax.Array]) -> None:
    """Starts to copy arrays to the host, so that the transfers of a batch overlap; on the CPU there is nothing to copy."""
    shardings: dict[int, Any] = {id(sharding): sharding for sharding in [value.sharding for value in values]}
    away = {number for number, sharding in shardings.items() if next(iter(sharding.device_set)).platform != "cpu"}
    if away:
        for value in values:
            if id(value.sharding) in away:
                _raw(value).copy_to_host_async()


def _staged(pieces: Sequence[tuple[jax.Array, LeafSpec, Index]], pinned: Mapping[int, jax.Array]) -> list[Array]:
    """Cells of any leaves, each cast as soon as it is there; those that are in pinned memory already, by their position."""
    cutters: dict[int, Callable[[Index], Array]] = {}
    staged = []
    for i, (leaf, spec, index) in enumerate(pieces):
        array = _stored_array(spec)
        if i in pinned:
            data = np.asarray(pinned[i])
        elif array.chunk_shape == leaf.shape:  # so of one shard; a key's data has an axis more than the key
            data = np.asarray(leaf)
        else:
            if (cut := cutters.get(id(leaf))) is None:
                cut = cutters[id(leaf)] = _cutter(_raw(leaf))
            data = cut(index)
        staged.append(data if data.dtype == array.dtype else data.astype(array.dtype))
    return staged


_PINNED_HOST = "pinned_host"


@functools.cache
def _through_pinned_host() -> JaxArrayHandler:
    """One for all, since plans are kept by type handler."""
    return JaxArrayHandler(pinned_host=True)


@functools.lru_cache
def _has_pinned_host(sharding: jax.sharding.Sharding) -> bool:
    """Whether arrays of a sharding lie elsewhere, on devices that have pinned host memory."""
    devices: Any = sharding.addressable_devices
    kinds = {memory.kind for device in devices for memory in device.addressable_memories()}
    return _PINNED_HOST in kinds and sharding.memory_kind != _PINNED_HOST


def _in_pinned_host(value: jax.Array, index: Index) -> jax.Array:
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
    bounds = _local_bounds(value.sharding, value.shape)
    shards = {bounds[shard.device]: shard.data for shard in value.addressable_shards}

    def hold(index: Index) -> tuple[jax.Array, tuple[slice, ...]]:
        if (whole_shard := shards.get(index)) is not None:  # as a rule; to compare bounds takes as long as all the rest
            return whole_shard, (slice(None),) * len(index)
        for outer, data in shards.items():
            if all(a <= start and stop <= b for (a, b), (start, stop) in zip(outer, index, strict=True)):
                return data, _slices([(start - a, stop - a) for (a, _), (start, stop) in zip(outer, index, strict=True)])
        raise errors.TreeError(f"no local shard of a jax.Array holds {index}")

    return hold


@functools.lru_cache(maxsize=256)
def _local_bounds(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> Mapping[Any, Index]:
    """The part of an array that each device of this process holds."""
    return {device: _bounds(slices, shape) for device, slices in sharding.addressable_devices_indices_map(shape).items()}


def _slices(index: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple([slice(start, stop) for start, stop in index])


def _bounds(slices: Sequence[slice[Any, Any, Any]] | None, shape: Sequence[int]) -> Index:
    return tuple([s.indices(n)[:2] for s, n in zip(slices or (), shape, strict=True)])


class _Goal(NamedTuple):
    """Where a restored array goes.

    Attributes:
      wanted: the raw array: for a typed key, its key data.
      sharding: of the raw array.
      layout: a `Format` to move the finished array into, or None.
      key_impl: the implementation of the typed key that it becomes, or None.
      needs: the parts of the stored array that this process's devices hold.
    """

    wanted: Wanted
    sharding: jax.sharding.Sharding
    layout: Any
    key_impl: str | None
    needs: tuple[Index, ...]


def _goals(specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs]) -> list[_Goal | Problem]:
    """The goal of each leaf; leaves of which everything is alike share one."""
    known: dict[Any, _Goal | Problem] = {}
    goals = []
    for spec, request in zip(specs, requests, strict=True):
        stored = spec.array and (spec.array.shape, spec.array.dtype)
        key: tuple[Any, ...] = (stored, id(spec.sharding), repr(spec.extra.get(_KEY_IMPL)), request.dtype, id(request.defaults))
        if isinstance(request, ArrayRestoreArgs):
            key += (request.global_shape, request.shape, id(request.sharding))
            key += (id(request.mesh), request.mesh_axes, request.strict)
        if (goal := known.get(key)) is None:
            goal = known[key] = _goal(spec, request)
        goals.append(goal)
    return goals


def _goal(spec: LeafSpec, request: RestoreArgs) -> _Goal | Problem:
    args = request if isinstance(request, ArrayRestoreArgs) else None
    shape = None if args is None else args.shape if args.global_shape is None else args.global_shape
    key_impl = _wanted_key(spec, request)
    if isinstance(key_impl, Problem):
        return key_impl
    if key_impl is not None:
        request = RestoreArgs(restore_type=jax.Array, target=request.target, defaults=request.defaults)
        shape = None if shape is None or spec.array is None else (*shape, *spec.array.shape[-1:])
    wanted = resolve(spec, request, shape, strict=args.strict if args else request.defaults.strict)
    if isinstance(wanted, Problem):
        return wanted
    if (narrowed := jax.dtypes.canonicalize_dtype(wanted.dtype)) != wanted.dtype:
        return Problem(
            f"{wanted.dtype} would become {narrowed}, since jax_enable_x64 is off; enable it, restore into np.ndarray, or give a "
            f"target of dtype {narrowed}."
        )
    sharding = _sharding(spec, args, request.defaults)
    if isinstance(sharding, Problem):
        return sharding
    layout = None if isinstance(sharding, jax.sharding.Sharding) else sharding
    sharding = sharding if layout is None else layout.sharding
    try:
        needs = _local_needs(sharding, wanted.shape, spec.array.shape if spec.array else ())
    except ValueError as error:  # jax checks that a sharding divides the shape
        return Problem(f"shape {wanted.shape} cannot be laid out as {sharding}: {error}")
    return _Goal(wanted, sharding, layout, key_impl, needs)


def _wanted_key(spec: LeafSpec, request: RestoreArgs) -> str | Problem | None:
    """The implementation of the typed key to make; None for a plain array."""
    stored, dtype = spec.extra.get(_KEY_IMPL), request.dtype
    if dtype is not None and not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    if stored is not None and not (isinstance(stored, str) and _is_key_data(spec.array, stored)):
        return Problem(f"recorded as a PRNG key of implementation {stored!r:.80}, of which what is stored here is not the data.")
    if dtype is None:
        return stored
    for impl in dict.fromkeys([stored or _KEY_IMPLS[0], *_KEY_IMPLS]):
        made = _abstract_key(impl)
        if made is not None and made.dtype == dtype and stored in (None, impl):
            return impl if stored or _is_key_data(spec.array, impl) else _NO_KEY_DATA
    return Problem(f"a PRNG key of implementation {stored!r} is stored, one of dtype {dtype} was requested.")


_KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


_NO_KEY_DATA = Problem("a PRNG key was requested, but what is stored here is not the data of one; ask for an array.")


@functools.lru_cache
def _abstract_key(impl: str) -> Any:
    """A typed key of an implementation, without its data; None for one that jax does not know."""
    try:
        return jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    except ValueError:
        return None


def _is_key_data(array: ArraySpec | None, impl: str) -> bool:
    """Whether a stored array can be wrapped as typed keys of an implementation, which jax may not know."""
    if _abstract_key(impl) is None:
        return False
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
    return array is not None and array.dtype == data.dtype and array.shape[-1:] == data.shape


def _sharding(spec: LeafSpec, args: ArrayRestoreArgs | None, defaults: RestoreDefaults) -> Any:
    """The requested sharding, else the saved one, else the fallback."""
    if args is not None and args.sharding is not None:
        return args.sharding.to_jax_sharding() if isinstance(args.sharding, ShardingMetadata) else args.sharding
    if args is not None and args.mesh is not None:
        axes: Any = jax.sharding.PartitionSpec
        return jax.sharding.NamedSharding(args.mesh, args.mesh_axes or axes())
    if spec.sharding is None:
        return defaults.fallback_sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        return to_jax(spec.sharding)
    except errors.TopologyError as error:
        return defaults.fallback_sharding or Problem(str(error), topology=True)


def _local_needs(sharding: jax.sharding.Sharding, shape: tuple[int, ...], stored: tuple[int, ...]) -> tuple[Index, ...]:
    """The parts of the stored array for each of this process's devices, each once."""
    return tuple(dict.fromkeys(clip(bounds, stored) for bounds in _local_bounds(sharding, shape).values()))


def _sharers(goal: _Goal, stored: tuple[int, ...], job: Job) -> Mapping[Index, tuple[int, ...]]:
    """The parts of the stored array that several processes of the job need, and which do."""
    found: dict[Index, set[int]] = {}
    for part, processes in holders(goal.sharding, goal.wanted.shape).items():
        found.setdefault(clip(part, stored), set()).update(process for process in processes if process in job.processes)
    return {part: tuple(sorted(processes)) for part, processes in found.items() if len(processes) > 1}


def _assemble(spec: LeafSpec, goal: _Goal | Problem, parts: Mapping[Index, Array]) -> jax.Array:
    assert isinstance(goal, _Goal)
    wanted, shape = goal.wanted, goal.wanted.shape
    assert spec.array is not None
    if len(parts) == 1 and wanted.dtype == spec.array.dtype and not wanted.resized:
        (whole_array,) = parts.values()
        if whole_array.shape == shape:
            # Its memory is aligned and never written again, so that the CPU backend adopts it without a copy.
            array = jax.make_array_from_callback(shape, goal.sharding, lambda _: whole_array)
            return _finished(array, goal)
    array = jax.make_array_from_callback(shape, goal.sharding, lambda index: fit(spec, wanted, _bounds(index, shape), parts))
    return _finished(array, goal)


def _finished(array: jax.Array, goal: _Goal) -> jax.Array:
    if goal.layout is not None:
        array = jax.device_put(array, goal.layout)
    return array if goal.key_impl is None else jax.random.wrap_key_data(array, impl=goal.key_impl)
