"""The documents that describe an array: `.zarray` (zarr version 2) and `zarr.json` (version 3), emitted and parsed.

Formats: https://zarr-specs.readthedocs.io. What is parsed may come from a stranger. Nothing of it reaches TensorStore,
which a hostile document can make abort the process; TensorStore gets what `Document` says, made of checked values.
How many bytes an array may claim depends on what is stored, and is the reader's affair.
"""

from __future__ import annotations

import functools
import json
import math
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NoReturn

import attrs
import numpy as np

from ckptkit import errors
from ckptkit.options import StorageOptions
from ckptkit.storage._zarr_dtypes import V2_DTYPES, V3_DTYPES, substitute, v2_name
from ckptkit.storage.base import ArraySpec, Index

__all__ = ["DOCUMENT_NAMES", "Document", "Version", "documented", "emit", "parse", "refusal"]

Version = Literal[2, 3]
Compression = Literal["zstd"] | None

DOCUMENT_NAMES: Final[Mapping[Version, str]] = {2: ".zarray", 3: "zarr.json"}
"""The last part of a document's key."""

MAX_RANK: Final = 32
"""TensorStore's limit."""

MAX_DOCUMENT_NBYTES: Final = 1 << 20

_V3_FIELDS: Final = {
    *("zarr_format", "node_type", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value"),
    *("storage_transformers", "attributes", "dimension_names"),
}

_CODECS: Final = ("bytes", "zstd", "blosc", "gzip", "crc32c", "transpose")

_SHARD_INDEX_ENTRY_NBYTES: Final = 16
"""A shard holds an offset and a length of 8 bytes each for every chunk in it."""


def refusal(array: ArraySpec) -> str | None:
    """Why no document can describe the array, and what to do; None where one can."""
    return _refusal(array.shape, array.chunk_shape, array.dtype)


@functools.lru_cache(maxsize=1024)  # a model has thousands of arrays and dozens of shapes
def _refusal(shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
    if dtype.name not in V3_DTYPES:
        return f"dtype {dtype} has no representation in zarr: {substitute(dtype)}."
    if len(shape) > MAX_RANK:
        return f"{len(shape)} axes are more than the {MAX_RANK} that zarr readers take: reshape it."
    if _padded_nbytes(shape, chunk_shape, dtype) > sys.maxsize:
        return f"shape {shape} in chunks of {chunk_shape} is larger than any file system."
    return None


@attrs.frozen(eq=False, slots=False)  # slots would leave no room for cached properties
class Document:
    """What a document says about how one array is stored.

    Attributes:
      version: of zarr.
      shape: of the array.
      chunk_shape: of a cell of the grid; every stored chunk decodes to a whole cell, at the array's end too.
      dtype: of the values in memory, in this machine's byte order.
      data_type: the document's word for the stored dtype.
      separator: between the numbers in a chunk's key.
      key_prefix: whether a chunk's key begins with 'c'.
      codecs: version 2: `[order, compressor]`; version 3: the chain of codecs; without their tuning parameters, which
        only a writer needs.
      fill: the value of what is not stored, as JSON; None where the document names none.
      raw: whether a stored chunk is the cell's bytes as they are in memory.
      shard_index_nbytes: of the list of chunks that each shard holds; 0 where chunks are no shards.
    """

    version: Version
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    data_type: str
    separator: str
    key_prefix: bool
    codecs: Sequence[Any]
    fill: Any
    raw: bool
    shard_index_nbytes: int = 0

    @functools.cached_property
    def cell_nbytes(self) -> int:
        """Bytes of one decoded chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @functools.cached_property
    def stored_nbytes(self) -> tuple[int, int]:
        """The least and the most bytes that a stored chunk can have; no codec adds more than a small header to each part."""
        if self.raw:
            return self.cell_nbytes, self.cell_nbytes
        return self.shard_index_nbytes, 2 * (self.cell_nbytes + self.shard_index_nbytes) + 4096

    @functools.cached_property
    def is_blosc(self) -> bool:
        """Whether a stored chunk begins with a header of blosc."""
        names = [codec.get("id", codec.get("name")) for codec in self.codecs if isinstance(codec, dict)]
        return "blosc" in names

    @functools.cached_property
    def padded_nbytes(self) -> int:
        """Bytes of all chunks, decoded."""
        return _padded_nbytes(self.shape, self.chunk_shape, self.dtype)

    @functools.cached_property
    def chunk_count(self) -> int:
        """How many chunks the array has, stored or not."""
        return math.prod(-(-n // c) for n, c in zip(self.shape, self.chunk_shape, strict=True))

    def chunk_key(self, index: Index) -> str:
        """The key, below the array's, of the chunk whose cell begins where `index` begins."""
        numbers = [str(start // size) for (start, _), size in zip(index, self.chunk_shape, strict=True)]
        if self.key_prefix:
            numbers.insert(0, "c")
        return self.separator.join(numbers) if numbers else "0"

    def stacked(self, count: int) -> dict[str, Any]:
        """The metadata of an array of `count` such cells along a new first axis, one chunk each, at keys 'i.0.0...'."""
        cell = list(self.chunk_shape)
        common = {"zarr_format": self.version, "shape": [count, *cell], "fill_value": self.fill}
        if self.version == 2:
            order, compressor = self.codecs
            return common | {
                "chunks": [1, *cell],
                "dtype": self.data_type,
                "order": order,
                "compressor": compressor,
                "filters": None,
                "dimension_separator": ".",
            }
        return common | {
            "node_type": "array",
            "data_type": self.data_type,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, *cell]}},
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "codecs": [_stacked_codec(codec) for codec in self.codecs],
        }

    def filled(self) -> dict[str, Any]:
        """The metadata of an array of one value, which is not stored."""
        codecs = ["C", None] if self.version == 2 else [{"name": "bytes", "configuration": {"endian": "little"}}]
        return attrs.evolve(self, shape=(), chunk_shape=(), codecs=codecs).stacked(1)


def emit(array: ArraySpec, version: Version, compression: Compression = None, *, crc32c: bool = False) -> bytes:
    """The document of an array stored in C order, little-endian, with nothing left out."""
    return _emit(array.shape, array.chunk_shape, array.dtype, version, compression, crc32c)


@functools.lru_cache(maxsize=1024)
def _emit(
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    version: Version,
    compression: Compression,
    crc32c: bool,  # noqa: FBT001 - the cache takes it in any order
) -> bytes:
    fields = _fields_v2(shape, chunk_shape, dtype) if version == 2 else _fields_v3(shape, chunk_shape, dtype)
    if compression is not None and version == 2:
        fields["compressor"] = {"id": compression, "level": 1}
    elif compression is not None:
        fields["codecs"].append({"name": compression, "configuration": {"level": 1}})
    if crc32c:
        fields["codecs"].append({"name": "crc32c"})
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def documented(arrays: Sequence[ArraySpec], options: StorageOptions) -> Iterator[tuple[ArraySpec, Document, bytes]]:
    """Each array with its document, parsed and as bytes; those that are the same are parsed once. 'auto' compresses nothing."""
    version: Version = 3 if options.use_zarr3 else 2
    compression = None if options.compression == "auto" else options.compression
    parsed = functools.cache(functools.partial(parse, version=version))
    for array in arrays:
        data = emit(array, version, compression, crc32c=options.zarr3_crc32c)
        document = parsed(data)
        assert document is not None  # narrows the type: what `emit` made is an array
        yield array, document, data


def _fields_v2(shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": shape,
        "chunks": chunk_shape,
        "dtype": v2_name(dtype),
        "compressor": None,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }


def _fields_v3(shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: np.dtype[Any]) -> dict[str, Any]:
    little: dict[str, Any] = {"name": "bytes"} | ({"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {})
    zero = {"b": False, "i": 0, "u": 0, "c": [0.0, 0.0]}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [little],
        "fill_value": 0 if dtype.name in ("int2", "int4") else zero.get(dtype.kind, 0.0),
    }


def parse(data: bytes, version: Version) -> Document | None:
    """The document in `data`, every value of it checked; None where it describes a group, not an array.

    Raises:
      errors.FormatError: it is no document of this version, or says what is not understood; does not say where.
    """
    fields = _json_object(data)
    if fields.get("zarr_format") != version:
        _fail("zarr_format", fields.get("zarr_format"), str(version))
    if version == 2:
        return _parse_v2(fields)
    if _one_of(fields, "node_type", ("array", "group")) == "group":
        return None
    return _parse_v3(fields)


def _parse_v2(fields: Mapping[str, Any]) -> Document:
    shape, chunk_shape = _grid(fields.get("shape"), fields.get("chunks"))
    data_type = fields.get("dtype")
    dtype = _dtype(data_type, V2_DTYPES, shape, chunk_shape)
    if fields.get("filters") not in (None, []):
        _fail("filters", fields["filters"], "none")
    order = _one_of(fields, "order", ("C", "F"))
    compressor = _compressor(fields.get("compressor"))
    return Document(
        version=2,
        shape=shape,
        chunk_shape=chunk_shape,
        dtype=dtype,
        data_type=str(data_type),
        separator=_one_of(fields, "dimension_separator", (".", "/"), default="."),
        key_prefix=False,
        codecs=[order, compressor],
        fill=_fill(fields.get("fill_value")),
        raw=compressor is None and order == "C" and not str(data_type).startswith(">"),
    )


def _parse_v3(fields: Mapping[str, Any]) -> Document:
    for field in fields.keys() - _V3_FIELDS:
        if not (isinstance(fields[field], dict) and fields[field].get("must_understand") is False):
            _fail("a field", field, "none that this version does not know, unless it says 'must_understand': false")
    if fields.get("storage_transformers") not in (None, []):
        _fail("storage_transformers", fields["storage_transformers"], "none")
    grid = _named(fields.get("chunk_grid"), "chunk_grid", ("regular",))
    shape, chunk_shape = _grid(fields.get("shape"), grid["configuration"].get("chunk_shape"))
    dtype = _dtype(fields.get("data_type"), V3_DTYPES, shape, chunk_shape)
    keys = _named(fields.get("chunk_key_encoding"), "chunk_key_encoding", ("default", "v2"))
    default_keys = keys["name"] == "default"
    codecs = _codec_chain(fields.get("codecs"), chunk_shape, "sharding_indexed")
    return Document(
        version=3,
        shape=shape,
        chunk_shape=chunk_shape,
        dtype=dtype,
        data_type=dtype.name,
        separator=_one_of(keys["configuration"], "separator", (".", "/"), default="/" if default_keys else "."),
        key_prefix=default_keys,
        codecs=codecs,
        fill=_fill(fields.get("fill_value")),
        raw=codecs == [{"name": "bytes", "configuration": {"endian": "little"}}],
        shard_index_nbytes=_shard_index_nbytes(codecs, chunk_shape),
    )


def _fail(field: str, found: object, expected: str) -> NoReturn:
    raise errors.FormatError(f"{field} is {reprlib.repr(found)}, expected {expected}")


def _json_object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_DOCUMENT_NBYTES:
        raise errors.FormatError(f"it has {len(data)} bytes, more than the {MAX_DOCUMENT_NBYTES} that a document may have")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise errors.FormatError(f"it is not JSON: {error}") from error
    if not isinstance(fields, dict):
        _fail("it", fields, "a JSON object")
    return fields


def _grid(shape: object, chunk_shape: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes, cell = _sizes("shape", shape, least=0), _sizes("the chunk shape", chunk_shape, least=1)
    if len(sizes) != len(cell):
        _fail("the chunk shape", chunk_shape, f"as many sizes as shape {list(sizes)} has")
    return sizes, cell


def _sizes(field: str, value: object, least: int) -> tuple[int, ...]:
    if isinstance(value, list) and len(value) <= MAX_RANK and all(type(n) is int and least <= n <= sys.maxsize for n in value):
        return tuple(value)
    _fail(field, value, f"a list of at most {MAX_RANK} integers from {least} to {sys.maxsize}")


def _dtype(
    name: object, known: Mapping[str, np.dtype[Any]], shape: tuple[int, ...], chunk_shape: tuple[int, ...]
) -> np.dtype[Any]:
    dtype = known.get(name) if isinstance(name, str) else None
    if dtype is None:
        _fail("the dtype", name, "a boolean, integer, float or complex dtype of zarr")
    if _padded_nbytes(shape, chunk_shape, dtype) > sys.maxsize:
        _fail("shape", shape, "fewer bytes in all than any file system holds")
    return dtype


def _padded_nbytes(shape: Sequence[int], chunk_shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Bytes of all cells of the grid; an empty axis counts as one cell, since numpy multiplies the others all the same."""
    cells = (max(1, -(-n // c)) * c for n, c in zip(shape, chunk_shape, strict=True))
    return math.prod(cells) * dtype.itemsize


def _one_of(fields: Mapping[str, Any], field: str, choices: Sequence[str], default: str | None = None) -> str:
    value = fields.get(field, default)
    if not isinstance(value, str) or value not in choices:
        _fail(field, value, " or ".join(map(repr, choices)))
    return value


def _compressor(value: object) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        _fail("compressor", value, "null or an object")
    return {"id": _one_of(value, "id", ("zstd", "blosc", "zlib", "gzip", "bz2"))}


def _fill(value: object) -> Any:
    """The fill value, short enough to hand on; whether it suits the dtype is TensorStore's to say when it is needed."""
    scalars = value if isinstance(value, list) and len(value) == 2 else [value]
    for scalar in scalars:
        if not (scalar is None or isinstance(scalar, bool | int | float) or (isinstance(scalar, str) and len(scalar) <= 64)):
            _fail("fill_value", value, "a number, or a pair of numbers")
    return value


def _named(value: object, field: str, names: Sequence[str]) -> dict[str, Any]:
    """A version 3 extension point: `{"name": one of names, "configuration": {...}}`, the latter empty where absent."""
    if not isinstance(value, dict):
        _fail(field, value, f"an object with the name {' or '.join(map(repr, names))}")
    configuration = value.get("configuration", {})
    if not isinstance(configuration, dict):
        _fail(f"the configuration of {field}", configuration, "an object")
    return {"name": _one_of(value, "name", names), "configuration": configuration}


def _codec_chain(value: object, cell: tuple[int, ...], *outer: str) -> list[dict[str, Any]]:
    """The codecs of a chunk of shape `cell`, checked, without tuning parameters; `outer` may occur beside the usual ones."""
    if not isinstance(value, list) or not 0 < len(value) <= 16:
        _fail("codecs", value, "a list of 1 to 16 codecs")
    chain = []
    for each in value:
        codec = _codec(each, cell, (*_CODECS, *outer))
        if codec["name"] == "transpose":
            cell = tuple(cell[axis] for axis in codec["configuration"]["order"])
        chain.append(codec)
    names = [codec["name"] for codec in chain]
    if "blosc" in names and (not outer or names[names.index("blosc") + 1 :] not in ([], ["crc32c"])):
        _fail(
            "codecs", names, "blosc last but for crc32c, and in no shard, since its chunks say themselves how large they become"
        )
    return chain


def _codec(value: object, cell: tuple[int, ...], names: Sequence[str]) -> dict[str, Any]:
    codec = _named(value, "a codec", names)
    match codec["name"]:
        case "bytes":
            endian = _one_of(codec["configuration"], "endian", ("little", "big"), default="little")
            return codec | {"configuration": {"endian": endian}}
        case "transpose":
            return codec | {"configuration": {"order": _permutation(codec["configuration"].get("order"), len(cell))}}
        case "sharding_indexed":
            return codec | {"configuration": _sharding(codec["configuration"], cell)}
    return {"name": codec["name"]}


def _permutation(order: object, rank: int) -> list[int]:
    if isinstance(order, list) and all(type(axis) is int for axis in order) and sorted(order) == list(range(rank)):
        return order
    _fail("the order of codec transpose", order, f"a permutation of {rank} axes")


def _sharding(configuration: Mapping[str, Any], cell: tuple[int, ...]) -> dict[str, Any]:
    inner = _sizes("the chunk shape in a shard", configuration.get("chunk_shape"), least=1)
    if len(inner) != len(cell) or any(c % n for c, n in zip(cell, inner, strict=True)):
        _fail("the chunk shape in a shard", inner, f"sizes that divide the shard's {list(cell)}")
    return {
        "chunk_shape": list(inner),
        "codecs": _codec_chain(configuration.get("codecs"), inner),
        "index_codecs": _codec_chain(configuration.get("index_codecs"), (*cell, 2)),
        "index_location": _one_of(configuration, "index_location", ("start", "end"), default="end"),
    }


def _shard_index_nbytes(codecs: Sequence[Mapping[str, Any]], cell: tuple[int, ...]) -> int:
    """Bytes of the list of chunks that each shard holds; 0 where chunks are no shards."""
    inner = [codec["configuration"]["chunk_shape"] for codec in codecs if codec["name"] == "sharding_indexed"]
    counts = [math.prod(cell) // math.prod(shape) for shape in inner]
    return int(sum(counts)) * _SHARD_INDEX_ENTRY_NBYTES


def _stacked_codec(codec: Mapping[str, Any]) -> dict[str, Any]:
    """The codec for a cell with one more axis, of length 1, in front: the encoded bytes are the same."""
    configuration = dict(codec.get("configuration", {}))
    if "order" in configuration:
        configuration["order"] = [0, *(axis + 1 for axis in configuration["order"])]
    if "chunk_shape" in configuration:
        configuration["chunk_shape"] = [1, *configuration["chunk_shape"]]
        configuration |= {key: [_stacked_codec(c) for c in configuration[key]] for key in ("codecs", "index_codecs")}
    return {"name": codec["name"]} | ({"configuration": configuration} if configuration else {})
