"""Databases whose manifest and nodes a stranger edited and sealed again: a checksum proves nothing against its author."""

from __future__ import annotations

import os
import random
import shutil
import struct

import pytest
import tensorstore as ts
from sandbox import NEEDS_LINUX, Damage, files_of, open_damaged, read, write

import ckptkit
from ckptkit import errors

pytestmark = NEEDS_LINUX

MAGICS = (b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x20\xde")  # of the manifest, of a node


def _crc32c_table():
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # noqa: PLW2901 - bit by bit
        yield value


TABLE = list(_crc32c_table())


def crc32c(data):
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def bodies(data):
    """Begin and end of what the manifest and each node hold between header and checksum."""
    for magic in MAGICS:
        at = data.find(magic)
        while at >= 0:
            (nbytes,) = struct.unpack("<Q", data[at + 4 : at + 12])
            if at + nbytes <= len(data):
                yield at, at + nbytes - 4
            at = data.find(magic, at + 1)


def sealed(data):
    """The file with the checksums that its content has."""
    for begin, end in bodies(data):
        data = data[:end] + struct.pack("<I", crc32c(data[begin:end])) + data[end + 4 :]
    return data


@pytest.fixture
def plain(database):
    """The checkpoint with a database of several nodes that are not compressed, so that every byte of them means something."""
    rest = {
        "config": {"compression": None, "max_inline_value_bytes": 100, "max_decoded_node_bytes": 400, "manifest_kind": "single"}
    }
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{database}/"}, context=ts.Context()).result()
    held = {key: store.read(key).result().value for key in store.list().result()}
    os.unlink(os.path.join(database, "manifest.ocdbt"))
    shutil.rmtree(os.path.join(database, "d"))
    spec = {"driver": "ocdbt", "base": f"file://{database}/", **rest}
    store = ts.KvStore.open(spec, context=ts.Context()).result()
    with ts.Transaction() as transaction:
        for key, value in held.items():
            store.with_transaction(transaction).write(key, value).result()
    return database


def test_the_seal_is_that_of_the_format(plain):
    for file in files_of(plain):
        if file == "manifest.ocdbt" or file.startswith("d/"):
            assert sealed(read(plain, file)) == read(plain, file)


def edits(directory, count, seed):
    """Edits of what the seals cover: bits, bytes, numbers that are as large as their bytes can say, parts left out or doubled."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    files = {file: data for file in files_of(directory) if list(bodies(data := read(directory, file)))}
    for i in range(count):
        file = list(files)[i % len(files)]
        data = files[file]
        begin, end = draw.choice(list(bodies(data)))
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(begin + 12, end)
            change = draw.choice(
                (bytes([data[at] ^ 1 << draw.randrange(8)]), b"\xff", b"\x7f", b"\0", draw.randbytes(4), b"\xff" * 8)
            )
            data = data[:at] + change + data[at + len(change) :]
        yield Damage(file, sealed(data))


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_no_edit_ends_the_process_or_is_another_error(plain, count):
    damages = list(edits(plain, count, seed=count))
    outcomes = open_damaged(plain, damages)
    bad = [(d, o) for d, o in zip(damages, outcomes, strict=True) if not o.good]
    assert not bad, (len(bad), bad[:3])
    assert max(outcome.peak_nbytes for outcome in outcomes) < 512 << 20


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "d/../../secret", "\0"])
def test_a_reference_that_leads_out_of_the_directory_is_not_followed(plain, tmp_path, path):
    (tmp_path / "secret").write_bytes(read(plain, f"d/{os.listdir(os.path.join(plain, 'd'))[0]}"))
    data = read(plain, "manifest.ocdbt")
    (name,) = {file for file in files_of(plain) if file.startswith("d/") and file.encode() in data}
    assert len(path) <= len(name)
    hostile = data.replace(
        name.encode(), ("d/./" * 9 + path).encode()[-len(name) :] if path[0] == "." else path.ljust(len(name), "x").encode()
    )
    write(plain, "manifest.ocdbt", sealed(hostile))
    with pytest.raises(errors.CheckpointError):
        ckptkit.restore(plain)
