"""What zarr documents say, what is refused of a stranger's, and that encoded chunks decode as TensorStore encodes them."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

from ckptkit import errors
from ckptkit.grid import ArraySpec
from ckptkit.storage._zarr_cells import canonicalise, decode, fill_value
from ckptkit.storage._zarr_dtypes import V3_DTYPES
from ckptkit.storage.zarr_documents import MAX_DOCUMENT_NBYTES, emit, parse, refusal

DRIVERS = {2: "zarr", 3: "zarr3"}
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BIG = {"name": "bytes", "configuration": {"endian": "big"}}

shapes = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=4)
versions = st.sampled_from([2, 3])


def document(version, **changes):
    """The fields of a good document of a 4 x 6 float32 array in chunks of 2 x 3, with changes; None removes a field."""
    fields = json.loads(emit(ArraySpec("a", (4, 6), np.dtype("f4"), (2, 3)), version))
    fields |= changes
    return {key: value for key, value in fields.items() if value is not ...}


def parsed(fields):
    return parse(json.dumps(fields).encode(), fields["zarr_format"])


def sharding(**changes):
    configuration = {"chunk_shape": [1, 3], "codecs": [LITTLE], "index_codecs": [LITTLE, {"name": "crc32c"}]}
    return {"name": "sharding_indexed", "configuration": configuration | changes}


def transpose(*order):
    return {"name": "transpose", "configuration": {"order": list(order)}}


@given(shapes, st.sampled_from(sorted(V3_DTYPES)), versions)
def test_an_emitted_document_parses_to_the_same_array(sizes, dtype, version):
    array = ArraySpec("a", tuple(n for n, _ in sizes), V3_DTYPES[dtype], tuple(c for _, c in sizes))
    found = parse(emit(array, version), version)
    assert (found.shape, found.chunk_shape, found.dtype, found.raw) == (array.shape, array.chunk_shape, array.dtype, True)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", sorted(V3_DTYPES))
def test_tensorstore_reads_an_emitted_document_as_the_same_dtype(dtype, version):
    memory = ts.KvStore.open("memory://").result()
    array = ArraySpec("a", (5, 3), V3_DTYPES[dtype], (2, 3))
    memory.write({2: ".zarray", 3: "zarr.json"}[version], emit(array, version)).result()
    opened = ts.open({"driver": DRIVERS[version]}, kvstore=memory, open=True).result()
    assert (opened.shape, opened.dtype.numpy_dtype, opened.chunk_layout.write_chunk.shape) == ((5, 3), array.dtype, (2, 3))


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        (document(2), "2.1"),
        (document(2, dimension_separator="/"), "2/1"),
        (document(2, dimension_separator=...), "2.1"),
        (document(2, shape=[], chunks=[]), "0"),
        (document(3), "c/2/1"),
        (document(3, chunk_key_encoding={"name": "default", "configuration": {"separator": "."}}), "c.2.1"),
        (document(3, chunk_key_encoding={"name": "v2"}), "2.1"),
        (document(3, chunk_key_encoding={"name": "v2", "configuration": {"separator": "/"}}), "2/1"),
        (document(3, shape=[], chunk_grid={"name": "regular", "configuration": {"chunk_shape": []}}), "c"),
    ],
)
def test_the_key_of_a_chunk_follows_the_document(fields, key):
    found = parsed(fields)
    index = ((4, 6), (3, 6))[: len(found.shape)]
    assert found.chunk_key(index) == key


@pytest.mark.parametrize(
    "fields",
    [
        document(2, compressor={"id": "zstd", "level": 1}),
        document(2, order="F"),
        document(2, dtype=">f4"),
        document(3, codecs=[BIG]),
        document(3, codecs=[LITTLE, {"name": "crc32c"}]),
        document(3, codecs=[transpose(1, 0), LITTLE]),
        document(3, codecs=[sharding()]),
    ],
)
def test_chunks_that_differ_from_memory_are_not_raw(fields):
    assert not parsed(fields).raw


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        (2, {"zarr_format": 3}),
        (2, {"shape": ...}),
        (2, {"shape": "4"}),
        (2, {"shape": [4]}),
        (2, {"shape": [-4, 6]}),
        (2, {"shape": [True, 6]}),
        (2, {"shape": [4.0, 6]}),
        (2, {"shape": [2**63, 6]}),
        (2, {"shape": [2**40, 2**40], "chunks": [2**20, 2**20]}),
        (2, {"shape": [0, 2**62], "chunks": [1, 2**62]}),
        (2, {"shape": [1] * 33, "chunks": [1] * 33}),
        (2, {"chunks": [0, 3]}),
        (2, {"chunks": [2**62, 2**62]}),
        (2, {"dtype": ...}),
        (2, {"dtype": "|O"}),
        (2, {"dtype": "<U3"}),
        (2, {"dtype": "<M8[s]"}),
        (2, {"dtype": "float8_e4m3"}),
        (2, {"dtype": [["x", "<f4"]]}),
        (2, {"dtype": 3}),
        (2, {"order": "K"}),
        (2, {"filters": [{"id": "delta"}]}),
        (2, {"compressor": "zstd"}),
        (2, {"compressor": {"id": "lzma"}}),
        (2, {"compressor": {}}),
        (2, {"dimension_separator": "-"}),
        (2, {"fill_value": {"a": 1}}),
        (2, {"fill_value": "x" * 65}),
        (3, {"node_type": "table"}),
        (3, {"data_type": "<f4"}),
        (3, {"data_type": {"name": "float32"}}),
        (3, {"chunk_grid": {"name": "rectangular", "configuration": {}}}),
        (3, {"chunk_grid": {"name": "regular"}}),
        (3, {"chunk_grid": {"name": "regular", "configuration": 1}}),
        (3, {"chunk_key_encoding": {"name": "fancy"}}),
        (3, {"chunk_key_encoding": {"name": "v2", "configuration": {"separator": ""}}}),
        (3, {"codecs": []}),
        (3, {"codecs": [LITTLE] * 17}),
        (3, {"codecs": ["bytes"]}),
        (3, {"codecs": [{"name": "bytes", "configuration": {"endian": "middle"}}]}),
        (3, {"codecs": [{"name": "pickle"}]}),
        (3, {"codecs": [transpose(0, 0), LITTLE]}),
        (3, {"codecs": [transpose(0), LITTLE]}),
        (3, {"codecs": [transpose(0, [1]), LITTLE]}),
        (3, {"codecs": [sharding(chunk_shape=[1, 2])]}),
        (3, {"codecs": [sharding(chunk_shape=[3])]}),
        (3, {"codecs": [sharding(chunk_shape=[0, 3])]}),
        (3, {"codecs": [sharding(codecs=[sharding()])]}),
        (3, {"codecs": [sharding(index_codecs=[])]}),
        (3, {"codecs": [sharding(index_location="middle")]}),
        (3, {"storage_transformers": [{"name": "sharding"}]}),
        (3, {"future": 1}),
        (3, {"future": {"must_understand": True}}),
    ],
)
def test_what_is_not_understood_is_refused(version, changes):
    data = json.dumps(document(version, **changes)).encode()
    with pytest.raises(errors.FormatError, match="expected"):
        parse(data, version)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"zarr_format":' + b"9" * 5000 + b"}", b" " * (MAX_DOCUMENT_NBYTES + 1)]
)
def test_what_is_no_json_document_is_refused(data):
    with pytest.raises(errors.FormatError):
        parse(data, 2)


def test_a_field_that_need_not_be_understood_is_skipped():
    assert parsed(document(3, future={"must_understand": False}, attributes={"x": 1})) is not None


def test_a_group_is_no_array():
    assert parsed({"zarr_format": 3, "node_type": "group"}) is None


VERSION_2 = [
    document(2, order=order, dtype=dtype, compressor=compressor)
    for order in ("C", "F")
    for dtype in ("<f4", ">f4")
    for compressor in (None, *({"id": name} for name in ("zstd", "gzip", "zlib", "bz2", "blosc")))
]
VERSION_3 = [
    document(3, codecs=codecs)
    for codecs in (
        [BIG],
        [LITTLE, {"name": "zstd", "configuration": {"level": 3}}],
        [LITTLE, {"name": "gzip", "configuration": {"level": 3}}],
        [LITTLE, {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 4}}],
        [LITTLE, {"name": "crc32c"}],
        [transpose(1, 0), LITTLE],
        [sharding()],
        [sharding(index_location="start", codecs=[transpose(1, 0), LITTLE, {"name": "zstd"}])],
        [transpose(1, 0), sharding(chunk_shape=[3, 1])],
    )
]


@pytest.mark.parametrize("fields", VERSION_2 + VERSION_3)
def test_chunks_decode_to_what_tensorstore_encoded(fields):
    values = np.random.default_rng(0).random((4, 6), np.float32)
    memory = ts.KvStore.open("memory://").result()
    metadata = {key: value for key, value in fields.items() if key not in ("zarr_format", "node_type")}
    opened = ts.open({"driver": DRIVERS[fields["zarr_format"]], "metadata": metadata}, kvstore=memory, create=True).result()
    opened.write(values).result()
    found = parsed(fields)
    keys = [found.chunk_key(((i, i + 2), (j, j + 3))) for i in (0, 2) for j in (0, 3)]
    encoded = [memory.read(key).result().value for key in keys]
    together, alone = np.empty((2, 4, 2, 3), np.float32)
    decode(found, encoded, together)
    for chunk, out in zip(encoded, alone, strict=True):
        decode(found, [chunk], [out])
    expected = [values[i : i + 2, j : j + 3] for i in (0, 2) for j in (0, 3)]
    np.testing.assert_array_equal(together, expected)
    np.testing.assert_array_equal(alone, expected)


@pytest.mark.parametrize("encoded", [b"", b"garbage", b"\0" * 4096])
@pytest.mark.parametrize("fields", VERSION_2[1:6] + VERSION_3[:8])
def test_garbage_in_a_chunk_is_an_exception(fields, encoded):
    with pytest.raises(ValueError, match=r"."):
        decode(parsed(fields), [encoded], [np.empty((2, 3), np.float32)])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (document(2), 0.0),
        (document(2, fill_value=1.5, compressor={"id": "zstd"}), 1.5),
        (document(2, fill_value="NaN"), math.nan),
        (document(3, fill_value="Infinity", codecs=[sharding()]), math.inf),
        (document(3, fill_value=[1.0, 2.0], data_type="complex64"), 1 + 2j),
    ],
)
def test_the_fill_value_is_what_the_document_says(fields, expected):
    np.testing.assert_array_equal(fill_value(parsed(fields)), expected)


@pytest.mark.parametrize(("dtype", "clean"), [("bool", [0, 1, 1, 1]), ("int4", [0, 1, 2, 15]), ("int2", [0, 1, 2, 3])])
def test_bits_that_a_dtype_does_not_use_are_cleared(dtype, clean):
    values = np.array([0, 1, 2, 255], np.uint8).view(V3_DTYPES[dtype])
    canonicalise(values)
    assert values.view(np.uint8).tolist() == clean


UNSTORABLE = ["object", "datetime64[s]", "timedelta64[s]", "S3", "U3", "V3", "i4,f4", "longdouble", "clongdouble"]
UNSTORABLE += [
    n for n in ("float8_e4m3", "float6_e2m3fn", "float6_e3m2fn", "int1", "uint1", "uint2", "uint4") if hasattr(ml_dtypes, n)
]


@pytest.mark.parametrize("name", UNSTORABLE)
def test_a_dtype_without_representation_is_refused_with_a_way_out(name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    assert "no representation in zarr: " in refusal(ArraySpec("a", (2,), dtype, (2,)))


@pytest.mark.parametrize("name", [n for n in UNSTORABLE if hasattr(ml_dtypes, n)])
def test_the_dtype_that_a_refusal_advises_holds_all_values(name):
    dtype = np.dtype(getattr(ml_dtypes, name))
    advised = refusal(ArraySpec("a", (2,), dtype, (2,))).split("cast it to ")[1].split(",")[0]
    values = np.arange(256, dtype=np.uint8).view(dtype)
    as_advised = values.astype(V3_DTYPES[advised])
    np.testing.assert_array_equal(as_advised.astype(np.float32), values.astype(np.float32))


def test_more_axes_than_tensorstore_takes_are_refused():
    assert "33 axes" in refusal(ArraySpec("a", (1,) * 33, np.dtype("f4"), (1,) * 33))
