"""What to save and how to restore it, as data: the class of the args picks the handler. No handler is imported here."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import attrs

from ckptkit import errors
from ckptkit._checks import flag, one_of, optional, refuse, sharding, validator
from ckptkit.leaves.base import RestoreArgs, SaveArgs
from ckptkit.options import Casting, Devices, OnCorrupt, StorageOptions

if TYPE_CHECKING:
    from ckptkit.handlers.base import CheckpointHandler
    from ckptkit.registry import Registry

__all__ = [
    "ArrayRestore",
    "ArrayRestoreArgs",
    "ArraySave",
    "ArraySaveArgs",
    "CheckpointArgs",
    "Composite",
    "CompositeArgs",
    "JaxRandomKeyRestore",
    "JaxRandomKeyRestoreArgs",
    "JaxRandomKeySave",
    "JaxRandomKeySaveArgs",
    "JsonRestore",
    "JsonRestoreArgs",
    "JsonSave",
    "JsonSaveArgs",
    "NumpyRandomKeyRestore",
    "NumpyRandomKeyRestoreArgs",
    "NumpyRandomKeySave",
    "NumpyRandomKeySaveArgs",
    "PyTreeRestore",
    "PyTreeRestoreArgs",
    "PyTreeSave",
    "PyTreeSaveArgs",
    "StandardRestore",
    "StandardRestoreArgs",
    "StandardSave",
    "StandardSaveArgs",
    "make_args",
    "register_with_handler",
]

A = TypeVar("A", bound="type[CheckpointArgs]")


class CheckpointArgs:
    """Base of all args. It has no fields, so that plain classes, dataclasses and attrs classes can all inherit from it."""

    __slots__ = ()


def register_with_handler(
    handler_class: type[CheckpointHandler],
    for_save: bool = False,  # noqa: FBT001, FBT002 - Orbax's signature
    for_restore: bool = False,  # noqa: FBT001, FBT002 - the same
    registry: Registry | None = None,
) -> Callable[[A], A]:
    """A decorator that binds a `CheckpointArgs` subclass to its handler, in the default registry unless another is given.

    Raises:
      errors.ArgsError: for_save and for_restore are both False.
      errors.ArgsTypeError: not a subclass of CheckpointArgs, or of CheckpointHandler.
      errors.ConflictError: the class is bound to another handler already.
    """
    from ckptkit.registry import default_registry  # noqa: PLC0415 - the registry knows CheckpointArgs

    target = default_registry() if registry is None else registry

    def decorate(args_class: A) -> A:
        target.add_args(args_class, handler_class, for_save=for_save, for_restore=for_restore)
        return args_class

    return decorate


def make_args(args_class: type[CheckpointArgs], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CheckpointArgs:
    """An instance of an args class.

    Raises:
      errors.ArgsTypeError: the arguments do not fit; tells which the class takes.
    """
    signature = inspect.signature(args_class)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
        raise errors.ArgsTypeError(f"{args_class.__qualname__} takes {inspect.Signature(plain)}: {error}.") from error
    return args_class(*args, **kwargs)


def _no_metadata(_instance: Any, _attribute: attrs.Attribute[Any], value: Any) -> None:
    if _is_metadata(value):
        raise errors.ArgsError("Cannot save TreeMetadata. It describes a checkpoint; save the tree of arrays itself.")


def _tree(value: Any) -> Any:
    return value.tree if _is_metadata(value) else value


def _is_metadata(value: Any) -> bool:
    from ckptkit.metadata.values import TreeMetadata  # noqa: PLC0415 - it needs jax, which args as such do not

    return isinstance(value, TreeMetadata)


def _no_transforms(_instance: Any, _attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not (isinstance(value, dict) and not value):
        raise errors.ArgsError("PyTreeRestore(transforms=...) is not supported; restore without a target and rearrange the tree.")


def _file_size(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    StorageOptions(target_data_file_size=value)


def _save_args(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not isinstance(value, SaveArgs):
        raise refuse(instance, attribute.name, value, "a SaveArgs or None")


def _restore_args(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not isinstance(value, RestoreArgs):
        raise refuse(instance, attribute.name, value, "a RestoreArgs, an ArrayRestoreArgs or None")


_FLAG = validator(flag)
_CASTING = validator(one_of(get_args(Casting)))
_DEVICES = validator(optional(one_of(get_args(Devices), " or None; a Sharding goes into fallback_sharding")))
_ON_CORRUPT = validator(one_of(get_args(OnCorrupt)))


def _kind(value: Any) -> str:
    """A tree in a repr: a model's weights are not for reading."""
    return f"<{type(value).__name__}>"


@attrs.define(eq=False)
class StandardSave(CheckpointArgs):
    """Saves a tree of arrays and numbers.

    Attributes:
      item: the tree.
      save_args: a tree of the same structure, or a part of it, with `SaveArgs` or None at the leaves.
      custom_metadata: a JSON object of the user's own, kept with the tree.
    """

    item: Any = attrs.field(validator=_no_metadata, repr=_kind)
    save_args: Any = attrs.field(default=None, repr=_kind)
    custom_metadata: Any = None


@attrs.define(eq=False)
class StandardRestore(CheckpointArgs):
    """Restores a tree of arrays and numbers.

    Attributes:
      item: the target: what to restore into, with `jax.ShapeDtypeStruct`, arrays or numbers at the leaves. None: as saved.
      strict: a stored shape that differs from the target's is an error; False pads with zeros or truncates.
      support_layout: honour the memory layout of targets that carry one.
      fallback_sharding: where arrays go whose saved devices are not here.
      casting: numpy's word for the casts allowed from the stored dtype to the target's.
      devices: where arrays go for which the target names no sharding: 'local', this process's first device; 'numpy', host memory,
        as np.ndarray; None, where they were saved.
      on_corrupt: what happens where stored bytes are damaged: 'raise', an error that tells what is whole; 'skip', the leaves
        concerned are `...` (`ckptkit.PLACEHOLDER`) in the result, and a warning names them.
    """

    item: Any = attrs.field(default=None, converter=_tree, repr=_kind)
    strict: bool = attrs.field(default=True, validator=_FLAG)
    support_layout: bool = attrs.field(default=False, validator=_FLAG)
    fallback_sharding: Any = attrs.field(default=None, validator=validator(optional(sharding)))
    casting: Casting = attrs.field(default="unsafe", validator=_CASTING)
    devices: Devices | None = attrs.field(default=None, validator=_DEVICES)
    on_corrupt: OnCorrupt = attrs.field(default="raise", validator=_ON_CORRUPT)


@attrs.define(eq=False)
class PyTreeSave(CheckpointArgs):
    """Saves any tree that the registered type handlers know, str leaves among them.

    Attributes:
      item: the tree.
      save_args: a tree of the same structure, or a part of it, with `SaveArgs` or None at the leaves.
      ocdbt_target_data_file_size: bytes after which a data file is followed by the next; None is the backend's default.
      custom_metadata: a JSON object of the user's own, kept with the tree.
    """

    item: Any = attrs.field(validator=_no_metadata, repr=_kind)
    save_args: Any = attrs.field(default=None, repr=_kind)
    ocdbt_target_data_file_size: int | None = attrs.field(default=None, validator=_file_size)
    custom_metadata: Any = None


@attrs.define(eq=False)
class PyTreeRestore(CheckpointArgs):
    """Restores any tree, leaf by leaf as `restore_args` say.

    Attributes:
      item: the tree whose structure the result has; `...` leaves are left alone. None: as saved.
      restore_args: a tree of `RestoreArgs`.
      transforms: kept for Orbax's callers; nothing but None or {} is supported.
      partial_restore: leave out what `item` does not have.
      casting: numpy's word for the casts allowed from the stored dtype to the requested one.
      on_corrupt: what happens where stored bytes are damaged: 'raise', an error that tells what is whole; 'skip', the leaves
        concerned are `...` (`ckptkit.PLACEHOLDER`) in the result, and a warning names them.
    """

    item: Any = attrs.field(default=None, converter=_tree, repr=_kind)
    restore_args: Any = attrs.field(default=None, converter=_tree, repr=_kind)
    transforms: Any = attrs.field(default=None, validator=_no_transforms)
    partial_restore: bool = attrs.field(default=False, validator=_FLAG, kw_only=True)
    casting: Casting = attrs.field(default="unsafe", validator=_CASTING, kw_only=True)
    on_corrupt: OnCorrupt = attrs.field(default="raise", validator=_ON_CORRUPT, kw_only=True)


@attrs.define(eq=False)
class JsonSave(CheckpointArgs):
    """Saves a value made of what JSON holds.

    Attributes:
      item: usually a dict.
    """

    item: Any


@attrs.define(eq=False)
class JsonRestore(CheckpointArgs):
    """Restores what `JsonSave` saved.

    Attributes:
      item: kept for Orbax's callers; not used.
    """

    item: Any = None


@attrs.define(eq=False)
class ArraySave(CheckpointArgs):
    """Saves one array or number.

    Attributes:
      item: a jax.Array, an np.ndarray, or a number.
      save_args: a `SaveArgs`, or None for the defaults.
    """

    item: Any = attrs.field(repr=_kind)
    save_args: Any = attrs.field(default=None, validator=_save_args)


@attrs.define(eq=False)
class ArrayRestore(CheckpointArgs):
    """Restores one array or number.

    Attributes:
      item: kept for Orbax's callers; not used.
      restore_args: a `RestoreArgs` or `ArrayRestoreArgs`; None: as saved.
    """

    item: Any = attrs.field(default=None, repr=_kind)
    restore_args: Any = attrs.field(default=None, validator=_restore_args)


@attrs.define(eq=False)
class JaxRandomKeySave(CheckpointArgs):
    """Saves a PRNG key of JAX, or an array of them.

    Attributes:
      item: a typed key of any implementation, or a raw uint32 one.
      save_args: a `SaveArgs`, or None for the defaults.
    """

    item: Any
    save_args: Any = attrs.field(default=None, validator=_save_args)


@attrs.define(eq=False)
class JaxRandomKeyRestore(CheckpointArgs):
    """Restores a PRNG key of JAX.

    Attributes:
      restore_args: a `RestoreArgs` or `ArrayRestoreArgs` for the key's data; None: as saved.
    """

    restore_args: Any = attrs.field(default=None, validator=_restore_args)


@attrs.define(eq=False)
class NumpyRandomKeySave(CheckpointArgs):
    """Saves random state of NumPy.

    Attributes:
      item: what `np.random.get_state()` returns, in either form, a `Generator`, a `BitGenerator`, or its `state`.
    """

    item: Any = attrs.field(repr=_kind)


@attrs.define(eq=False)
class NumpyRandomKeyRestore(CheckpointArgs):
    """Restores what `NumpyRandomKeySave` saved: a tuple, a dict, a `Generator` or a `BitGenerator`."""


class Composite(CheckpointArgs, Mapping[str, Any]):
    """Several items by name: args when given to save or restore, results when restored. A read-only mapping with attributes.

    A name that is also a method of mappings, such as 'items', is reached by `[]`. On restore None as an item's args means:
    restore it as it was saved.
    """

    def __init__(self, **items: Any) -> None:
        """Takes the items.

        Raises:
          errors.ArgsError: a name that could not be a folder's.
        """
        for name in items:
            check_item_name(name)
        self.__dict__["_Composite__items"] = items

    def __getitem__(self, name: str) -> Any:
        try:
            return self.__items[name]
        except KeyError:
            raise errors.UnknownItemError(f"No item {name!r}; there are: {', '.join(self.__items) or 'none'}.") from None

    def __getattr__(self, name: str) -> Any:
        items = self.__dict__.get("_Composite__items", {})
        if name in items:
            return items[name]
        raise AttributeError(f"No item {name!r}; there are: {', '.join(items) or 'none'}.", name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        raise errors.ArgsError(f"Composite.{name} cannot be set: a Composite does not change once made.")

    def __iter__(self) -> Iterator[str]:
        return iter(self.__items)

    def __len__(self) -> int:
        return len(self.__items)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__items})

    def __repr__(self) -> str:
        return f"Composite({', '.join(f'{name}={value!r}' for name, value in self.__items.items())})"


def check_item_name(name: object) -> None:
    """Refuses the name of an item that is not a plain name of a folder.

    Raises:
      errors.ArgsError: it is no str, is empty, begins with '__' or '.', or holds '/' or NUL.
    """
    if not isinstance(name, str) or not name or name.startswith(("__", ".")) or any(c in name for c in "/\\\0"):
        raise errors.ArgsError(
            f"{reprlib.repr(name)} cannot name an item of a Composite; expected a folder's plain name, no '__' or '.' in front."
        )


ArrayRestoreArgs = ArrayRestore
ArraySaveArgs = ArraySave
CompositeArgs = Composite
JaxRandomKeyRestoreArgs = JaxRandomKeyRestore
JaxRandomKeySaveArgs = JaxRandomKeySave
JsonRestoreArgs = JsonRestore
JsonSaveArgs = JsonSave
NumpyRandomKeyRestoreArgs = NumpyRandomKeyRestore
NumpyRandomKeySaveArgs = NumpyRandomKeySave
PyTreeRestoreArgs = PyTreeRestore
PyTreeSaveArgs = PyTreeSave
StandardRestoreArgs = StandardRestore
StandardSaveArgs = StandardSave
