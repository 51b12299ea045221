"""`array_metadatas/process_N` and `_strings.json`, with Orbax on the other side."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint._src.metadata.array_metadata_store import Serializer

from ckptkit import errors
from ckptkit.metadata.arrays import (
    STRINGS_FILE,
    ArrayRecord,
    arrays_file,
    decode_arrays,
    decode_strings,
    encode_arrays,
    encode_strings,
)

RECORDS = {
    "a.b": ArrayRecord((4, 2), (2, 2)),
    "": ArrayRecord((), ()),
    "größe": ArrayRecord((2,), (2,), {"random_key_impl": "threefry2x32"}),
}

shapes = st.lists(st.integers(0, 2**63), max_size=3).map(tuple)
records = st.builds(ArrayRecord, shapes, shapes, st.none() | st.dictionaries(st.text(), st.text()))


@given(st.dictionaries(st.text(), records))
def test_a_round_trip(found):
    assert decode_arrays(encode_arrays(found), "file") == found


def test_reads_and_writes_the_file_of_orbax(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"w": jnp.ones((2, 3)), "key": jax.random.key(1), "n": np.ones(2)})
    data = (tmp_path / "c" / arrays_file(0)).read_bytes()
    found = decode_arrays(data, "file")
    assert found == {
        "key": ArrayRecord((2,), (2,), {"random_key_impl": "threefry2x32"}),
        "w": ArrayRecord((2, 3), (2, 3)),
    }
    assert json.loads(encode_arrays(found)) == json.loads(data)


def test_orbax_reads_what_is_written():
    read = Serializer().deserialize(encode_arrays(RECORDS).decode())
    assert {r.param_name: ArrayRecord(r.write_shape, r.chunk_shape, r.ext_metadata) for r in read} == RECORDS


def document(**changes):
    record = {"param_name": "a", "write_shape": [2], "chunk_shape": [2], "ext_metadata": None} | changes
    return json.dumps({"array_metadatas": [{"array_metadata": record}]}).encode()


def test_a_document_without_records_or_extras_is_understood():
    assert decode_arrays(b"{}", "file") == {}
    data = b'{"array_metadatas": [{"array_metadata": {"param_name": "a", "write_shape": [], "chunk_shape": []}}]}'
    assert decode_arrays(data, "file") == {"a": ArrayRecord((), ())}


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b'{"array_metadatas": {}}',
        b'{"array_metadatas": [1]}',
        b'{"array_metadatas": [{}]}',
        b'{"array_metadatas": [{"array_metadata": []}]}',
        document(param_name=None),
        document(write_shape=None),
        document(write_shape=[1.5]),
        document(chunk_shape=[-1]),
        document(ext_metadata=[]),
        b'{"array_metadatas": [%b, %b]}' % ((document()[len(b'{"array_metadatas": [') : -2],) * 2),
    ],
)
def test_a_malformed_document_is_a_format_error(data):
    with pytest.raises(errors.FormatError, match=r"^dir/process_0: .*restore another checkpoint"):
        decode_arrays(data, "dir/process_0")


STRINGS = {"a": "x", "n.m": "größe", "b/c": "", "b/d/e": "y", "//": "1", "c~1d": "2", "c~0d": "3", "50%": "nul\0", "0": "-"}


def test_strings_are_the_file_that_orbax_writes(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", STRINGS)
    data = (tmp_path / "c" / STRINGS_FILE).read_bytes()
    assert json.loads(encode_strings(STRINGS)) == json.loads(data)
    assert decode_strings(data, STRINGS, "file") == STRINGS


def test_orbax_restores_the_strings_that_are_written(tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", STRINGS)
        changed = {name: value + "!" for name, value in STRINGS.items()}
        (tmp_path / "c" / STRINGS_FILE).write_bytes(encode_strings(changed))
        assert checkpointer.restore(tmp_path / "c") == changed


@given(st.dictionaries(st.text(st.sampled_from("a/~01") | st.characters(codec="utf-8")), st.text(), max_size=6))
def test_strings_come_back_or_are_refused(strings):
    try:
        data = encode_strings(strings)
    except errors.TreeError as error:
        assert "/" in str(error) or "~" in str(error)  # noqa: PT017 - what is refused depends on the example
        return
    assert decode_strings(data, strings, "file") == strings


def test_names_that_are_no_json_pointers_are_kept():
    assert decode_strings(encode_strings({"~/data": "x", "a~": "y"}), ["a~", "~/data"], "file") == {"a~": "y", "~/data": "x"}


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"], ["a~1b", "~x", "~0x"], ["a/b/c", "a/b"]])
def test_names_that_lead_through_each_other_are_refused(names):
    with pytest.raises(errors.TreeError, match="JSON pointers"):
        encode_strings(dict.fromkeys(names, "x"))


@pytest.mark.parametrize("data", [b"[]", b"{}", b'{"a": 1}', b'{"a": {"b": {}}}', b'{"a": ["x"]}', b'{"a"'])
def test_a_string_that_is_not_there_is_a_format_error(data):
    with pytest.raises(errors.FormatError, match=r"^dir/_strings.json: .*restore another checkpoint"):
        decode_strings(data, ["a/b"], "dir/_strings.json")
