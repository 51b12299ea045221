"""JSON as checkpoints hold it: bytes to checked Python values and back.

The large documents go through orjson, which is several times faster. The standard library steps in for what orjson
cannot hold: NaN, infinities, integers beyond 64 bits and lone surrogates, all of which other programs write into metadata.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from types import NoneType
from typing import Any, TypeVar

import orjson

from ckptkit import errors

__all__ = [
    "checked_custom",
    "dump",
    "dump_exact",
    "encodable",
    "expect",
    "load",
    "load_exact",
    "malformed",
    "may_be_rounded",
    "shape_of",
    "unexpected",
]

T = TypeVar("T")

_INT64_END = 2.0**63
_MAX_CUSTOM_DEPTH = 100
_MAX_CUSTOM_INT_BITS = 14_000  # CPython refuses to read or write an int of more than 4300 digits

_WORDS: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}


def malformed(where: str, found: str) -> errors.FormatError:
    """The error for a file that is JSON, or should be, but not what the format asks for."""
    return errors.FormatError(f"{where}: {found}. The file is damaged or of another program; restore another checkpoint.")


def unexpected(where: str, what: str, value: Any, expected: str) -> errors.FormatError:
    """The error for a part of a file that is not what the format has there; shows the value, cut short."""
    return malformed(where, f"{what} is {reprlib.repr(value)}, expected {expected}")


def load(data: bytes, where: str) -> Any:
    """The value of a JSON document; an integer beyond 64 bits may come as a float (`may_be_rounded`; `load_exact` keeps it).

    Raises:
      errors.FormatError: not JSON, not UTF-8, or nested too deeply.
    """
    _check_no_holes(data, where)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return load_exact(data, where)


def may_be_rounded(value: Any) -> bool:
    """Whether a value from `load` holds a float that may stand for an integer beyond 64 bits."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, float) and abs(item) >= _INT64_END:
            return True
        pending += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return False


def load_exact(data: bytes, where: str) -> Any:
    """The value of a JSON document with every number as written; slower than `load`.

    Raises:
      errors.FormatError: not JSON, not UTF-8, or nested too deeply.
    """
    _check_no_holes(data, where)
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise malformed(where, f"not valid JSON ({error})") from error


def _check_no_holes(data: bytes, where: str) -> None:
    """Refuses NUL bytes, which no JSON has and a file has where nothing was written, before parsing takes ten times its size."""
    if b"\0" in data:
        raise malformed(where, f"not valid JSON (a NUL byte at {data.index(0)})")


def dump(value: Any) -> bytes:
    """The JSON of a value made of dicts, lists, tuples, strings, 64-bit integers, bools, None and `orjson.Fragment`s.

    Raises:
      errors.TreeError: a string that UTF-8 cannot encode.
    """
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as error:
        raise errors.TreeError(
            f"Cannot write {_unencodable(value)} into the checkpoint's metadata ({error}). Expected text that UTF-8 can encode; "
            "rename the key, or clean the string, before saving."
        ) from error


def dump_exact(value: Any) -> bytes:
    """The JSON of a value that `checked_custom` returned; NaN, infinities and large integers as Orbax writes them."""
    return json.dumps(value).encode()


def _unencodable(value: Any) -> str:
    """The first string inside `value` that holds a lone surrogate, escaped."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item.values(), *item]
        elif isinstance(item, (list, tuple)):
            pending += item
        elif isinstance(item, str) and not encodable(item):
            return ascii(item)
    return reprlib.repr(value)


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold the text: False where it holds a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def expect(value: Any, kind: type[T], what: str, where: str) -> T:
    """The value, where it is exactly of the type; JSON's true is not an integer.

    Raises:
      errors.FormatError: it is something else.
    """
    if type(value) is not kind:
        raise unexpected(where, what, value, _WORDS[kind])
    return value


def shape_of(value: Any, what: str, where: str) -> tuple[int, ...]:
    """The shape that a JSON array of integers describes. The sizes are whatever the file says.

    Raises:
      errors.FormatError: anything but an array of integers of at least 0.
    """
    if type(value) is not list:
        raise unexpected(where, what, value, _WORDS[list])
    for size in value:
        if type(size) is not int or size < 0:
            raise unexpected(where, what, value, "an array of sizes")
    return tuple(value)


def checked_custom(value: Any, what: str) -> Any:
    """A copy of a user's metadata in plain JSON types, which later changes to the original do not reach; tuples become lists.

    Args:
      value: dicts with str keys, lists, tuples, str, int, float, bool and None, nested at most 100 deep.
      what: names the argument in messages.

    Raises:
      errors.ArgsTypeError: anything else, by its place inside `value`.
    """
    return _checked(value, what, ())


def _checked(value: Any, what: str, path: tuple[str | int, ...]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of a subclass, such as an Enum's, the text itself
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int) and value.bit_length() <= _MAX_CUSTOM_INT_BITS:
        return int(value)
    if isinstance(value, (dict, list, tuple)) and len(path) < _MAX_CUSTOM_DEPTH:
        return _checked_container(value, what, path)
    raise errors.ArgsTypeError(f"{_place(what, path)} is {_refused(value)}. {_CUSTOM_RULE}")


_CUSTOM_RULE = (
    "Expected what JSON holds: dicts with str keys, lists, str, int (up to 4200 digits), float, bool and None, nested at most "
    f"{_MAX_CUSTOM_DEPTH} deep. Convert it first (an array: `.tolist()`), or save it as a leaf of the tree."
)


def _checked_container(value: dict[Any, Any] | Sequence[Any], what: str, path: tuple[str | int, ...]) -> Any:
    if not isinstance(value, dict):
        return [_checked(item, what, (*path, i)) for i, item in enumerate(value)]
    for key in value:
        if not isinstance(key, str):
            raise errors.ArgsTypeError(f"{_place(what, path)} has the key {reprlib.repr(key)}. {_CUSTOM_RULE}")
    return {str.__str__(key): _checked(item, what, (*path, key)) for key, item in value.items()}


def _place(what: str, path: tuple[str | int, ...]) -> str:
    return what + "".join(f"[{step!r}]" for step in path)


def _refused(value: Any) -> str:
    if isinstance(value, int):
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__qualname__} nested too deeply, or inside itself"
    return f"a {type(value).__module__}.{type(value).__qualname__}"
