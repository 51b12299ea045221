"""Documents nested deeper than any stack, and counts larger than any memory."""

from __future__ import annotations

import json
import os

import pytest
from sandbox import NEEDS_LINUX, open_hostile, open_variants, read, write

import ckptkit
from ckptkit import errors
from ckptkit.handlers import PyTreeCheckpointHandler
from ckptkit.options import PyTreeMetadataOptions

pytestmark = NEEDS_LINUX

DEEP = 200_000
DOCUMENTS = ["_METADATA", "_CHECKPOINT_METADATA", "_sharding", "_strings.json", "ckptkit_index.json", "array_metadatas/process_0"]


def rich(directory, text):
    """Puts a record of containers into `_METADATA`."""
    write(directory, "_METADATA", json.dumps(json.loads(read(directory, "_METADATA")) | {"value_metadata_tree": text}).encode())


def keys(directory, keys):
    """Renames the leaf 'a' by a path of other keys."""
    document = json.loads(read(directory, "_METADATA"))
    document["tree_metadata"]["('a',)"]["key_metadata"] = keys
    write(directory, "_METADATA", json.dumps(document).encode())


def sharding(directory, **fields):
    """Replaces every sharding by one with these fields."""
    named = {
        "sharding_type": "NamedSharding",
        "shape": [1],
        "axis_names": ["x"],
        "partition_spec": [],
        "device_mesh": {"mesh": []},
    }
    document = json.loads(read(directory, "_sharding"))
    write(directory, "_sharding", json.dumps(dict.fromkeys(document, json.dumps(named | fields))).encode())


def assert_refused(outcomes):
    assert not {name: outcome for name, outcome in outcomes.items() if outcome.kind != "refused"}
    assert max(outcome.peak_nbytes for outcome in outcomes.values()) < 256 << 20


def test_no_document_is_nested_deep_enough_to_end_the_process(database):
    deep = b'{"tree_metadata":[' * DEEP
    assert_refused(open_variants(database, {name: lambda path, name=name: write(path, name, deep) for name in DOCUMENTS}))


ATTACKS = {
    "a leaf of 100,000 keys": lambda d: keys(d, [{"key": "k", "key_type": 2}] * 100_000),
    "a list of which one position in 2**62 is there": lambda d: keys(d, [{"key": str(2**62), "key_type": 1}]),
    "a mesh of 2**62 devices": lambda d: sharding(d, shape=[2**62]),
    "a mesh without ids of 2**40 x 2**40 devices": lambda d: sharding(
        d, shape=[2**40] * 2, axis_names=["x", "y"], device_mesh=None
    ),
    "a mesh of 10,000 axes": lambda d: sharding(d, shape=[1] * 10_000, axis_names=[str(i) for i in range(10_000)]),
    "a device whose number has a million digits": lambda d: sharding(
        d, sharding_type="SingleDeviceSharding", device_str="cpu:" + "9" * 1_000_000
    ),
    "a number of a million digits": lambda d: write(d, "_METADATA", b'{"tree_metadata": ' + b"9" * 1_000_000 + b"}"),
}


def test_a_count_that_nothing_bears_out_is_refused(database):
    assert_refused(open_variants(database, ATTACKS))


RECORDS = {
    "objects in objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "lists in lists": "[" * 900 + "]" * 900,
    "a named tuple of 100,000 fields": json.dumps(
        {"category": "namedtuple", "module": "m", "clazz": "T", "entries": [{"key": f"f{i}"} for i in range(100_000)]}
    ),
    "a named tuple of two fields that are one identifier": json.dumps(
        {"category": "namedtuple", "module": "m", "clazz": "T", "entries": [{"key": "fi"}, {"key": "\ufb01"}]}
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_no_record_of_containers_ends_the_process(database, name):
    rich(database, RECORDS[name])
    handler = PyTreeCheckpointHandler(pytree_metadata_options=PyTreeMetadataOptions(support_rich_types=True))
    with pytest.raises(errors.FormatError, match="_METADATA"):
        ckptkit.Checkpointer(handler).restore(database)


MSGPACK = {
    "maps in maps": b"\x81\xa1a" * DEEP,
    "arrays in arrays": b"\x91" * DEEP,
    "extensions in extensions": b"\xc9\xff\xff\xff\xff\x04" * 10_000,
    "an array of 2**32 elements": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "a map of 2**32 elements": b"\xdf\xff\xff\xff\xff",
    "a text of 2**32 bytes": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "half a million leaves of a byte each": b"\x81\xa1a\xdd\x00\x07\xa1\x20" + b"\x01" * 500_000,
    "two million values": b"\x81\xa1a\xdd\x00\x1e\x84\x80" + b"\x01" * 2_000_000,
    "a name of a megabyte before 1000 leaves": b"\x81\xdb\x00\x10\x00\x00" + b"a" * (1 << 20) + b"\xdc\x03\xe8" + b"\x01" * 1000,
    "an array of 2**62 numbers": b"\x81\xa1a\xc7\x12\x01\x93\x91\xcf\x40" + bytes(7) + b"\xa2u1\xc4\x00",
    "nothing": b"",
}


def test_no_file_of_an_older_release_ends_the_process(tmp_path):
    os.mkdir(tmp_path / "old")
    changes = {name: lambda path, data=data: write(path, "checkpoint", data) for name, data in MSGPACK.items()}
    assert_refused(open_variants(tmp_path / "old", changes))


def test_a_directory_of_very_many_names_is_listed_and_cut_short_in_messages(tmp_path):
    for i in range(1000):
        os.mkdir(tmp_path / f"{i}")
    outcome = open_hostile(tmp_path)
    assert outcome.kind == "refused", outcome
