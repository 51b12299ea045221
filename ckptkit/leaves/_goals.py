"""Where a restored jax.Array goes: its shape, dtype and sharding, what has to be read for that, and how it is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from ckptkit import errors
from ckptkit.grid import Array, Index
from ckptkit.leaves._keys import KEY_IMPL, wanted_key
from ckptkit.leaves._numbers import ShardingNumbers
from ckptkit.leaves._placing import placed
from ckptkit.leaves._requests import Wanted, clip, fit, resolve
from ckptkit.leaves._shares import bounds, holders, local_bounds
from ckptkit.leaves.base import ArrayRestoreArgs, LeafSpec, Problem, RestoreArgs
from ckptkit.metadata.sharding import ShardingMetadata, to_jax
from ckptkit.options import RestoreDefaults

if TYPE_CHECKING:
    from ckptkit.processes import Job

__all__ = ["Goal", "assembled", "goals_of", "sharers_of"]


class Goal(NamedTuple):
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


def goals_of(specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs]) -> list[Goal | Problem]:
    """The goal of each leaf; leaves of which everything is alike share one."""
    known: dict[Any, Goal | Problem] = {}
    numbers = ShardingNumbers()
    found = []
    for spec, request in zip(specs, requests, strict=True):
        stored = spec.array and (spec.array.shape, spec.array.dtype)
        key: tuple[Any, ...] = (stored, id(spec.sharding), repr(spec.extra.get(KEY_IMPL)), request.dtype, id(request.defaults))
        if isinstance(request, ArrayRestoreArgs):
            key += (request.global_shape, request.shape, numbers.of(request.sharding))
            key += (id(request.mesh), request.mesh_axes, request.strict)
        if (goal := known.get(key)) is None:
            goal = known[key] = _goal(spec, request)
        found.append(goal)
    return found


def _goal(spec: LeafSpec, request: RestoreArgs) -> Goal | Problem:
    args = request if isinstance(request, ArrayRestoreArgs) else None
    shape = None if args is None else args.shape if args.global_shape is None else args.global_shape
    key_impl = wanted_key(spec, request)
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
    return Goal(wanted, sharding, layout, key_impl, needs)


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
    return tuple(dict.fromkeys(clip(part, stored) for part in local_bounds(sharding, shape).values()))


def sharers_of(goal: Goal, stored: tuple[int, ...], job: Job) -> Mapping[Index, tuple[int, ...]]:
    """The parts of the stored array that several processes of the job need, and which do."""
    found: dict[Index, set[int]] = {}
    for part, processes in holders(goal.sharding, goal.wanted.shape).items():
        found.setdefault(clip(part, stored), set()).update(process for process in processes if process in job.processes)
    return {part: tuple(sorted(processes)) for part, processes in found.items() if len(processes) > 1}


def assembled(spec: LeafSpec, goal: Goal | Problem, parts: Mapping[Index, Array]) -> jax.Array:
    """The array that a goal asks for, of the parts that it needs; who has a `Problem` does not come here."""
    assert isinstance(goal, Goal)
    wanted, shape = goal.wanted, goal.wanted.shape
    assert spec.array is not None
    if len(parts) == 1 and wanted.dtype == spec.array.dtype and not wanted.resized:
        (whole_array,) = parts.values()
        if whole_array.shape == shape:
            return _finished(placed(whole_array, goal.sharding), goal)  # its memory is aligned, and never written again
    array = jax.make_array_from_callback(shape, goal.sharding, lambda index: fit(spec, wanted, bounds(index, shape), parts))
    return _finished(array, goal)


def _finished(array: jax.Array, goal: Goal) -> jax.Array:
    if goal.layout is not None:
        array = jax.device_put(array, goal.layout)
    return array if goal.key_impl is None else jax.random.wrap_key_data(array, impl=goal.key_impl)
