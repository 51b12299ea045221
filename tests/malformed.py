"""Malformed metadata without end: files of a checkpoint, changed as a stranger or a broken disk might change them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from sandbox import Damage, files_of, read

_NUMBERS = [0, 1, -1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308]
_WORDS = [
    *("", ".", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a/b", "\0", "\ud800", "é", "x" * 300, "NaN", "-1", "null"),
    *("os.system", "builtins.eval", "jax.Array", "np.ndarray", "scalar", "string", "None", "Dict", "List", "Tuple", "NamedTuple"),
    *("<f4", "|O", ">c16", "<M8[s]", "bfloat16", "int4", "zstd", "blosc", "gzip", "C", "F", "/", "threefry2x32", "rbg", "cpu:0"),
    *("NamedSharding", "SingleDeviceSharding", "custom", "namedtuple", "ValueMetadataEntry", "sharding_indexed", "transpose"),
]
_BYTES = [
    b"",
    b"\0",
    b"\xff",
    b"[",
    b"{",
    b'"',
    b",",
    b":",
    b"9",
    b"e",
    b"\\u0000",
    b"\\ud800",
    b"NaN",
    b"\x93",
    b"\xc7",
    b"\xdd\xff\xff\xff\xff",
]


def damages(checkpoint: str, names: set[str], count: int, seed: int) -> Iterator[Damage]:
    """Changes of the files whose last component is among `names`, each in turn; the same ones for the same seed."""
    files = {file: read(checkpoint, file) for file in files_of(checkpoint) if file.rsplit("/", 1)[-1] in names}
    draw = random.Random(seed)  # noqa: S311 - no secret
    for i in range(count):
        file = list(files)[i % len(files)]
        yield Damage(file, _malformed(draw, files[file], list(files.values())))


def _malformed(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice(_CHANGES)(draw, data, others)
    return data


def _flipped(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    if not data:
        return data
    i = draw.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << draw.randrange(8)]) + data[i + 1 :]


def _spliced(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """With a part replaced by one of another file, by itself many times, or by bytes that parsers trip over."""
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    other = draw.choice(others)
    start = draw.randrange(len(other) + 1)
    part = draw.choice((other[start : start + draw.randrange(64)], data[a:b] * draw.choice((2, 9, 100)), draw.choice(_BYTES)))
    return data[:a] + part + data[draw.choice((a, b)) :]


def _deep(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """With a value nested too deeply where a value was."""
    opening = draw.choice((b"[", b'{"a":', b"\x91", b"\x81\xa1a"))
    i = data.find(b":", draw.randrange(len(data) + 1)) + 1
    return data[:i] + opening * draw.choice((50, 200, 1000, 20_000)) + data[i:]


def _revalued(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """With one value of a JSON document, or of one within it, replaced, renamed, removed or doubled."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return _flipped(draw, data, others)
    try:
        return json.dumps(_changed(draw, document)).encode()
    except RecursionError:
        return data


def _changed(draw: random.Random, value: Any) -> Any:
    """The value with one part of it changed, or another value."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        return _changed_object(draw, value) if isinstance(value, dict) else _changed_list(draw, value)
    if isinstance(value, str) and value[:1] in ("{", "[") and draw.random() < 0.9:
        return _revalued(draw, value.encode(errors="replace"), []).decode(errors="replace")
    if type(value) is int and draw.random() < 0.3:
        return value + draw.choice((-1, 1))
    return draw.choice((draw.choice(_NUMBERS), draw.choice(_WORDS), None, True, [], {}, [value], {"a": value}, float("nan")))


def _changed_object(draw: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    key = draw.choice(list(value))
    how = draw.random()
    if how < 0.1:
        return {k: v for k, v in value.items() if k != key}
    if how < 0.2:
        return {draw.choice(_WORDS) if k == key else k: v for k, v in value.items()}
    return value | {key: _changed(draw, value[key])}


def _changed_list(draw: random.Random, value: list[Any]) -> list[Any]:
    i = draw.randrange(len(value))
    if draw.random() < 0.1:
        return draw.choice((value[:i], value + value, value[::-1], value * 40))
    return [*value[:i], _changed(draw, value[i]), *value[i + 1 :]]


_CHANGES: tuple[Callable[[random.Random, bytes, list[bytes]], bytes], ...] = (
    *(_flipped, _spliced, _deep, _revalued, _revalued, _revalued, _revalued),
)
