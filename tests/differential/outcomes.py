"""What came of one call to a library: a value or an error; and in what two of them differ."""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from ckptkit import tree
from ckptkit.testing import assert_same


class Outcome(NamedTuple):
    """What a call returned, or what it raised."""

    value: Any = None
    error: Exception | None = None

    @property
    def caught_as(self) -> type[Exception]:
        """The builtin class by which a caller would catch the error."""
        return next(cls for cls in type(self.error).__mro__ if getattr(builtins, cls.__name__, None) is cls)

    def __str__(self) -> str:
        if self.error is None:
            return "\n  ".join(f"{path}: {_shown(leaf)}" for path, leaf in by_path(self.value).items()) or repr(self.value)
        return f"{type(self.error).__name__}: {str(self.error)[:1500]}"


class Gap(NamedTuple):
    """One thing in which two outcomes differ.

    Attributes:
      kind: 'refused' by ckptkit alone, 'accepted' by ckptkit alone, 'error' of another class, or 'value'.
      path: the leaf that it is about, where that is known.
      ours, theirs: the line of the message, or the leaf that was returned.
    """

    kind: str
    path: tuple[str, ...] | None
    ours: Any
    theirs: Any


def outcome(call: Callable[[], Any]) -> Outcome:
    """What the call came to. Warnings are another matter, with tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Outcome(value=call())
        except Exception as error:
            return Outcome(error=error)


def gaps(ours: Outcome, theirs: Outcome) -> Iterator[Gap]:
    """Everything in which two outcomes differ; nothing where both are errors and whoever catches theirs catches ours."""
    if ours.error is not None and theirs.error is not None:
        if not isinstance(ours.error, theirs.caught_as):
            yield Gap("error", None, str(ours), str(theirs))
    elif ours.error is not None:
        leaves = by_path(theirs.value)
        yield from (Gap("refused", path, line, leaves.get(path)) for path, line in _problems(str(ours.error)))
    elif theirs.error is not None:
        yield Gap("accepted", None, ours.value, str(theirs))
    else:
        yield from _different_leaves(ours.value, theirs.value)


def by_path(value: Any) -> dict[tuple[str, ...], Any]:
    """The leaves and empty nodes of a tree by the names of their keys."""
    leaves, structure = tree.flatten(value)
    return dict(zip(structure.paths, leaves, strict=True))


def _problems(message: str) -> Iterator[tuple[tuple[str, ...] | None, str]]:
    """The leaves that a message of ckptkit's lists, each with what is wrong with it; else its first line."""
    listed = re.findall(r"^  (.*)$", message, re.MULTILINE)
    for line in listed or [message.splitlines()[0]]:
        found = re.match(r"(\((?:'(?:[^'\\]|\\.)*'(?:, ?)?|\"(?:[^\"\\]|\\.)*\"(?:, ?)?)*\))", line)
        yield (ast.literal_eval(found[1]) if found else None), line


def _different_leaves(ours: Any, theirs: Any) -> Iterator[Gap]:
    mine, yours = by_path(ours), by_path(theirs)
    if mine.keys() != yours.keys() or jax.tree.structure(ours) != jax.tree.structure(theirs):
        yield Gap("value", None, str(jax.tree.structure(ours)), str(jax.tree.structure(theirs)))
        return
    for path, leaf in mine.items():
        try:
            assert_same(leaf, yours[path])
        except (AssertionError, AttributeError):
            yield Gap("value", path, leaf, yours[path])


def _shown(leaf: Any) -> str:
    if isinstance(leaf, jax.Array | np.ndarray):
        return f"{type(leaf).__name__} {leaf.dtype}{list(leaf.shape)} {getattr(leaf, 'sharding', '')}"
    return repr(leaf)[:200]
