"""Warnings that point at the program."""

from __future__ import annotations

import inspect
import warnings

__all__ = ["warn"]


def warn(text: str) -> None:
    """A `UserWarning` of the line that called ckptkit, whatever lies between."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and f"{frame.f_globals.get('__name__')}.".startswith("ckptkit."):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)
