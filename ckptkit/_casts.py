"""Casts by numpy's rules, for the dtypes of ml_dtypes too, of which numpy knows neither all casts nor what they lose."""

from __future__ import annotations

import functools
from typing import Any, Final

import ml_dtypes
import numpy as np

from ckptkit.grid import Array

__all__ = ["can_cast", "cast", "kind_of", "unheld"]

_KINDS: Final = "buifc"
"""numpy's letters, each kind before those that hold it."""

_OTHERS: Final = frozenset(kind for kind in vars(ml_dtypes).values() if isinstance(kind, type) and issubclass(kind, np.generic))


@functools.lru_cache(maxsize=1024)
def kind_of(dtype: np.dtype[Any]) -> str:
    """'b', 'u', 'i', 'f' or 'c': bool, unsigned, signed, floating or complex; numpy's letter of what is no number known here."""
    if dtype.type not in _OTHERS:
        return dtype.kind
    plain = type(np.zeros((), dtype).item())
    if plain is int:
        return "i" if np.array(-1).astype(dtype).item() < 0 else "u"
    return "c" if plain is complex else "f"


@functools.lru_cache(maxsize=1024)
def can_cast(stored: np.dtype[Any], wanted: np.dtype[Any], casting: Any) -> bool:
    """Whether a cast is allowed: as numpy says, but where one of the two is a dtype of ml_dtypes.

    There 'no' and 'equiv' want the same dtype, 'safe' one that holds every value, 'same_kind' a kind that holds the stored one.
    """
    if {stored.type, wanted.type}.isdisjoint(_OTHERS):
        return np.can_cast(stored, wanted, casting)
    if stored == wanted or casting == "unsafe":
        return True
    widens = _KINDS.find(kind_of(stored)) <= _KINDS.find(kind_of(wanted))
    return widens and (casting == "same_kind" or (casting == "safe" and _holds(wanted, stored)))


def cast(numbers: Array, dtype: np.dtype[Any]) -> Array:
    """The numbers as another dtype, without a warning; complex ones lose their imaginary part where it has none.

    They themselves where they are of that dtype.
    """
    if numbers.dtype == dtype:
        return numbers
    held, wanted = kind_of(numbers.dtype), kind_of(dtype)
    if held == "c" and wanted not in "cb":
        numbers = numbers.real  # what numpy does too, with a warning of its own
    with np.errstate(all="ignore"):
        if not np.can_cast(numbers.dtype, dtype, "unsafe"):  # ml_dtypes does not know how, as from int4 to int2
            numbers = numbers.astype(np.int64 if held in "bui" and wanted in "bui" else np.float32)
        return numbers.astype(dtype)


def unheld(numbers: Array, dtype: np.dtype[Any]) -> int | None:
    """The first integer that a cast to another dtype of integers changes; None where there is none, or other numbers.

    Where all are kept, nothing as large as the numbers is made.
    """
    if {kind_of(numbers.dtype), kind_of(dtype)} - {"u", "i"} or not numbers.size or can_cast(numbers.dtype, dtype, "safe"):
        return None
    if numbers.dtype.type in _OTHERS:
        numbers = numbers.astype(np.int8)  # holds them all
    held, wanted = np.iinfo(numbers.dtype), ml_dtypes.iinfo(dtype)  # type: ignore[no-untyped-call]  # ml_dtypes leaves it so
    low, high = max(held.min, wanted.min), min(held.max, wanted.max)
    if low <= numbers.min() and numbers.max() <= high:
        return None
    return int(numbers[(numbers < low) | (numbers > high)][0])


def _holds(wanted: np.dtype[Any], stored: np.dtype[Any]) -> bool:
    """Whether each value of `stored` is one of `wanted`. No dtype of ml_dtypes holds what has more than 16 bits."""
    if stored.itemsize > 2:
        return False
    before = cast(_numbers(), stored)
    after = cast(before, wanted)
    with np.errstate(all="ignore"):  # of NaNs that signal, newer releases of numpy warn
        return np.array_equal(before.astype(np.complex128), after.astype(np.complex128), equal_nan=True)


def _numbers() -> Array:
    """Among them are all values of each dtype of up to 16 bits."""
    bits, single = np.arange(1 << 16, dtype=np.uint16), np.dtype(np.float32)
    return np.concatenate([cast(bits.view(kind), single) for kind in (np.int16, np.uint16, np.float16, ml_dtypes.bfloat16)])
