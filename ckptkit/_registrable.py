"""What may be registered, and under which key: a mistake is told to whoever registers, and not in the middle of a save."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from ckptkit import errors
from ckptkit._names import imported, key_of, name_of
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.leaves.base import TypeHandler

__all__ = ["check_class", "check_handler_class", "check_instance", "check_type_handler", "leaf_type_key", "text", "typestrs_of"]

_ORBAX_WORDS = ("jax.Array", "np.ndarray", "scalar", "string")


def check_class(cls: Any, base: type, what: str) -> None:
    """Refuses what is not a subclass of `base`, which `what` says in words, with an `errors.ArgsTypeError`."""
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise errors.ArgsTypeError(f"{cls!r} is not a {what}: expected a subclass of {name_of(base)}.")


def check_handler_class(cls: Any) -> None:
    """Refuses what is not a subclass of CheckpointHandler, or lacks methods, with an `errors.ArgsTypeError`."""
    check_class(cls, CheckpointHandler, "handler class")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise errors.ArgsTypeError(f"{name_of(cls)} cannot be a handler: it lacks {', '.join(missing)}.")


def check_instance(thing: Any, base: type, what: str) -> None:
    """Refuses what is not an instance of `base`, which `what` says in words, with an `errors.ArgsTypeError`."""
    if isinstance(thing, type) and issubclass(thing, base):
        raise errors.ArgsTypeError(f"{name_of(thing)} is a class; expected an instance: {thing.__qualname__}().")
    if not isinstance(thing, base):
        raise errors.ArgsTypeError(f"{thing!r} is not a {what}: expected an instance of a subclass of {name_of(base)}.")


def check_type_handler(handler: Any) -> None:
    """Refuses what is no type handler, or has no word for Orbax.

    Raises:
      errors.ArgsTypeError: not an instance of TypeHandler.
      errors.ArgsError: its `orbax_typestr` is not a word of Orbax's.
    """
    check_instance(handler, TypeHandler, "type handler")
    if handler.orbax_typestr not in _ORBAX_WORDS:
        raise errors.ArgsError(
            f"{name_of(type(handler))}.orbax_typestr is {handler.orbax_typestr!r}; expected {' or '.join(_ORBAX_WORDS)}: "
            "Orbax refuses a whole checkpoint for any other word."
        )


def typestrs_of(handler_class: type[CheckpointHandler]) -> list[str]:
    """The type strings of a handler class, its own first.

    Raises:
      errors.ArgsTypeError: `typestr()` is no classmethod, or one of them is not a str, or empty.
    """
    try:
        typestrs = [handler_class.typestr(), *handler_class.further_typestrs]
    except TypeError as error:
        raise errors.ArgsTypeError(f"{name_of(handler_class)}.typestr() must be a classmethod: {error}") from error
    return [text(typestr, f"type string of {name_of(handler_class)}") for typestr in typestrs]


def leaf_type_key(leaf_type: Any) -> Hashable:
    """The key of a leaf type; of a dotted name the class that it leads to, where that is imported already.

    Raises:
      errors.ArgsTypeError: neither a class nor a dotted name.
    """
    if isinstance(leaf_type, str) and "." in leaf_type:
        known = imported(leaf_type)
        return key_of(known) if isinstance(known, type) else leaf_type
    if isinstance(leaf_type, type):
        return key_of(leaf_type)
    raise errors.ArgsTypeError(f"Leaf type {leaf_type!r}: expected a class, or a dotted name such as 'torch.Tensor'.")


def text(value: Any, what: str) -> str:
    """The value, which is a str that is not empty; of anything else an `errors.ArgsTypeError`."""
    if not isinstance(value, str) or not value:
        raise errors.ArgsTypeError(f"The {what} is {value!r}; expected a str that is not empty.")
    return value
