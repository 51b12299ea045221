"""The interface of a type handler: one kind of leaf to and from host arrays. It sees no path and no file.

Every method works on a batch, since per-leaf calls are what makes checkpointing slow.
"""

from __future__ import annotations

import abc
import functools
import reprlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import attrs
import numpy as np

from ckptkit import errors
from ckptkit._checks import flag, optional, refuse, validator, whole_number, whole_numbers
from ckptkit.grid import Array, ArraySpec, Index, index_nbytes
from ckptkit.options import RestoreDefaults

if TYPE_CHECKING:
    from ckptkit.processes import Job

__all__ = ["ArrayRestoreArgs", "Kinds", "Leaf", "LeafSpec", "Problem", "RestoreArgs", "SaveArgs", "TypeHandler"]

L = TypeVar("L")


def _numpy_dtype(dtype: Any) -> np.dtype[Any] | None:
    try:
        return None if dtype is None else np.dtype(dtype)
    except Exception as error:  # numpy parses texts, and asks objects
        raise errors.ArgsTypeError(
            f"SaveArgs(dtype={reprlib.repr(dtype)}): {error}; expected a dtype of numpy, such as jnp.bfloat16."
        ) from error


def _axes(axes: Any) -> tuple[int, ...]:
    return whole_numbers("SaveArgs", "shard_axes", axes, "numbers of axes, such as (0, 1)")


@attrs.define(kw_only=True)
class SaveArgs:
    """How one leaf is saved.

    Attributes:
      aggregate: kept for Orbax's callers; True is refused, since every leaf is stored on its own.
      dtype: cast to this dtype before writing.
      chunk_byte_size: upper bound of a chunk, in bytes; exceeded where the length of a shard has no divisor near it.
      shard_axes: axes to cut first when a chunk must become smaller.

    Raises:
      errors.ArgsError: an argument of another type, or a size that is not above 0.
    """

    aggregate: bool = attrs.field(default=False, validator=validator(flag))
    dtype: Any = attrs.field(default=None, converter=_numpy_dtype)
    chunk_byte_size: int | None = attrs.field(default=None, validator=validator(optional(whole_number("bytes above 0", 1))))
    shard_axes: tuple[int, ...] = attrs.field(default=(), converter=_axes)


@attrs.define(kw_only=True)
class RestoreArgs:
    """How one leaf is restored.

    Attributes:
      restore_type: type of the result, which picks the type handler; None means as saved.
      dtype: cast to this dtype; None means as stored.
      target: the leaf of the target tree that this was made from, if any.
      defaults: what holds for the whole restore.

    Raises:
      errors.ArgsError: an argument of another type.
    """

    restore_type: Any = None
    dtype: Any = None
    target: Any = attrs.field(default=None, repr=False)
    defaults: RestoreDefaults = attrs.field(factory=RestoreDefaults, repr=False)

    # One check for all fields, and no validators: there is an instance for every leaf of a restore.
    def __attrs_post_init__(self) -> None:
        if self.restore_type is not None and not isinstance(self.restore_type, type):
            raise refuse(self, "restore_type", self.restore_type, "a type such as np.ndarray, jax.Array or int, or None")
        if self.dtype is not None and not isinstance(self.dtype, (np.dtype, type)):
            _check_dtype(self)
        if not isinstance(self.defaults, RestoreDefaults):
            raise refuse(self, "defaults", self.defaults, "a RestoreDefaults")


def _check_dtype(args: RestoreArgs) -> None:
    """Refuses what is a dtype neither to numpy nor to jax."""
    import jax  # noqa: PLC0415 - args need no jax until one of its objects is among them

    try:
        jax.numpy.issubdtype(args.dtype, np.generic) or np.dtype(args.dtype)
    except Exception as error:
        raise refuse(args, "dtype", args.dtype, f"a dtype of numpy, such as jnp.bfloat16 ({error})") from error


def _shape(shape: Any) -> tuple[int, ...] | None:
    return None if shape is None else whole_numbers("ArrayRestoreArgs", "shape", shape, "lengths, such as (2, 3), or None")


@attrs.define(kw_only=True)
class ArrayRestoreArgs(RestoreArgs):
    """How one jax.Array is restored.

    Attributes:
      restore_type: None means jax.Array, whatever was saved.
      mesh, mesh_axes: a sharding in two parts; used where `sharding` is None.
      sharding: a `jax.sharding.Sharding`, a `jax.experimental.layout.Format`, or what `metadata` tells of one.
      global_shape, shape: the shape wanted, two names for one thing.
      strict: a stored shape that differs is an error; False pads with zeros or truncates at the end of each axis.

    Raises:
      errors.ArgsError: an argument of another type, or two shapes that differ.
    """

    restore_type: Any = None
    mesh: Any = None
    mesh_axes: Any = None
    sharding: Any = None
    global_shape: tuple[int, ...] | None = attrs.field(default=None, converter=_shape)
    shape: tuple[int, ...] | None = attrs.field(default=None, converter=_shape)
    strict: bool = True

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not isinstance(self.strict, bool):
            raise refuse(self, "strict", self.strict, "True or False")
        for name, value in (("sharding", self.sharding), ("mesh", self.mesh), ("mesh_axes", self.mesh_axes)):
            if (expected := _unplaceable(name, value.__class__)) is not None:
                raise refuse(self, name, value, expected)
        if self.shape is not None and self.global_shape is not None and self.shape != self.global_shape:
            raise errors.ArgsError(
                f"ArrayRestoreArgs: shape={self.shape} and global_shape={self.global_shape} differ; give one of them."
            )
        if any(n < 0 for n in self.global_shape or self.shape or ()):
            raise refuse(self, "shape", self.global_shape or self.shape, "lengths that are not below 0", errors.ArgsError)


@functools.lru_cache
def _unplaceable(name: str, kind: Any) -> str | None:
    """What an argument that says where an array goes should be instead, where instances of `kind` say nothing of it."""
    import jax  # noqa: PLC0415 - as above
    from jax.experimental.layout import Format  # noqa: PLC0415 - the same

    from ckptkit.metadata.sharding import ShardingMetadata  # noqa: PLC0415 - it needs jax

    taken, expected = {
        "sharding": ((jax.sharding.Sharding, Format, ShardingMetadata), "a Sharding or a Format of jax's"),
        "mesh": ((jax.sharding.Mesh,), "a jax.sharding.Mesh"),
        "mesh_axes": ((jax.sharding.PartitionSpec,), "a jax.sharding.PartitionSpec"),
    }[name]
    return None if issubclass(kind, (*taken, type(None))) else expected


class Leaf(NamedTuple):
    """A leaf given to save.

    Attributes:
      key_path: the names of its keys, outermost first, as strings.
      name: the same, joined: unique in the checkpoint.
      value: the leaf.
      save_args: how to save it.
    """

    key_path: tuple[str, ...]
    name: str
    value: Any
    save_args: SaveArgs | None


class LeafSpec(NamedTuple):
    """What is stored of a leaf.

    Attributes:
      typestr: of the type handler that described it.
      array: the array that holds its values, or None for an inline leaf.
      inline: a JSON value kept in the checkpoint's metadata (a str leaf).
      sharding: JSON that says where the array lived, or None.
      extra: further JSON that the type handler wants back on restore.
    """

    typestr: str
    array: ArraySpec | None
    inline: Any = None
    sharding: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = {}


class Kinds(NamedTuple):
    """Which leaves are alike: what is true of one, but for its name and its values, is true of all of its kind.

    Attributes:
      numbers: for each leaf the number of its kind; kinds are numbered from 0 on as they appear.
      keys: for each kind what tells it from all others, of other trees too.
    """

    numbers: tuple[int, ...]
    keys: tuple[Hashable, ...]

    @classmethod
    def of(cls, keys: Iterable[Hashable]) -> Kinds:
        """The kinds of leaves, of which each has its key."""
        numbers: dict[Hashable, int] = {}
        numbered = tuple([numbers.setdefault(key, len(numbers)) for key in keys])
        return cls(numbered, tuple(numbers))


class Problem(NamedTuple):
    """Why a leaf cannot be saved or restored, and what to do about it; the pipeline adds its key path.

    Attributes:
      message: one sentence or two.
      topology: the reason is that devices are missing, which becomes an `errors.TopologyError`.
    """

    message: str
    topology: bool = False


class TypeHandler(abc.ABC, Generic[L]):
    """One kind of leaf. Stateless; one instance serves every save and restore.

    Attributes:
      typestr: written into the checkpoint; names the handler again on restore. Unique.
      orbax_typestr: the word of Orbax's under which Orbax reads these leaves; one of 'jax.Array', 'np.ndarray',
        'scalar', 'string'.
    """

    typestr: ClassVar[str]
    orbax_typestr: ClassVar[str] = "np.ndarray"

    @abc.abstractmethod
    def describe(self, leaves: Sequence[Leaf]) -> Sequence[LeafSpec | Problem]:
        """What each leaf will be stored as, or why it cannot be. No I/O and no copy of data."""

    def kinds(self, leaves: Sequence[L]) -> Kinds | None:
        """Which leaves are alike; None: unknown.

        `describe`, `owned` and `staged_nbytes` are asked about one leaf of each kind, unless there are save_args, or several
        processes save. A plan of a save without save_args is used again for leaves of equal kinds.
        """
        return None

    @abc.abstractmethod
    def owned(self, leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job) -> Sequence[Sequence[Index] | Problem]:
        """For each leaf the cells of its chunk grid that this process writes, or why this job cannot save it.

        Every cell is one process's; each process finds out by itself which are its own.
        """

    @abc.abstractmethod
    def stage(self, pieces: Sequence[tuple[L, LeafSpec, Index]]) -> Sequence[Array]:
        """The values of cells named by `owned`, on the host, safe from what the caller does to the leaf afterwards."""

    def staged_nbytes(self, pieces: Sequence[tuple[L, LeafSpec, Index]]) -> Sequence[int]:
        """Host memory that staging each cell takes, in bytes: its size, or 0 where `stage` returns a view."""
        return [index_nbytes(spec.array, index) if spec.array else 0 for _, spec, index in pieces]

    def through_pinned_host(self) -> TypeHandler[L]:
        """A type handler that stages by way of the devices' pinned host memory; this one where that makes no difference."""
        return self

    def request(self, target: Any, spec: LeafSpec, defaults: RestoreDefaults) -> RestoreArgs:
        """The request that a leaf of a target tree makes; `target` is None where there is no target tree.

        Where the result names a `restore_type`, the handler of that type restores the leaf; else the one that saved it.
        """
        return RestoreArgs(restore_type=None if target is None else type(target), target=target, defaults=defaults)

    def requests(self, targets: Sequence[Any], specs: Sequence[LeafSpec], defaults: RestoreDefaults) -> Sequence[RestoreArgs]:
        """What `request` says of each leaf. The pipeline calls this one, once for all leaves of the handler."""
        return [self.request(target, spec, defaults) for target, spec in zip(targets, specs, strict=True)]

    @abc.abstractmethod
    def needs(self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job) -> Sequence[Sequence[Index] | Problem]:
        """For each leaf the parts of the stored array that this process must read, or why it cannot be restored."""

    def sharers(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job
    ) -> Sequence[Mapping[Index, tuple[int, ...]]]:
        """For each leaf the parts that several processes of the job need, and which do, in ascending order.

        Every process finds out the same. A part that is not among them is read by each process that needs it.
        """
        return [{}] * len(specs)

    @abc.abstractmethod
    def assemble(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], parts: Sequence[Mapping[Index, Array]]
    ) -> Sequence[L | Problem]:
        """The leaves, from the parts that `needs` asked for, or why their values cannot be had as requested.

        The arrays are the handler's to keep; nobody else writes them.
        """
