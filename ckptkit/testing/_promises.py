"""How a suite says which promise a plugin broke, and where it is documented."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck

__all__ = ["drawn", "missing_fixture", "promise"]

drawn = hypothesis.settings(
    # A failure that no change of the plugin's caused would be of no use to its author.
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    # The fixtures hand out a new directory at each call; a suite is inherited by many classes.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors, HealthCheck.too_slow],
)
"""Settings of tests over drawn values: the same examples in every run."""


@contextlib.contextmanager
def promise(text: str, documented: str) -> Iterator[None]:
    """Adds to whatever fails inside what was promised, and where that is documented. A decorator too."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        note = f"Broken promise: {text}\nDocumented at: {documented}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def missing_fixture(suite: object, name: str, what: str) -> Any:
    """For a fixture that every subclass must override."""
    pytest.fail(f"{type(suite).__name__} must override the fixture `{name}`, which returns {what}; see ckptkit.testing.")
