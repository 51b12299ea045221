"""Databases whose nodes a stranger wrote: a few bytes that are referred to, or shared, again and again."""

from __future__ import annotations

import json
import os
import shutil
import struct

import google_crc32c
import pytest
import tensorstore as ts
from sandbox import NEEDS_LINUX, files_of, open_hostile, read, write

from ckptkit.storage import _ocdbt_nodes as nodes
from ckptkit.storage._ocdbt_decoding import decode_node

pytestmark = NEEDS_LINUX

MIB = 1 << 20
LITTLE = 64 * MIB  # memory that opening any of these may take
BLOCK = 128 << 10

varints = nodes._varints


class Database:
    """The data file that takes the place of a checkpoint's database."""

    def __init__(self, directory):
        self.directory = directory
        self.data = b""
        shutil.rmtree(os.path.join(directory, "d"))

    def store(self, data):
        self.data += data
        return nodes.Place("", "d/x", len(self.data) - len(data), len(data))

    def leaf(self, body, method=b"\0\0"):
        return self.store(sealed(b"\0" + body, method))

    def interior(self, height, places, prefixes):
        """A node over others, whose first keys begin with the prefixes; all below them does too."""
        files, ids = nodes._files(places)
        lengths = varints([len(prefix) for prefix in prefixes])
        columns = [[place.offset for place in places], [place.nbytes for place in places], *[[1] * len(places)] * 3]
        shared = bytes(len(places) - 1)
        parts = [bytes([height]), files, varints([len(places)]), shared, lengths, lengths, *prefixes, ids, *map(varints, columns)]
        return self.store(sealed(b"".join(parts)))

    def finish(self, root, height=0):
        os.mkdir(os.path.join(self.directory, "d"))
        write(self.directory, "d/x", self.data)
        write(self.directory, "manifest.ocdbt", nodes.encode_manifest(nodes.Node(b"", root, 1, 1, 0), height))


def sealed(body, method=b"\0\0"):
    data = b"\x0c\xdb\x20\xde" + struct.pack("<Q", 12 + len(method) + len(body) + 4) + method + body
    return data + struct.pack("<I", google_crc32c.value(data))


def zstd(content, zeros=0):
    """A frame of blocks that are stored as they are, and of blocks of zeros."""
    raw = [content[i : i + BLOCK] for i in range(0, len(content), BLOCK)]
    blocks = [(len(part) << 3, part) for part in raw] + [(BLOCK << 3 | 1 << 1, b"\0")] * (zeros // BLOCK)
    last = len(blocks) - 1
    return b"\x28\xb5\x2f\xfd\x00\x58" + b"".join(
        (header | (i == last)).to_bytes(3, "little") + part for i, (header, part) in enumerate(blocks)
    )


def leaf_body(shared, suffixes, value=b"", files=b"\0"):
    """The body, behind its height, of a leaf whose keys all have one value."""
    count = len(suffixes)
    keys = varints(shared) + varints([len(suffix) for suffix in suffixes]) + b"".join(suffixes)
    return files + varints([count]) + keys + varints([len(value)] * count) + bytes(count) + value * count


def assert_refused(directory, detail):
    outcome = open_hostile(directory)
    assert outcome.kind == "refused", outcome
    assert detail in outcome.detail
    assert outcome.peak_nbytes < LITTLE


@pytest.mark.parametrize("alias", ["d/x", "d/./x", "d/link"])
def test_a_node_that_has_two_parents_is_refused(database, alias):
    hostile = Database(database)
    place = hostile.leaf(leaf_body([], [b"k"]))
    height = 40  # 2**40 leaves
    for i in range(height):
        place = hostile.interior(i + 1, [place, place._replace(path=alias)], [b"a", b"b"])
    hostile.finish(place, height)
    os.symlink("x", os.path.join(database, "d/link"))
    assert_refused(database, "two references lead to one node")


def test_nodes_that_overlap_are_refused(database):
    hostile = Database(database)
    inner = sealed(b"\0" + leaf_body([], [b"k"]))
    outer = hostile.leaf(leaf_body([], [b"k"], value=inner))
    within = outer._replace(offset=hostile.data.index(inner), nbytes=len(inner))
    hostile.finish(hostile.interior(1, [outer, within], [b"a", b"b"]), 1)
    assert_refused(database, "or to nodes that overlap")


@pytest.mark.parametrize("method", [b"\0\x81\0", b"\x80\0\1", b"\1\1", b"\0\2"])
def test_a_method_of_compression_is_not_written_otherwise(database, method):
    count = 1000
    keys = [f"{i:06}".encode() for i in range(count)]
    start = leaf_body([0] * (count - 1), keys)[: -2 * count] + varints([MIB] * count) + bytes(count)
    hostile = Database(database)
    hostile.finish(hostile.store(sealed(zstd(b"\0" + start, count * MIB), method)))
    assert_refused(database, "version and compression")


KEYS = leaf_body([0, *[60_000] * 19_998], [b"a", b"b" * 60_000 + bytes(3), *[i.to_bytes(3, "big") for i in range(1, 19_999)]])


@pytest.mark.parametrize("method", [b"\0\0", b"\0\1"])
def test_keys_that_share_what_they_begin_with_are_counted_as_a_whole(database, method):
    hostile = Database(database)
    body = b"\0" + KEYS
    hostile.finish(hostile.store(sealed(zstd(body) if method == b"\0\1" else body, method)))
    assert_refused(database, "stand for")


def test_a_path_to_which_many_keys_refer_is_held_once(database):
    count = 10_000
    files, _ = nodes._files([nodes.Place("", "d/" + "x" * 60_000, 0, 1)])
    keys = leaf_body([0] * (count - 1), [f"{i:05}".encode() for i in range(count)], files=files)
    references = b"\1" * count + bytes(count) + bytes(count)  # kinds, files, offsets
    hostile = Database(database)
    hostile.finish(hostile.leaf(keys[:-count] + references))
    assert_refused(database, "File name too long")


def test_what_subtrees_have_in_common_is_counted_for_each_key(database):
    hostile = Database(database)
    count = 2000
    place = hostile.leaf(leaf_body([0] * (count - 1), [f"{i:04}".encode() for i in range(count)]))
    for height in range(1, 31):
        place = hostile.interior(height, [place], [b"a" * 60_000])
    hostile.finish(place, 30)
    assert_refused(database, "stand for")


def test_paths_that_share_what_they_begin_with_are_counted_as_a_whole(database):
    count = 20_000
    lengths = varints([60_000] * (count - 1)) + varints([60_000] + [3] * (count - 1)) + bytes(count)
    paths = b"d/" + b"x" * 59_998 + b"".join(i.to_bytes(3, "big") for i in range(1, count))
    hostile = Database(database)
    hostile.finish(hostile.leaf(leaf_body([], [b"k"], files=varints([count]) + lengths + paths)))
    assert_refused(database, "stand for")


def test_a_path_to_which_many_versions_refer_is_held_once(database):
    manifest = ts.ocdbt.dump(ts.KvStore.open(f"file://{database}/").result()).result()
    (version,) = manifest["versions"]
    version["root"]["location"] = "btreenode::" + "d" * 60_000 + ":0:100"
    manifest["config"] |= {"version_tree_arity_log2": 10, "compression": {"id": "zstd"}}
    manifest["versions"] = [version | {"generation_number": i, "commit_time": i} for i in range(1, 1001)]
    write(database, "manifest.ocdbt", ts.ocdbt.undump_manifest(manifest))
    assert_refused(database, "File name too long")


@pytest.mark.parametrize("compression", [None, {"id": "zstd"}])
@pytest.mark.parametrize("length", [4, 100, 20_000])
def test_what_names_take_is_never_underestimated(tmp_path, compression, length):
    config = {"compression": compression, "max_decoded_node_bytes": 1 << 18}
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/", "config": config}, context=ts.Context()).result()
    keys = ["k" * (i % length) + f"{i:08}" + "e" * (i % 200) for i in range(2000)]
    with ts.Transaction() as transaction:
        for key in keys:
            store.with_transaction(transaction).write(key, b"v" * 200).result()
    found = [data for file in files_of(tmp_path) for data in stored_nodes(read(tmp_path, file))]
    assert len(found) > 2
    taken = sum(map(taken_by_names, found))
    assert taken > 2000 * 50
    counted: list[int] = []
    for data in found:
        decode_node(data, b"", b"", counted.append)
    assert taken <= sum(counted) < 4 * taken + 300 * 2000


def taken_by_names(data):
    """Bytes of the keys that TensorStore makes of a node."""
    context = ts.Context()
    memory = ts.KvStore.open("memory://", context=context).result()
    memory.write("n", data).result()
    node = ts.ocdbt.dump(memory, f"btreenode::n:0:{len(data)}", context=context).result()
    names = ("key", "subtree_common_prefix")
    return sum(len(value) for entry in node["entries"] for name, value in entry.items() if name in names)


def stored_nodes(data):
    at = data.find(b"\x0c\xdb\x20\xde")
    while at >= 0:
        (nbytes,) = struct.unpack("<Q", data[at + 4 : at + 12])
        yield data[at : at + nbytes]
        at = data.find(b"\x0c\xdb\x20\xde", at + nbytes)


def arrays(chunks):
    """Documents of arrays of bytes, of so many chunks of 1 MiB each, by key."""
    fields = {
        "zarr_format": 2,
        "chunks": [MIB],
        "dtype": "|u1",
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
    }
    return {f"{name}/.zarray": json.dumps(fields | {"shape": [count * MIB]}).encode() for name, count in chunks.items()}


@pytest.mark.parametrize("chunks", [{"a": 1000}, {f"a{i}": 1 for i in range(1000)}], ids=["of one array", "of many"])
def test_chunks_that_lie_at_one_place_are_refused(database, chunks):
    hostile = Database(database)
    chunk = hostile.store(bytes(MIB))
    documents = [nodes.Entry(key.encode(), hostile.store(data)) for key, data in arrays(chunks).items()]
    cells = [nodes.Entry(f"{name}/{i}".encode(), chunk) for name, count in chunks.items() for i in range(count)]
    hostile.finish(nodes.encode_tree([*documents, *cells], hostile.store)[0].place)
    assert_refused(database, "of which the files hold")
