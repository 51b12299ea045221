"""`_sharding`: where arrays lived, as JSON and back as `jax.sharding.Sharding`s of the devices that are here."""

from __future__ import annotations

import binascii
import functools
import math
import re
import reprlib
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import attrs
import jax
import numpy as np
import orjson
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from ckptkit import errors
from ckptkit.metadata.json import dump, expect, load, malformed, shape_of, unexpected

__all__ = ["SHARDING_FILE", "ShardingMetadata", "decode_file", "encode_file", "encode_sharding", "to_jax"]

SHARDING_FILE = "_sharding"

_AXIS_TYPES = {str(kind): kind for kind in AxisType}
_MAX_AXES = 64  # numpy has no arrays of more
_URL_SAFE = bytes.maketrans(b"+/", b"-_")
_ADVICE = (
    "Say where to put the arrays: pass devices='local' (the first device here), devices='numpy' or fallback_sharding= to the "
    "restore, or a target whose leaves carry shardings."
)


@attrs.frozen
class ShardingMetadata:
    """A sharding as a checkpoint records it; its devices need not be here.

    Attributes:
      document: the record, JSON.
    """

    document: Mapping[str, Any]

    def to_jax_sharding(self) -> Sharding:
        """The sharding, on the devices that are here.

        Raises:
          errors.TopologyError: a device that it needs is not here.
          errors.FormatError: the record is malformed.
        """
        return to_jax(self.document)


@functools.lru_cache(maxsize=1024)
def encode_sharding(sharding: Sharding) -> dict[str, Any] | None:
    """The record of a sharding, shared between equal ones and not to be changed; None for one that Orbax cannot record.

    Memory kinds are not recorded. Unreduced and unconstrained axes, abstract meshes and other classes have no record.
    """
    if isinstance(sharding, SingleDeviceSharding):
        (device,) = sharding.device_set
        return {"sharding_type": "SingleDeviceSharding", "device_str": str(device)}
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return _encode_named(sharding.mesh, sharding.spec)
    return None


def _encode_named(mesh: Mesh, spec: PartitionSpec) -> dict[str, Any] | None:
    if getattr(spec, "unreduced", None) or getattr(spec, "reduced", None):  # newer than the oldest jax that we take
        return None
    axes = [list(axis) if isinstance(axis, tuple) else axis for axis in spec]
    if not all(isinstance(name, str) for name in mesh.axis_names) or PartitionSpec.UNCONSTRAINED in axes:
        return None
    return {
        "sharding_type": "NamedSharding",
        "shape": list(mesh.devices.shape),
        "axis_names": list(mesh.axis_names),
        "axis_types": [str(kind) for kind in mesh.axis_types],
        "partition_spec": axes,
        "device_mesh": {"mesh": _device_ids(mesh.devices.tolist())},
    }


def _device_ids(devices: Any) -> Any:
    """Nested lists of devices as nested lists of their ids, as deep as the mesh has axes."""
    return [_device_ids(item) for item in devices] if isinstance(devices, list) else {"id": devices.id}


def to_jax(document: Mapping[str, Any], where: str = SHARDING_FILE) -> Sharding:
    """The sharding that a record describes, on the devices that are here; remembered, whatever came of it.

    Raises:
      errors.TopologyError: a device that it needs is not here, or it is of a class that this version cannot make.
      errors.FormatError: the record is malformed.
    """
    try:
        canonical = orjson.dumps(document, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError as error:
        raise unexpected(where, "a sharding", document, f"plain JSON ({error})") from error
    made = _made(canonical, where)
    if isinstance(made, errors.CheckpointError):
        raise type(made)(*made.args)
    return made


@functools.lru_cache(maxsize=1024)
def _made(canonical: bytes, where: str) -> Sharding | errors.CheckpointError:
    """The sharding of a record, or why there is none."""
    document = orjson.loads(canonical)
    try:
        kind = expect(expect(document, dict, "a sharding", where).get("sharding_type"), str, "sharding_type", where)
        if kind == "SingleDeviceSharding":
            return SingleDeviceSharding(_single_device(expect(document.get("device_str"), str, "device_str", where)))
        if kind == "NamedSharding":
            return _named(document, where)
        return _mismatch(f"An array was saved with a {reprlib.repr(kind)}, which cannot be made here")
    except errors.CheckpointError as error:
        return error.with_traceback(None)  # what is remembered must not keep frames alive


def _mismatch(found: str) -> errors.TopologyError:
    return errors.TopologyError(f"Topology mismatch detected. {found}. {_ADVICE}")


def _single_device(text: str) -> jax.Device:
    """The device here that the text names: 'cpu:0', 'cuda:1', 'TPU_3(process=0,(1,1,0,0))', or older jax's 'TFRT_CPU_0'."""
    match = re.fullmatch(r"(?:TFRT_)?([A-Za-z]+)[:_](\d{1,9})(?:\(.*\))?", text, re.ASCII)
    here = {(_family(device.platform), device.id): device for device in _local_devices()}
    device = here.get((_family(match[1]), int(match[2]))) if match else None
    if device is None:
        raise _mismatch(f"An array was saved on the device {reprlib.repr(text)}; here are {_named_devices(list(here.values()))}")
    return device


def _family(platform: str) -> str:
    """One word for the names that jax has had for a platform."""
    name = platform.lower()
    return "gpu" if name in ("cuda", "rocm") else name


def _local_devices() -> Iterator[jax.Device]:
    """The devices of this process, and its CPU, where an array may be though accelerators are the default."""
    yield from jax.local_devices()
    try:
        yield from jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return


def _named_devices(devices: Sequence[jax.Device]) -> str:
    return f"{len(devices)}: {reprlib.repr([str(device) for device in devices])}"


def _named(document: dict[str, Any], where: str) -> NamedSharding:
    shape = shape_of(document.get("shape"), "shape of a mesh", where)
    names = [expect(name, str, "an axis name", where) for name in expect(document.get("axis_names"), list, "axis_names", where)]
    if not len(set(names)) == len(names) == len(shape) <= _MAX_AXES:
        raise unexpected(where, "axis_names", names, f"a different name for each of at most {_MAX_AXES} axes")
    devices = _mesh_devices(document.get("device_mesh"), math.prod(shape), where)
    axis_types = _axis_types(document.get("axis_types"), where)
    axes = _axes(document.get("partition_spec"), where)
    try:
        mesh = Mesh(np.array(devices, dtype=object).reshape(shape), names, axis_types=axis_types)
        return NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]  # jax leaves it untyped
    except Exception as error:  # jax's own for an axis used twice is an Exception and nothing more
        raise malformed(where, f"a sharding that jax refuses ({error})") from error


def _axis_types(value: Any, where: str) -> tuple[AxisType, ...] | None:
    """The kinds of a mesh's axes; None, which is jax's default, where the writer was older than they are."""
    names = [expect(name, str, "an axis type", where) for name in expect(value or [], list, "axis_types", where)]
    unknown = [name for name in names if name not in _AXIS_TYPES]
    if unknown:
        raise _mismatch(f"An array was saved on a mesh with an axis of type {reprlib.repr(unknown[0])}, which this jax lacks")
    return tuple(_AXIS_TYPES[name] for name in names) or None


def _axes(value: Any, where: str) -> list[Any]:
    """The arguments of a PartitionSpec: for each axis of the array a mesh axis, several, or None."""
    axes = [tuple(axis) if isinstance(axis, list) else axis for axis in expect(value, list, "partition_spec", where)]
    for axis in axes:
        for name in axis if isinstance(axis, tuple) else (axis,):
            if name is not None:
                expect(name, str, "an axis in partition_spec", where)
    return axes


def _mesh_devices(value: Any, count: int, where: str) -> list[jax.Device]:
    """The devices of a mesh in C order; the first record of a mesh had no ids and meant every device."""
    if value is None:
        devices = jax.devices()
        if len(devices) != count:
            raise _mismatch(f"An array was saved on a mesh of {count} devices; here are {_named_devices(devices)}")
        return devices
    ids = list(_ids(expect(value, dict, "device_mesh", where).get("mesh"), where))
    if len(ids) != count or len(set(ids)) != len(ids) or not ids:
        raise unexpected(where, "the list of device ids", ids, f"{count} different ones")
    here = {device.id: device for device in jax.devices()}
    missing = [i for i in ids if i not in here]
    if missing:
        raise _mismatch(
            f"An array was saved on {count} devices, of which those with the ids {reprlib.repr(missing)} are missing; "
            f"here are {_named_devices(list(here.values()))}"
        )
    return [here[i] for i in ids]


def _ids(mesh: Any, where: str) -> Iterator[int]:
    if isinstance(mesh, list):
        for item in mesh:
            yield from _ids(item, where)
    else:
        yield expect(expect(mesh, dict, "a device of a mesh", where).get("id"), int, "the id of a device", where)


def encode_file(shardings: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The bytes of `_sharding`, from names of arrays and records.

    Raises:
      errors.TreeError: a name that UTF-8 cannot encode.
    """
    texts: dict[int, str] = {}
    for record in shardings.values():
        if id(record) not in texts:
            texts[id(record)] = dump(record).decode()
    try:
        lines = b"".join([binascii.b2a_base64(name.encode()) for name in shardings])  # each ends with a newline
    except UnicodeEncodeError as error:
        raise errors.TreeError(f"The leaf {error.object!a} has a name that UTF-8 cannot encode. Rename its keys.") from error
    names = lines.translate(_URL_SAFE).decode().splitlines()
    return dump(dict(zip(names, [texts[id(record)] for record in shardings.values()], strict=True)))


def decode_file(data: bytes, where: str, names: Container[str] = ()) -> dict[str, dict[str, Any]]:
    """The records of a `_sharding` file by the arrays' names; equal records are one object, and none is looked into.

    Args:
      data: the file's bytes.
      where: the file, for messages.
      names: of the arrays there are; release 0.4.0 wrote them as they are. Names in base64 cannot all be among them, since the
        longest of them is longer than what it stands for.

    Raises:
      errors.FormatError: not a JSON object of strings, a name that is not base64 of UTF-8, or a record that is not a JSON object.
    """
    records: dict[str, dict[str, Any]] = {}
    shardings = {}
    document = expect(load(data, where), dict, "the document", where)
    plain = all(name in names for name in document)
    for name, text in document.items():
        if text == "":
            continue  # an old release had no record of an array on one device
        record = records.get(expect(text, str, "a sharding", where))
        if record is None:
            record = records[text] = expect(load(text.encode(errors="replace"), where), dict, "a sharding", where)
        try:
            shardings[name if plain else _decoded(name)] = record
        except ValueError as error:
            raise malformed(where, f"the name {reprlib.repr(name)} is not base64 of UTF-8 text") from error
    return shardings


def _decoded(name: str) -> str:
    """The text of a name in base64; `base64.b64decode`, which takes three times as long, ends in the same."""
    return binascii.a2b_base64(name.replace("-", "+").replace("_", "/"), strict_mode=True).decode()
