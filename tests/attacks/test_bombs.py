"""A few bytes that stand for gigabytes: what they expand to is known before memory is taken for it."""

from __future__ import annotations

import bz2
import contextlib
import json
import os
import shutil
import struct
import zlib

import google_crc32c
import numpy as np
import pytest
import tensorstore as ts
import zstandard
from sandbox import NEEDS_LINUX, files_of, open_hostile, read, write

import ckptkit
from ckptkit import errors
from ckptkit.index import INDEX_FILE
from ckptkit.storage import _ocdbt_nodes as nodes
from ckptkit.storage._ocdbt_decoding import decode_node

pytestmark = NEEDS_LINUX

MIB = 1 << 20
LITTLE = 64 * MIB  # memory that opening any of these may take
CELL = 4 * MIB


def rewritten(directory, **fields):
    """Changes fields of the document of array 'a', beside which no index says what they were."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, INDEX_FILE))
    write(directory, "a/.zarray", json.dumps(json.loads(read(directory, "a/.zarray")) | fields).encode())


def packed(compressor, nbytes):
    """Zeros as TensorStore compresses them."""
    memory = ts.KvStore.open("memory://", context=ts.Context()).result()
    fields = {"shape": [nbytes], "chunks": [nbytes], "dtype": "|u1", "compressor": compressor}
    spec = {"driver": "zarr", "metadata": fields, "store_data_equal_to_fill_value": True}
    ts.open(spec, kvstore=memory, create=True).result().write(np.zeros(nbytes, np.uint8)).result()
    return memory.read("0").result().value


def streamed(compressor, nbytes):
    return b"".join([*(compressor.compress(bytes(MIB)) for _ in range(nbytes // MIB)), compressor.flush()])


BOMBS = {
    "zstd": lambda: packed({"id": "zstd"}, 200 * MIB),
    "blosc": lambda: packed({"id": "blosc"}, 200 * MIB)[: 2 * CELL],
    "zlib": lambda: streamed(zlib.compressobj(9), 200 * MIB),
    "bz2": lambda: streamed(bz2.BZ2Compressor(), 200 * MIB),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_chunk_that_holds_more_than_its_cell_takes_no_memory(files, name):
    rewritten(files, shape=[CELL // 4], chunks=[CELL // 4], compressor={"id": name})
    write(files, "a/0", BOMBS[name]())
    outcome = open_hostile(files)
    assert outcome.kind == "refused", outcome
    assert "cannot be decoded" in outcome.detail
    assert outcome.peak_nbytes < LITTLE


def test_a_blosc_header_that_asks_for_gigabytes_takes_no_memory(files):
    rewritten(files, compressor={"id": "blosc"})
    write(files, "a/0", struct.pack("<BBBBIII", 2, 1, 0, 4, 2**31 - 1, 1 << 18, 4096) + bytes(4080))
    outcome = open_hostile(files)
    assert outcome.kind == "refused", outcome
    assert "more than the 4000 bytes" in outcome.detail
    assert outcome.peak_nbytes < LITTLE


def database_of(directory, value, count, manifest_kind="single"):
    """Puts a database with so many inline values, in one node, in the place of a checkpoint's."""
    os.unlink(os.path.join(directory, "manifest.ocdbt"))
    shutil.rmtree(os.path.join(directory, "d"))
    config = {"max_inline_value_bytes": MIB, "max_decoded_node_bytes": 1 << 31, "manifest_kind": manifest_kind}
    spec = {"driver": "ocdbt", "base": f"file://{directory}/", "config": config}
    store = ts.KvStore.open(spec, context=ts.Context()).result()
    with ts.Transaction() as transaction:
        writing = store.with_transaction(transaction)
        for i in range(count):
            writing.write(f"{i:08}", value).result()


def test_a_node_of_a_database_that_expands_to_gigabytes_takes_no_memory(database):
    database_of(database, bytes(MIB), 400)
    outcome = open_hostile(database)
    assert outcome.kind == "refused", outcome
    assert "stand for" in outcome.detail
    assert outcome.peak_nbytes < LITTLE


def test_what_a_node_decodes_to_is_never_underestimated(database):
    count = 3000
    database_of(database, b"x" * 1000, count)
    stored = [read(database, f"d/{name}") for name in os.listdir(os.path.join(database, "d"))]
    assert sum(map(len, stored)) < 100_000
    held = 0
    for data in stored:  # more than one where TensorStore wrote the node twice
        counted: list[int] = []
        node = decode_node(data, b"", b"", counted.append)
        nbytes = sum(map(len, [*node.keys, *node.values]))
        assert nbytes < sum(counted) < 2 * nbytes + (1 << 16)
        held += nbytes
    assert held >= count * 1000


@pytest.fixture(params=["local", "remote"])
def place_of(request):
    """Where the content of a directory is opened: there, or in a place that is no directory of this machine."""

    def placed(directory):
        if request.param == "local":
            return directory
        place = ckptkit.default_registry().location("memory://test-bombs/c")
        request.addfinalizer(place.delete)
        for file in files_of(directory):
            place.write_bytes(file, read(directory, file))
        place.write_bytes("commit_success.txt", b"")
        return place.url

    return placed


def test_many_nodes_that_expand_a_little_are_refused_together(database, place_of, monkeypatch):
    monkeypatch.setattr("ckptkit.storage._ocdbt_values._MAX_DECODED_NBYTES", 200_000)
    database_of(database, bytes(10_000), 300)
    with pytest.raises(errors.CorruptCheckpointError, match="stand for"):
        ckptkit.restore(place_of(database))


def test_a_node_larger_than_any_writer_makes_is_not_read(database, place_of, monkeypatch):
    database_of(database, os.urandom(300_000), 1)
    monkeypatch.setattr("ckptkit.storage._ocdbt_values._MAX_DECODED_NBYTES", 200_000)
    with pytest.raises(errors.CorruptCheckpointError, match="more than any writer makes"):
        ckptkit.restore(place_of(database))


@pytest.mark.parametrize("paths", [0, 1 << 16])
def test_a_numbered_manifest_that_expands_to_gigabytes_takes_no_memory(database, paths):
    database_of(database, b"", 1, manifest_kind="numbered")
    newest = max(name for name in os.listdir(database) if name.startswith("manifest.0"))
    config = bytes(16) + b"\0\0\0\4\0"
    start = config + (nodes._varints([paths, *[0] * (paths - 1), *[0xFFFF] * paths, *[0] * paths]) if paths else b"")
    body = b"\0\1" + zstandard.ZstdCompressor().compress(start + bytes(0 if paths else 700 * MIB))
    data = b"\x0c\xdb\x3a\x2a" + struct.pack("<Q", 16 + len(body)) + body
    write(database, newest, data + struct.pack("<I", google_crc32c.value(data)))
    outcome = open_hostile(database)
    assert outcome.kind == "refused", outcome
    assert "stand for" in outcome.detail
    assert outcome.peak_nbytes < LITTLE


def test_more_keys_than_their_bytes_can_bear_out_are_refused(database, monkeypatch):
    monkeypatch.setattr("ckptkit.storage._ocdbt_values._MAX_KEYS", 0)
    database_of(database, b"", 10_000)
    with pytest.raises(errors.CorruptCheckpointError, match="10000 keys in"):
        ckptkit.restore(database)


@pytest.mark.parametrize(("name", "nbytes"), [("_METADATA", 1 << 29), ("_METADATA", 1 << 40), ("manifest.ocdbt", 1 << 40)])
def test_a_file_with_holes_takes_no_more_memory_than_there_is(database, name, nbytes):
    os.truncate(os.path.join(database, name), nbytes)
    outcome = open_hostile(database)
    assert outcome.kind == "refused", outcome


def test_an_array_with_holes_for_which_there_is_no_memory_is_refused(files):
    rewritten(files, shape=[1 << 38], chunks=[1 << 38])
    os.truncate(os.path.join(files, "a", "0"), 1 << 40)
    outcome = open_hostile(files)
    assert outcome.kind == "refused", outcome
    assert "no memory" in outcome.detail


@pytest.mark.parametrize("fill_value", [None, 0])
def test_an_array_of_more_chunks_than_are_stored_is_refused(files, fill_value):
    rewritten(files, shape=[1 << 28], chunks=[1], fill_value=fill_value)
    outcome = open_hostile(files)
    assert outcome.kind == "refused", outcome
    assert "has 268435456 chunks" in outcome.detail
    assert outcome.peak_nbytes < LITTLE


def test_an_array_of_fill_values_for_which_there_is_no_memory_is_refused(files):
    rewritten(files, shape=[1 << 36], chunks=[1 << 20], fill_value=0)
    edited = json.loads(read(files, "_METADATA")) | {"store_array_data_equal_to_fill_value": False}
    write(files, "_METADATA", json.dumps(edited).encode())
    outcome = open_hostile(files)
    assert outcome.kind == "refused", outcome
    assert outcome.peak_nbytes < LITTLE


@pytest.mark.parametrize("compressor", [None, {"id": "zstd"}])
def test_an_array_of_which_less_is_stored_than_it_claims_is_refused(files, place_of, compressor):
    rewritten(files, shape=[1 << 42], chunks=[1 << 42], compressor=compressor)
    with pytest.raises(errors.FormatError, match="claims 17592186044416 bytes, but"):
        ckptkit.restore(place_of(files))


def test_an_array_that_is_stored_as_it_claims_is_not(files, place_of, monkeypatch):
    monkeypatch.setattr("ckptkit.storage._chunk_reader._MAX_LOST_NBYTES", 0)
    monkeypatch.setattr("ckptkit.storage._chunk_reader._MAX_FILLED_NBYTES", 0)
    assert ckptkit.restore(place_of(files))["a"].tolist() == list(range(1000))
