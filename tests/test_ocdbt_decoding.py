"""The decoder of OCDBT manifests and nodes, against TensorStore's own: the same entries, and nothing accepted that it refuses."""

from __future__ import annotations

import os
import random
import struct
from urllib.parse import unquote_to_bytes

import google_crc32c
import pytest
import tensorstore as ts
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptkit import errors
from ckptkit.location import FileLocation
from ckptkit.storage._ocdbt_decoding import DecodedNode, Subtree, decode_manifest, decode_node
from ckptkit.storage._ocdbt_values import OcdbtValues
from ckptkit.storage._tensorstore import context_for
from ckptkit.storage._values import Extent
from ckptkit.storage.kvstore import memory_location

MANIFEST_MAGIC = b"\x0c\xdb\x3a\x2a"
NODE_MAGIC = b"\x0c\xdb\x20\xde"
CONFIGS = {
    "compression": st.sampled_from([None, {"id": "zstd"}]),
    "max_decoded_node_bytes": st.sampled_from([1, 300, 1 << 23]),
    "max_inline_value_bytes": st.sampled_from([0, 20, 1000]),
    "manifest_kind": st.sampled_from(["single", "numbered"]),
    "version_tree_arity_log2": st.sampled_from([1, 4, 16]),
}
VALUES = st.dictionaries(st.binary(max_size=40), st.none() | st.binary(max_size=150), max_size=30)
COMMITS = st.lists(VALUES, min_size=1, max_size=5)


def database(base, config, context=None, **fields):
    spec = {"driver": "ocdbt", "base": base, "config": config, **fields}
    return ts.KvStore.open(spec, context=context or ts.Context()).result()


def commit(store, values):
    with ts.Transaction() as transaction:
        for key, value in values.items():
            store.with_transaction(transaction).write(key, value).result()


def read(values):
    """Every key with the bytes of its value."""
    entries = values.entries()
    return dict(zip(entries, values.read([*entries.values()]), strict=True))


def held(store):
    return {key: store.read(key).result().value for key in store.list().result()}


@settings(max_examples=60)
@given(config=st.fixed_dictionaries(CONFIGS), commits=COMMITS, file_nbytes=st.sampled_from([1, 1 << 31]))
def test_the_entries_are_those_that_tensorstore_lists(tmp_path_factory, config, commits, file_nbytes):
    location = FileLocation(tmp_path_factory.mktemp("database"))
    store = database(location.kvstore(), config, target_data_file_size=file_nbytes)
    for values in commits:
        commit(store, values)
    if any(commits):
        assert read(OcdbtValues(location)) == held(store)


@pytest.mark.parametrize("compression", [None, {"id": "zstd"}])
def test_many_keys_in_large_nodes(tmp_path, compression):
    location = FileLocation(tmp_path)
    store = database(location.kvstore(), {"compression": compression, "max_inline_value_bytes": 20})
    commit(store, {f"layer.{i:05}/{i % 7}": os.urandom(i % 300) for i in range(5000)})
    assert read(OcdbtValues(location)) == held(store)


@pytest.mark.parametrize("kind", ["single", "numbered"])
def test_a_remote_database_of_many_versions(request, kind):
    location = memory_location(f"memory://{request.node.name}")
    store = database(location.kvstore(), {"manifest_kind": kind}, context=context_for(location))
    for i in range(40):
        commit(store, {f"{i % 30}": bytes([i]) * 200})
    assert read(OcdbtValues(location)) == held(store)
    location.delete()


def test_a_numbered_manifest_of_another_database_or_number_is_refused(tmp_path):
    for name in "ab":
        commit(database(f"file://{tmp_path}/{name}/", {"manifest_kind": "numbered"}), {"a": b"b"})
    last = max(name for name in os.listdir(tmp_path / "a") if name.startswith("manifest.0"))
    own, other = (tmp_path / name / last).read_bytes(), (tmp_path / "b" / last).read_bytes()
    for name, data in ((last, other), ("manifest.00000000000000f0", own)):
        (tmp_path / "a" / last).write_bytes(own)
        (tmp_path / "a" / name).write_bytes(data)
        with pytest.raises(errors.CorruptCheckpointError, match="no manifest of this database"):
            OcdbtValues(FileLocation(tmp_path / "a")).entries()


def test_numbered_manifests_without_any_are_not_found(tmp_path):
    location = FileLocation(tmp_path)
    commit(database(location.kvstore(), {"manifest_kind": "numbered"}), {"a": b"b"})
    for name in os.listdir(tmp_path):
        if name.startswith("manifest.0"):
            os.unlink(tmp_path / name)
    with pytest.raises(errors.NotFoundError, match="no numbered manifest"):
        OcdbtValues(location).entries()


# One manifest or node.


def pieces(data, magic):
    at = data.find(magic)
    while at >= 0:
        (nbytes,) = struct.unpack("<Q", data[at + 4 : at + 12])
        yield data[at : at + nbytes]
        at = data.find(magic, at + nbytes)


def sealed(body):
    """What follows on magic number and length, or on a whole header, with the length and the checksum that are right for it."""
    data = body[:4] + struct.pack("<Q", len(body) + 4) + body[12:]
    return data + struct.pack("<I", google_crc32c.value(data))


def judged(data):
    """What TensorStore makes of a manifest or node, in our terms."""
    context = ts.Context()
    memory = ts.KvStore.open("memory://", context=context).result()
    if data[:4] == MANIFEST_MAGIC:
        memory.write("manifest.ocdbt", data).result()
        version = ts.ocdbt.dump(memory, context=context).result()["versions"][-1]
        root, height = version["root"].get("location"), version["root_height"]
        return version["generation_number"], root and Subtree(*place(root), height)
    memory.write("n", data).result()
    node = ts.ocdbt.dump(memory, f"btreenode::n:0:{len(data)}", context=context).result()
    height, entries = node["height"], node["entries"]
    keys = [entry["key"] for entry in entries]
    if height:
        below = [Subtree(*place(e["location"]), height - 1, e["subtree_common_prefix"], e["key"]) for e in entries]
        return DecodedNode(height, keys, [], below)
    values = [e["inline_value"] if "inline_value" in e else place(e["indirect_value"])[0] for e in entries]
    return DecodedNode(height, keys, values, [])


def place(reference):
    """The extent and the base in 'kind:base:path:offset:nbytes', both names percent-encoded."""
    _, base, path, offset, nbytes = reference.split(":")
    return Extent((unquote_to_bytes(base) + unquote_to_bytes(path)).decode(), int(offset), int(nbytes)), unquote_to_bytes(base)


def decoded(data):
    if data[:4] == MANIFEST_MAGIC:
        found = decode_manifest(data, lambda nbytes: None)
        return found.generation, found.root
    return decode_node(data, b"", b"", lambda nbytes: None)


@pytest.fixture(scope="module", params=[None, {"id": "zstd"}], ids=["plain", "zstd"])
def stored(request, tmp_path_factory):
    """Manifests and nodes of a database of several versions that reaches into another one: small ones, each of its kind."""
    path = tmp_path_factory.mktemp("database")
    config = {"compression": request.param, "max_decoded_node_bytes": 150, "max_inline_value_bytes": 5}
    store = database(f"file://{path}/", config | {"version_tree_arity_log2": 1})
    for i in range(15):
        commit(store, {f"k{i:02}{'x' * j}": b"v" * (4 * j) for j in range(3)})
    data = [file.read_bytes() for file in path.rglob("*") if file.is_file()]
    found = [part for magic in (MANIFEST_MAGIC, NODE_MAGIC) for file in data for part in pieces(file, magic)]
    by_shape = {(part[:4], decoded(part)[0] if part[:4] == NODE_MAGIC else 0): part for part in found}
    assert len(by_shape) >= 3  # a manifest, leaves, interior nodes
    return list(by_shape.values())


def test_what_tensorstore_wrote_decodes_to_what_it_reads(stored):
    for data in stored:
        assert decoded(data) == judged(data)


def test_no_wrong_byte_and_no_truncation_is_accepted(stored):
    for data in stored:
        for i in range(len(data)):
            for wrong in (data[:i], data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :]):
                with pytest.raises(ValueError, match=r"it begins with|it has|its checksum"):
                    decoded(wrong)


def unpacked(data):
    return zstandard.ZstdDecompressor().decompressobj().decompress(data[14:-4])


@pytest.mark.parametrize(
    "framed",
    [
        lambda body: zstandard.compress(body[:9]) + zstandard.compress(body[9:]),
        lambda body: zstandard.compress(body) + zstandard.compress(b""),
        lambda body: b"\x50\x2a\x4d\x18\3\0\0\0abc" + zstandard.compress(body),
        lambda body: zstandard.compress(body) + b"\x50\x2a\x4d\x18\3\0\0\0abc",
        lambda body: zstandard.ZstdCompressor(write_checksum=True).compress(body),
        lambda body: zstandard.ZstdCompressor(write_checksum=True).compress(body)[:-1],
        lambda body: zstandard.ZstdCompressor(write_checksum=True).compress(body)[:-4] + b"abcd",
        lambda body: zstandard.ZstdCompressor().compress(body)[:-1],
        lambda body: zstandard.ZstdCompressor().compress(body) + b"\0",
        lambda body: zstandard.ZstdCompressor().compress(body) + b"\x28\xb5\x2f\xfd",
        lambda body: zstandard.ZstdCompressor().compress(body + b"\0"),
        lambda body: b"\x28\xb5\x2f\xfd\x00\x58" + (len(body) << 3).to_bytes(3, "little") + body,
        lambda body: b"",
    ],
)
def test_frames_are_whole_and_end_with_the_body(stored, framed):
    for data in (data for data in stored if data[13] == 1):
        try:
            expected = judged(edited := sealed(data[:14] + framed(unpacked(data))))
        except ValueError:
            with pytest.raises(ValueError, match=r"decompressed|one whole frame|are needed"):
                decoded(edited)
        else:
            assert decoded(edited) == expected


def edits(data, count, seed):
    """Sound checksums over bits, bytes and numbers that are not what they were, parts left out or doubled."""
    draw = random.Random(seed)  # noqa: S311 - no secret
    for _ in range(count):
        is_packed = data[13] == 1 and draw.random() < 0.7
        edited = data[:14] + unpacked(data) if is_packed else data[:-4]
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = draw.randrange(12, len(edited))
            cut = draw.choice((0, 1, 1, 1, 1, 2, 8))
            flipped = bytes([edited[min(at, len(edited) - 1)] ^ 1 << draw.randrange(8)])
            wrong = (flipped, flipped, b"", b"\0", b"\1", b"\x7f", b"\xff", b"\xff\x7f", b"\x80\0", edited[at : at + 9])
            change = draw.choice(wrong)
            edited = edited[:at] + change + edited[at + cut :]
            edited = edited.ljust(15, b"\0")
        yield sealed(edited[:14] + zstandard.compress(edited[14:]) if is_packed else edited)


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_nothing_is_accepted_that_tensorstore_refuses_or_reads_otherwise(stored, count):
    accepted = 0
    for data in stored:
        for edited in edits(data, count // len(stored), seed=count):
            try:
                found = decoded(edited)
            except ValueError:
                continue
            assert found == judged(edited), edited
            accepted += 1
    assert accepted
