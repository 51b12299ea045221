"""A header is believed only once it is checked: whatever it says, the answer is arrays that fit the file, or a clear error."""

import json
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptkit
from ckptkit import errors
from ckptkit.storage import ArraySpec
from ckptkit_safetensors.header import parse

GOOD = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
CHUNKS = "ckptkit.chunk_shapes"


def content(header, data=b"ab", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HOSTILE = {
    "no bytes": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "a header longer than the file": content({"a": GOOD}, length=1 << 20),
    "a header longer than any": content({"a": GOOD}, length=(1 << 64) - 1),
    "no JSON": content(b"{"),
    "no UTF-8": content(b'{"\xff": 1}'),
    "no object": content([GOOD]),
    "a nest": content(b"[" * 100_000),
    "a nest of objects": content(b'{"a":' * 100_000),
    "a number of many digits": content(b'{"a":' + b"9" * 10_000 + b"}"),
    "a name twice": content(b'{"a":%b,"a":%b}' % ((json.dumps(GOOD).encode(),) * 2)),
    "a field twice": content(b'{"a":{"dtype":"U8","dtype":"I8","shape":[2],"data_offsets":[0,2]}}'),
    "half a surrogate": content(b'{"\\ud800":%b}' % json.dumps(GOOD).encode()),
    "no entry": content({"a": 1}),
    "no dtype": content({"a": {"shape": [2], "data_offsets": [0, 2]}}),
    "an unknown dtype": content({"a": {**GOOD, "dtype": "U9"}}),
    "a dtype that is a list": content({"a": {**GOOD, "dtype": ["U8"]}}),
    "packed values": content({"a": {**GOOD, "dtype": "F4", "shape": [4]}}),
    "a shape that is a number": content({"a": {**GOOD, "shape": 2}}),
    "a negative length": content({"a": {**GOOD, "shape": [-2]}}),
    "two negative lengths": content({"a": {**GOOD, "shape": [-2, -1]}}),
    "a length that is no integer": content({"a": {**GOOD, "shape": [2.0]}}),
    "a length that is true": content({"a": {**GOOD, "shape": [2, True]}}),
    "a shape without end": content({"a": {**GOOD, "shape": [1] * 65}}),
    "an empty shape too large": content({"a": {"dtype": "U8", "shape": [0, 1 << 62, 8], "data_offsets": [0, 0]}}, b""),
    "a product that overflows": content({"a": {**GOOD, "shape": [1 << 63, 2]}}),
    "a span too short": content({"a": {**GOOD, "shape": [3]}}),
    "a span too long": content({"a": {**GOOD, "shape": [1]}}),
    "three offsets": content({"a": {**GOOD, "data_offsets": [0, 2, 2]}}),
    "offsets turned round": content({"a": {**GOOD, "data_offsets": [2, 0]}}),
    "negative offsets": content({"a": {**GOOD, "data_offsets": [-2, 0]}}),
    "offsets that are texts": content({"a": {**GOOD, "data_offsets": "02"}}),
    "offsets that are no integers": content({"a": {**GOOD, "data_offsets": [0.0, 2.0]}}),
    "an array behind the end": content({"a": {**GOOD, "data_offsets": [2, 4]}}),
    "an array cut off": content({"a": GOOD}, b"a"),
    "bytes left over": content({"a": GOOD}, b"abc"),
    "two arrays in one place": content({"a": GOOD, "b": GOOD}),
    "arrays that overlap": content({"a": GOOD, "b": {**GOOD, "data_offsets": [1, 3]}}, b"abc"),
    "a gap": content({"a": GOOD, "b": {**GOOD, "data_offsets": [3, 5]}}, b"abcde"),
    "an entry nested deeper than most parsers go": content({"a": {**GOOD, "more": json.loads("[" * 300 + "]" * 300)}}),
    "metadata that is a list": content({"__metadata__": [], "a": GOOD}),
    "metadata of numbers": content({"__metadata__": {"a": 1}, "a": GOOD}),
    "chunks of no array": content({"__metadata__": {CHUNKS: '{"b": [1]}'}, "a": GOOD}),
    "chunks that are no JSON": content({"__metadata__": {CHUNKS: "{"}, "a": GOOD}),
    "chunks that are no object": content({"__metadata__": {CHUNKS: "[]"}, "a": GOOD}),
    "chunks of another rank": content({"__metadata__": {CHUNKS: '{"a": [1, 1]}'}, "a": GOOD}),
    "chunks of nothing": content({"__metadata__": {CHUNKS: '{"a": [0]}'}, "a": GOOD}),
    "chunks that are no integers": content({"__metadata__": {CHUNKS: '{"a": [true]}'}, "a": GOOD}),
    "chunks without number": content(
        {"__metadata__": {CHUNKS: '{"a": [1]}'}, "a": {"dtype": "U8", "shape": [1 << 23], "data_offsets": [0, 1 << 23]}},
        bytes(1 << 23),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)
def test_what_does_not_fit_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(errors.FormatError, match=r"model\.safetensors: ") as caught:
        ckptkit.restore(tmp_path / "model.safetensors")
    assert len(str(caught.value)) < 1000


def test_a_header_larger_than_the_library_reads_is_not_read(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate((1 << 40) + 8)  # holes take no room
    with pytest.raises(errors.FormatError, match=r"1099511627776 bytes, expected at most 100000000"):
        ckptkit.restore(tmp_path / "model.safetensors")


def test_what_fits_is_taken():
    header = {
        "__metadata__": {CHUNKS: '{"a":[1]}', "other": "text"},
        "z": {**GOOD, "shape": [0, 9], "data_offsets": [2, 2]},
        "a": GOOD,
    }
    found = parse(b" " + json.dumps(header).encode() + b"  ", 2, "here")
    assert {name: tensor.array for name, tensor in found.items()} == {
        "z": ArraySpec("z", (0, 9), np.dtype(np.uint8), (1, 9)),
        "a": ArraySpec("a", (2,), np.dtype(np.uint8), (1,)),
    }


_VALID = content(
    {"__metadata__": {"format": "pt"}, "a": GOOD, "b": {"dtype": "I16", "shape": [1, 2], "data_offsets": [2, 6]}}, b"abcdef"
)


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(8, len(_VALID) - 7), st.sampled_from(b'0123456789"{}[],:ab \\UIF'))), st.booleans())
def test_what_is_taken_the_library_takes_too(edits, tail):
    data = bytearray(_VALID)
    for position, byte in edits[:3]:
        data[position] = byte
    try:
        found = parse(bytes(data[8:-6]), 6, "here")
    except errors.FormatError:
        return
    judged = dict(safetensors.deserialize(bytes(data)))
    assert {name: list(tensor.array.shape) for name, tensor in found.items()} == {name: t["shape"] for name, t in judged.items()}
    start = len(data) - 6
    for name, (array, offset, _) in found.items():
        assert bytes(data[start + offset : start + offset + array.nbytes]) == bytes(judged[name]["data"])
