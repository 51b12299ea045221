"""`_sharding`: the records that Orbax writes, and shardings made from them."""

from __future__ import annotations

import base64
import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint._src.metadata import sharding as orbax_sharding

from ckptkit import errors
from ckptkit.metadata.sharding import SHARDING_FILE, ShardingMetadata, decode_file, encode_file, encode_sharding, to_jax

P = PartitionSpec


def meshes():
    devices = np.array(jax.devices())
    explicit = (AxisType.Explicit, AxisType.Explicit)
    return {
        "grid": Mesh(devices.reshape(4, 2), ("x", "y")),
        "explicit": jax.make_mesh((2, 4), ("x", "y"), axis_types=explicit),
        "reversed": Mesh(devices[::-1].reshape(4, 2), ("x", "y")),
        "subset": Mesh(devices[2:6].reshape(2, 2, 1), ("x", "y", "z")),
        "point": Mesh(devices[3], ()),
    }


SPECS = [P(), P("x"), P("x", "y"), P(None, "y"), P(("x", "y")), P(("y", "x"), None), P(None, None)]


def shardings():
    found = [SingleDeviceSharding(device) for device in jax.devices()]
    for name, mesh in meshes().items():
        found += [NamedSharding(mesh, spec) for spec in (SPECS if name != "point" else SPECS[:1])]
    return found


@pytest.mark.parametrize("sharding", shardings(), ids=str)
def test_the_record_is_the_one_that_orbax_writes(sharding):
    assert encode_sharding(sharding) == json.loads(orbax_sharding.from_jax_sharding(sharding).to_serialized_string())


@pytest.mark.parametrize("sharding", shardings(), ids=str)
def test_a_sharding_comes_back_equal(sharding):
    assert to_jax(encode_sharding(sharding)) == sharding


@pytest.mark.parametrize("sharding", shardings(), ids=str)
def test_orbax_makes_the_sharding_from_our_record(sharding):
    text = json.loads(encode_file({"a": encode_sharding(sharding)}))["YQ=="]
    assert orbax_sharding.from_serialized_string(text).to_jax_sharding() == sharding


def test_reads_and_writes_the_file_of_orbax(tmp_path):
    grid = meshes()["grid"]
    tree = {"one": jnp.ones(2), "größe/x": jax.device_put(jnp.ones((8, 8)), NamedSharding(grid, P("x", "y"))), "n": np.ones(1)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
    data = (tmp_path / "c" / SHARDING_FILE).read_bytes()
    records = decode_file(data, SHARDING_FILE)
    assert {name: to_jax(record) for name, record in records.items()} == {k: tree[k].sharding for k in ("one", "größe/x")}
    ours = json.loads(encode_file({name: encode_sharding(tree[name].sharding) for name in records}))
    assert {k: json.loads(v) for k, v in ours.items()} == {k: json.loads(v) for k, v in json.loads(data).items()}


@given(st.dictionaries(st.text(), st.sampled_from([{"a": [1]}, {}, {"sharding_type": "x"}])))
def test_a_file_round_trip(records):
    assert decode_file(encode_file(records), SHARDING_FILE) == records


def test_equal_shardings_share_one_record_all_the_way():
    records = {str(i): encode_sharding(NamedSharding(meshes()["grid"], P("x"))) for i in range(3)}
    assert len({id(record) for record in records.values()}) == 1
    back = decode_file(encode_file(records), SHARDING_FILE)
    assert len({id(record) for record in back.values()}) == 1


def test_what_orbax_cannot_record_has_no_record():
    grid = meshes()["grid"]
    assert encode_sharding(NamedSharding(grid, P(P.UNCONSTRAINED, "x"))) is None
    assert encode_sharding(NamedSharding(meshes()["explicit"], P("x", unreduced={"y"}))) is None
    assert encode_sharding(NamedSharding(jax.sharding.AbstractMesh((2,), ("x",)), P("x"))) is None
    assert encode_sharding(NamedSharding(Mesh(np.array(jax.devices()), (1,)), P())) is None


@pytest.mark.parametrize("text", ["cpu:3", "TFRT_CPU_3", "CPU_3(process=0,(0,0))"])
def test_names_that_jax_has_had_for_a_device(text):
    assert to_jax({"sharding_type": "SingleDeviceSharding", "device_str": text}) == SingleDeviceSharding(jax.devices()[3])


def test_a_record_without_devices_and_axis_types_means_all_devices():
    record = {"sharding_type": "NamedSharding", "shape": [8], "axis_names": ["x"], "partition_spec": ["x"]}
    assert to_jax(record) == NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))


def named(**changes):
    record = encode_sharding(NamedSharding(meshes()["grid"], P("x", "y")))
    assert record is not None
    return {**record, **changes}


@pytest.mark.parametrize(
    ("record", "missing"),
    [
        ({"sharding_type": "SingleDeviceSharding", "device_str": "cuda:0"}, "'cuda:0'"),
        ({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:8"}, "'cpu:8'"),
        ({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:" + "9" * 5_000}, "'cpu:99"),
        ({"sharding_type": "SingleDeviceSharding", "device_str": "TPU_0(process=0,(0,0,0,0))"}, "'TPU_0"),
        ({"sharding_type": "SingleDeviceSharding", "device_str": "somewhere"}, "'somewhere'"),
        (named(shape=[2], axis_names=["x"], axis_types=None, device_mesh={"mesh": [{"id": 7}, {"id": 8}]}), r"ids \[8\]"),
        (named(shape=[2**40], axis_names=["x"], device_mesh=None), "mesh of 1099511627776 devices"),
        (named(axis_types=["AxisType.Auto", "AxisType.Tomorrow"]), "'AxisType.Tomorrow'"),
        ({"sharding_type": "PositionalSharding"}, "'PositionalSharding'"),
    ],
)
def test_devices_that_are_not_here_are_a_topology_error_with_the_way_out(record, missing):
    for _ in range(2):
        with pytest.raises(errors.TopologyError, match=rf"^Topology mismatch detected\. .*{missing}.*fallback_sharding="):
            to_jax(record)


@pytest.mark.parametrize(
    "record",
    [
        {},
        [],
        None,
        {"sharding_type": 3},
        {"sharding_type": "SingleDeviceSharding"},
        {"sharding_type": "SingleDeviceSharding", "device_str": None},
        {"sharding_type": "SingleDeviceSharding", "device_str": object()},
        {"sharding_type": "NamedSharding"},
        named(shape=[4]),
        named(shape=[4, 2.0]),
        named(shape=[0, 2], device_mesh={"mesh": []}),
        named(shape=[2**62, 2**62]),
        named(shape=[1] * 100_000, axis_names=[str(i) for i in range(100_000)]),
        named(axis_names=["x", "x"]),
        named(axis_names=["x", 1]),
        named(axis_names="xy"),
        named(axis_types="Auto"),
        named(axis_types=["AxisType.Auto"]),
        named(axis_types=[1, 2]),
        named(partition_spec=None),
        named(partition_spec=["x", "x"]),
        named(partition_spec=["z"]),
        named(partition_spec=[1]),
        named(partition_spec=[["x", ["y"]]]),
        named(partition_spec=[{"x": 1}]),
        named(device_mesh=[]),
        named(device_mesh={}),
        named(device_mesh={"mesh": [{"id": "0"}] * 8}),
        named(device_mesh={"mesh": [{"id": 0}] * 8}),
        named(device_mesh={"mesh": [{"id": 0}]}),
        named(device_mesh={"mesh": [{"id": True}] * 8}),
        named(device_mesh={"mesh": {"id": 0}}),
    ],
)
def test_a_malformed_record_is_a_format_error(record):
    for _ in range(2):
        with pytest.raises(errors.FormatError, match=r"^file: .*restore another checkpoint"):
            to_jax(record, "file")


def test_a_record_of_any_depth_is_a_format_error():
    deep: list = [{"id": 0}]
    for _ in range(5_000):
        deep = [deep]
    with pytest.raises(errors.FormatError):
        to_jax(named(device_mesh={"mesh": deep}))


parts = st.recursive(
    st.none() | st.integers(-1, 9) | st.sampled_from(["x", "y", "cpu:0", "AxisType.Auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "mesh"]), inner, max_size=2),
    max_leaves=6,
)


@given(st.sampled_from(["shape", "axis_names", "axis_types", "partition_spec", "device_mesh"]), parts, st.booleans())
def test_any_record_is_a_sharding_or_one_of_our_errors(field, value, single):
    record = {"sharding_type": "SingleDeviceSharding", "device_str": value} if single else named(**{field: value})
    with contextlib.suppress(errors.FormatError, errors.TopologyError):
        assert isinstance(to_jax(record), jax.sharding.Sharding)


def key(name):
    return base64.urlsafe_b64encode(name).decode()


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"{",
        b'{"YQ==": {"sharding_type": "x"}}',
        b'{"YQ==": null}',
        b'{"YQ==": "[]"}',
        b'{"YQ==": "{"}',
        b'{"YQ==": "\\ud800"}',
        b'{"YQ": "{}"}',
        b'{"Y!Q=": "{}"}',
        '{"é": "{}"}'.encode(),
        b'{"\\ud800": "{}"}',
        json.dumps({key(b"\xff\xfe"): "{}"}).encode(),
        json.dumps({"YQ==": "[" * 100_000}).encode(),
    ],
)
def test_a_malformed_file_is_a_format_error(data):
    with pytest.raises(errors.FormatError, match=r"^dir/_sharding: .*restore another checkpoint"):
        decode_file(data, "dir/_sharding")


def test_a_name_that_utf8_cannot_hold_is_refused():
    with pytest.raises(errors.TreeError, match=r"'a\\ud800'"):
        encode_file({"a\ud800": {}})


def test_the_wrapper_makes_the_sharding():
    sharding = NamedSharding(meshes()["grid"], P("x"))
    record = ShardingMetadata(encode_sharding(sharding))
    assert record.to_jax_sharding() == sharding
    assert record == ShardingMetadata(json.loads(json.dumps(record.document)))
