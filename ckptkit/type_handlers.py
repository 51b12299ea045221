"""Names of Orbax's `type_handlers` that its tutorials use, bound to the default registry; new code asks a `Registry`."""

from __future__ import annotations

from typing import Any

from ckptkit import errors
from ckptkit.leaves.base import ArrayRestoreArgs, RestoreArgs, SaveArgs, TypeHandler
from ckptkit.registry import default_registry

__all__ = [
    "ArrayRestoreArgs",
    "RestoreArgs",
    "SaveArgs",
    "TypeHandler",
    "get_type_handler",
    "has_type_handler",
    "register_type_handler",
]


def register_type_handler(ty: Any, handler: TypeHandler[Any], override: bool = False) -> None:  # noqa: FBT001, FBT002 - Orbax's
    """Gives leaves of a type, and of its subclasses, to a type handler; see `Registry.add_type_handler`.

    Raises:
      errors.ConflictError: another type handler has the type or the type string, and `override` is False.
    """
    default_registry().add_type_handler(handler, ty, override)


def get_type_handler(ty: type) -> TypeHandler[Any]:
    """The type handler of leaves of a type.

    Raises:
      errors.RegistryError: none is registered.
    """
    handler = default_registry().type_handler_for(ty)
    if handler is None:
        raise errors.RegistryError(f"No type handler is registered for {ty}; register one with register_type_handler.")
    return handler


def has_type_handler(ty: type) -> bool:
    """Whether leaves of a type have a type handler."""
    return default_registry().type_handler_for(ty) is not None
