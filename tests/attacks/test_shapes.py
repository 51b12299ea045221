"""Documents of arrays that lie: about shapes, dtypes, chunks, codecs; sizes beyond the files."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from sandbox import NEEDS_LINUX, Damage, open_damaged, read, unlisted

import ckptkit
from ckptkit import args
from ckptkit.handlers import PyTreeCheckpointHandler

pytestmark = NEEDS_LINUX

SIZES = [0, -1, 1, 999, 1001, 2**20, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 0.5, "1000", None, True, [], {}]
WORDS = [
    "",
    "<f4",
    ">f4",
    "<f8",
    "|u1",
    "|O",
    "|V8",
    "<U9",
    "<M8[s]",
    "bfloat16",
    "int4",
    "float32",
    "../x",
    "x" * 9999,
    "\0",
    None,
    0,
]
VALUES = [*SIZES, *WORDS, float("nan"), float("inf"), [1] * 40, {"id": "zstd", "level": -(2**40)}, {"id": "../x"}, {"name": "x"}]
CODECS = [
    {"name": name, "configuration": configuration}
    for name in ("bytes", "zstd", "blosc", "gzip", "crc32c", "transpose", "sharding_indexed", "pickle")
    for configuration in ({}, {"order": [0]}, {"order": [2**62]}, {"level": 2**62}, {"chunk_shape": [1]}, {"endian": "big"})
]


def lies(document):
    """The document with every one of its values, however deep, replaced by every other."""
    for key, value in document.items():
        yield {k: v for k, v in document.items() if k != key}
        if isinstance(value, dict):
            yield from (document | {key: lie} for lie in lies(value))
        if isinstance(value, list) and value and isinstance(value[0], int):
            yield from (document | {key: [other]} for other in VALUES)
            yield from (document | {key: [*value, other]} for other in SIZES)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            yield from (document | {key: [*value, codec]} for codec in CODECS)
            yield from (document | {key: [codec]} for codec in CODECS)
            yield from (document | {key: [codec, *value]} for codec in CODECS)
        yield from (document | {key: other} for other in VALUES)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("use_zarr3", "file"), [(False, "a/.zarray"), (True, "a/zarr.json")])
def test_no_lie_in_the_document_of_an_array_is_believed(tmp_path, use_zarr3, file, stride):
    handler = PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=use_zarr3)
    ckptkit.Checkpointer(handler).save(tmp_path / "c", args.PyTreeSave({"a": np.arange(1000, dtype="f4")}))
    document = json.loads(read(tmp_path / "c", file))
    unlisted(tmp_path / "c")
    damages = [Damage(file, json.dumps(lie).encode()) for lie in itertools.islice(lies(document), 0, None, stride)]
    outcomes = open_damaged(tmp_path / "c", damages)
    bad = [(d.data, o) for d, o in zip(damages, outcomes, strict=True) if o.kind in ("foreign", "crash", "hang")]
    assert not bad, bad[:3]
    assert len(damages) * stride > 200
    assert max(outcome.peak_nbytes for outcome in outcomes) < 256 << 20
