"""What came of one call to a library: a value or an error, and whether two of them agree."""

from __future__ import annotations

import builtins
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import trees


class Outcome(NamedTuple):
    """What a call returned, or what it raised."""

    value: Any = None
    error: Exception | None = None

    @property
    def kind(self) -> str:
        """'value', or the name of the builtin error that a caller would catch."""
        if self.error is None:
            return "value"
        return next(cls.__name__ for cls in type(self.error).__mro__ if getattr(builtins, cls.__name__, None) is cls)

    def __str__(self) -> str:
        return repr(self.value) if self.error is None else f"{type(self.error).__name__}: {str(self.error)[:1000]}"


def outcome(call: Callable[[], Any]) -> Outcome:
    """What the call came to. Warnings are another matter, with tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Outcome(value=call())
        except Exception as error:
            return Outcome(error=error)


def disagreement(ours: Outcome, theirs: Outcome) -> str | None:
    """How the outcomes differ: equal values agree, and so do errors where ours is caught by whoever catches theirs."""
    if theirs.error is not None and ours.error is not None:
        caught = isinstance(ours.error, getattr(builtins, theirs.kind))
        return None if caught else f"ckptkit raised a {ours.kind}, Orbax a {theirs.kind}"
    if (theirs.error is None) != (ours.error is None):
        return f"ckptkit: {ours}\nOrbax: {theirs}"
    try:
        trees.assert_same(ours.value, theirs.value)
    except AssertionError as error:
        return f"values differ: {str(error)[:1500]}"
    return None
