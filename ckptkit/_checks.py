"""Checks of single arguments, in O(1), when an object is made: what can never work is an error there, not deep inside a save.

A check takes the object that the argument is given to, the argument's name and its value, and raises an error of
`ckptkit.errors` that is a TypeError or a ValueError.
"""

from __future__ import annotations

import numbers
import operator
import reprlib
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import attrs
import numpy as np

from ckptkit import errors

__all__ = [
    "Check",
    "a",
    "flag",
    "function",
    "given_options",
    "one_of",
    "optional",
    "positive",
    "refuse",
    "sharding",
    "text",
    "validator",
    "whole_number",
    "whole_numbers",
]

Check = Callable[[object, str, Any], None]
Options = TypeVar("Options")


def refuse(
    owner: object, name: str, value: object, expected: str, error: type[errors.ArgsError] = errors.ArgsTypeError
) -> errors.ArgsError:
    """The error for an argument that can never work; `owner` may be the name of a class too."""
    shown = owner if isinstance(owner, str) else type(owner).__name__
    return error(f"{shown}({name}={reprlib.repr(value)}): expected {expected}.")


def validator(check: Check) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """The check as a validator of a field of an attrs class."""
    return lambda instance, attribute, value: check(instance, attribute.name, value)


def optional(check: Check) -> Check:
    """The check, for an argument that may be None."""

    def run(owner: object, name: str, value: Any) -> None:
        if value is not None:
            check(owner, name, value)

    return run


def a(kind: type | tuple[type, ...], expected: str) -> Check:
    """Checks that an argument is an instance of `kind`."""

    def run(owner: object, name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise refuse(owner, name, value, expected)

    return run


flag = a(bool, "True or False")
text = a(str, "a str")


def function(owner: object, name: str, value: Any) -> None:
    """Checks that an argument can be called."""
    if not callable(value):
        raise refuse(owner, name, value, "a function")


def one_of(words: Collection[str], advice: str = "") -> Check:
    """Checks that an argument is one of a few words."""

    def run(owner: object, name: str, value: Any) -> None:
        if not isinstance(value, str) or value not in words:
            raise refuse(owner, name, value, f"one of {', '.join(words)}{advice}", errors.ArgsError)

    return run


def positive(owner: object, name: str, value: Any) -> None:
    """Checks that an argument is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise refuse(owner, name, value, "a number above 0")
    if not value > 0:
        raise refuse(owner, name, value, "a number above 0", errors.ArgsError)


def whole_number(expected: str, least: int, most: int | None = None) -> Check:
    """Checks that an argument is an int, or one of numpy's, between two bounds."""

    def run(owner: object, name: str, value: Any) -> None:
        if not _is_whole(value):
            raise refuse(owner, name, value, expected)
        if value < least or (most is not None and value > most):
            raise refuse(owner, name, value, expected, errors.ArgsError)

    return run


def whole_numbers(owner: object, name: str, values: Any, expected: str) -> tuple[int, ...]:
    """An argument as a tuple of ints; an error unless it is an iterable of them."""
    if not isinstance(values, Iterable):
        raise refuse(owner, name, values, expected)
    made = tuple(values)
    if {*map(type, made)} <= {int}:  # the shape of every leaf of a restore comes here
        return made
    if not all(map(_is_whole, made)):
        raise refuse(owner, name, values, expected)
    return tuple([operator.index(value) for value in made])


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def sharding(owner: object, name: str, value: Any) -> None:
    """Checks that an argument is a `jax.sharding.Sharding`."""
    import jax  # noqa: PLC0415 - args and options need no jax until one of its objects is among them

    if not isinstance(value, jax.sharding.Sharding):
        raise refuse(owner, name, value, "a jax.sharding.Sharding")


def given_options(owner: object, name: str, given: Options | None, kind: type[Options]) -> Options:
    """The options object given to `owner`, or one with all defaults.

    Raises:
      errors.ArgsTypeError: an object of another class, such as Orbax's of the same name.
    """
    if given is None:
        return kind()
    if not isinstance(given, kind):
        raise refuse(owner, name, given, f"a ckptkit.options.{kind.__name__}")
    return given
