"""Names of classes and modules, by which the registry tells a class executed again (reload, a notebook) from another one."""

from __future__ import annotations

import sys
from collections.abc import Hashable
from typing import Any

__all__ = ["imported", "in_package", "is_a", "key_of", "name_of", "top_package"]


def name_of(thing: Any) -> str:
    """Module and qualified name of a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def key_of(cls: type) -> Hashable:
    """What stands for a class in a table: its name, so that a class executed again takes its own place.

    Classes made inside functions share a name without being the same; they stand for themselves.
    """
    return cls if "<locals>" in cls.__qualname__ else name_of(cls)


def top_package(module: str) -> str:
    """The outermost package of a module that is one distribution's own: namespace packages are passed over."""
    parts = module.split(".")
    for n in range(1, len(parts)):
        name = ".".join(parts[:n])
        spec = getattr(sys.modules.get(name), "__spec__", None)
        if spec is None or spec.origin is not None:
            return name
    return module


def in_package(module: str, package: str) -> bool:
    """Whether a module is the package or lies in it."""
    return module == package or module.startswith(package + ".")


def is_a(cls: type, base: type) -> bool:
    """Whether a class is, or inherits from, another, by name: either may have been executed again since."""
    return any(key_of(each) == key_of(base) for each in cls.__mro__)


def imported(name: str) -> Any:
    """What a dotted name leads to among the modules that are imported, or None. Imports and runs nothing."""
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(module), "__dict__", {}).get(attribute)
