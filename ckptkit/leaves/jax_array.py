"""jax.Array leaves under any sharding, typed PRNG keys among them.

A typed key is stored as its raw key data (uint32, the implementation's key shape behind the key's own) with the name
of its implementation, as Orbax stores it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ckptkit import errors
from ckptkit.grid import Array, ArraySpec, Index, chunk_indices, fit_chunk_shape
from ckptkit.leaves._requests import Wanted, clip, fit, resolve
from ckptkit.leaves.base import ArrayRestoreArgs, Leaf, LeafSpec, Problem, RestoreArgs, SaveArgs, TypeHandler
from ckptkit.metadata.sharding import encode_sharding, to_jax
from ckptkit.options import MAX_CHUNK_BYTE_SIZE, RestoreDefaults

if TYPE_CHECKING:
    from ckptkit.processes import Job

__all__ = ["JaxArrayHandler"]

_KEY_IMPL = "random_key_impl"
_DEFAULT_ARGS = SaveArgs()


class JaxArrayHandler(TypeHandler[jax.Array]):
    """Arrays on devices. On the CPU backend staging is a view, which jax keeps valid through donation and deletion."""

    typestr = "jax.Array"
    orbax_typestr = "jax.Array"

    def describe(self, leaves: Sequence[Leaf]) -> Sequence[LeafSpec | Problem]:
        layouts: dict[Any, _Layout] = {}
        return [_problem(leaf.value) or _describe(leaf, layouts) for leaf in leaves]

    def owned(self, leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job) -> Sequence[Sequence[Index]]:
        known: dict[Any, Sequence[Index]] = {}
        owned = []
        for leaf, spec in zip(leaves, specs, strict=True):
            assert spec.array is not None
            key = (spec.array.shape, spec.array.chunk_shape, leaf.value.sharding)
            if (cells := known.get(key)) is None:
                cells = known[key] = list(chunk_indices(spec.array))
            owned.append(cells)
        return owned

    def staged_nbytes(self, leaf: jax.Array, spec: LeafSpec, index: Index) -> int:
        return 0 if _is_view(leaf, spec) else super().staged_nbytes(leaf, spec, index)

    def stage(self, pieces: Sequence[tuple[jax.Array, LeafSpec, Index]]) -> Sequence[Array]:
        if len(pieces) > 1:
            for leaf, spec, _ in pieces:
                if not _is_view(leaf, spec):
                    _raw(leaf).copy_to_host_async()  # so that the transfers of a batch overlap
        shards: dict[int, Callable[[Index], Array]] = {}
        staged = []
        for leaf, spec, index in pieces:
            if (cut := shards.get(id(leaf))) is None:
                cut = shards[id(leaf)] = _cutter(_raw(leaf))
            data = cut(index)
            assert spec.array is not None
            staged.append(data if data.dtype == spec.array.dtype else data.astype(spec.array.dtype))
        return staged

    def request(self, target: Any, spec: LeafSpec, defaults: RestoreDefaults) -> RestoreArgs:
        if target is None:
            return ArrayRestoreArgs(restore_type=jax.Array, strict=defaults.strict, defaults=defaults)
        sharding = getattr(target, "sharding", None)
        if hasattr(sharding, "to_jax_sharding"):  # what `metadata()` returned is a target too
            sharding = None
        if defaults.support_layout:
            sharding = getattr(target, "format", None) or sharding
        restore_type = np.ndarray if sharding is None and not spec.sharding and defaults.fallback_sharding is None else jax.Array
        if isinstance(target, jax.Array):
            restore_type = jax.Array
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
        known: dict[Any, tuple[Index, ...]] = {}
        needed: list[Sequence[Index] | Problem] = []
        for spec, request in zip(specs, requests, strict=True):
            goal = _goal(spec, request)
            if isinstance(goal, Problem):
                needed.append(goal)
                continue
            assert spec.array is not None
            key = (goal.sharding, goal.wanted.shape, spec.array.shape)
            if (indices := known.get(key)) is None:
                indices = known[key] = tuple(dict.fromkeys(clip(i, spec.array.shape) for i in _local_indices(goal)))
            needed.append(indices)
        return needed

    def assemble(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], parts: Sequence[Mapping[Index, Array]]
    ) -> Sequence[jax.Array]:
        return [_assemble(*leaf) for leaf in zip(specs, requests, parts, strict=True)]


class _Layout(NamedTuple):
    """What every array of one shape, dtype and sharding has in common."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...]
    sharding: Mapping[str, Any] | None
    extra: Mapping[str, Any]


def _problem(value: Any) -> Problem | None:
    if isinstance(value, jax.core.Tracer):
        return Problem("a traced value has no data; save outside of jit, grad and vmap.")
    if not isinstance(value, jax.Array):
        return Problem(f"a {type(value).__name__} describes an array but holds no data; it is a target for restore.")
    if value.is_deleted():
        return Problem("the array was deleted or donated; save before the call that donates it.")
    if not value.is_fully_addressable:
        return Problem("the array spans devices of other processes; this version saves the arrays of one process.")
    return None


def _describe(leaf: Leaf, layouts: dict[Any, _Layout]) -> LeafSpec:
    value, args = leaf.value, leaf.save_args or _DEFAULT_ARGS
    key = (value.shape, value.dtype, value.sharding, args.dtype, args.chunk_byte_size, args.shard_axes)
    if (layout := layouts.get(key)) is None:
        layout = layouts[key] = _layout(value, args)
    array = ArraySpec(leaf.name, layout.shape, layout.dtype, layout.chunk_shape)
    return LeafSpec("jax.Array", array, sharding=layout.sharding, extra=layout.extra)


def _layout(value: jax.Array, args: SaveArgs) -> _Layout:
    raw = _raw(value)
    extra = {_KEY_IMPL: str(jax.random.key_impl(value))} if _is_key(value) else {}
    dtype = np.dtype(raw.dtype if args.dtype is None or extra else args.dtype)
    shard = raw.sharding.shard_shape(raw.shape)
    cell = fit_chunk_shape(shard, dtype.itemsize, args.chunk_byte_size or MAX_CHUNK_BYTE_SIZE, args.shard_axes)
    return _Layout(raw.shape, dtype, cell, encode_sharding(value.sharding), {"write_shape": list(shard), **extra})


def _is_key(value: Any) -> bool:
    return bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key))


def _raw(value: jax.Array) -> jax.Array:
    return jax.random.key_data(value) if _is_key(value) else value


_VIEWED_BITS = frozenset("biufc")


def _is_view(leaf: jax.Array, spec: LeafSpec) -> bool:
    """Whether staging hands out jax's own memory: on the CPU, where no cast is asked for."""
    if _is_key(leaf) or spec.array is None or spec.array.dtype != leaf.dtype:
        return False
    device: Any = next(iter(leaf.sharding.device_set))
    return device.platform == "cpu" and spec.array.dtype.name not in ("int4", "uint4", "int2", "uint2")


def _cutter(value: jax.Array) -> Callable[[Index], Array]:
    """A function from a cell of the grid to its values, from whichever local shard holds it."""
    if len(value.sharding.device_set) == 1:
        host = np.asarray(value)
        return lambda index: np.ascontiguousarray(host[_slices(index)]).reshape(tuple(b - a for a, b in index))
    shards = [(_bounds(shard.index, value.shape), shard.data) for shard in value.addressable_shards]

    def cut(index: Index) -> Array:
        for bounds, data in shards:
            if all(a <= start and stop <= b for (a, b), (start, stop) in zip(bounds, index, strict=True)):
                inner = tuple(slice(start - a, stop - a) for (a, _), (start, stop) in zip(bounds, index, strict=True))
                return np.ascontiguousarray(np.asarray(data)[inner]).reshape(tuple(b - a for a, b in index))
        raise errors.TreeError(f"no local shard of a jax.Array holds {index}")

    return cut


def _slices(index: Index) -> tuple[slice, ...]:
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
    """

    wanted: Wanted
    sharding: jax.sharding.Sharding
    layout: Any
    key_impl: str | None


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
    if isinstance(sharding, jax.sharding.Sharding):
        return _Goal(wanted, sharding, None, key_impl)
    return _Goal(wanted, sharding.sharding, sharding, key_impl)


def _wanted_key(spec: LeafSpec, request: RestoreArgs) -> str | Problem | None:
    """The implementation of the typed key to make; None for a plain array."""
    stored, dtype = spec.extra.get(_KEY_IMPL), request.dtype
    if dtype is None:
        return stored if stored is None or isinstance(stored, str) else Problem(f"unknown PRNG key implementation {stored!r}.")
    if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return None
    for impl in dict.fromkeys([stored or _KEY_IMPLS[0], *_KEY_IMPLS]):
        if _key_dtype(impl) == dtype and stored in (None, impl):
            return impl
    return Problem(f"a PRNG key of implementation {stored!r} is stored, one of dtype {dtype} was requested.")


_KEY_IMPLS = ("threefry2x32", "rbg", "unsafe_rbg")


@functools.lru_cache
def _key_dtype(impl: str) -> Any:
    """The dtype of typed keys of an implementation; None for one that jax does not know."""
    try:
        return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
    except ValueError:
        return None


def _sharding(spec: LeafSpec, args: ArrayRestoreArgs | None, defaults: RestoreDefaults) -> Any:
    """The requested sharding, else the saved one, else the fallback."""
    if args is not None and args.sharding is not None:
        sharding = args.sharding
        return sharding.to_jax_sharding() if hasattr(sharding, "to_jax_sharding") else sharding
    if args is not None and args.mesh is not None:
        return jax.sharding.NamedSharding(args.mesh, args.mesh_axes or jax.sharding.PartitionSpec())
    if spec.sharding is None:
        return defaults.fallback_sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        return to_jax(spec.sharding)
    except errors.TopologyError as error:
        return defaults.fallback_sharding or Problem(str(error), topology=True)


def _local_indices(goal: _Goal) -> list[Index]:
    shape = goal.wanted.shape
    return [_bounds(s, shape) for s in goal.sharding.addressable_devices_indices_map(shape).values() if s is not None]


def _assemble(spec: LeafSpec, request: RestoreArgs, parts: Mapping[Index, Array]) -> jax.Array:
    goal = _goal(spec, request)
    assert isinstance(goal, _Goal)
    shape = goal.wanted.shape

    # The callback's arrays are aligned and never written again, so that the CPU backend adopts them without a copy.
    array = jax.make_array_from_callback(shape, goal.sharding, lambda index: fit(spec, goal.wanted, _bounds(index, shape), parts))
    if goal.layout is not None:
        array = jax.device_put(array, goal.layout)
    return array if goal.key_impl is None else jax.random.wrap_key_data(array, impl=goal.key_impl)
