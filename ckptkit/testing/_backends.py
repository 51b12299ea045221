"""Arrays through a storage backend by hand, as the pipeline would, and what a directory holds."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptkit.options import StorageOptions
from ckptkit.storage import ArraySpec, Chunk, Index, Job, Location, StorageBackend, chunk_indices

__all__ = ["Stored", "array", "beside", "bits", "chunks", "files", "grid", "read", "snapshot", "write"]

TIMEOUT_SECS = 120
"""No future of a backend may take longer."""

_USED_BITS = {"bool": 1, "int2": 3, "uint2": 3, "int4": 15, "uint4": 15}
"""Of dtypes whose elements take a byte and mean less than one."""

Array = npt.NDArray[Any]


class Stored(NamedTuple):
    """An array to store: its values, and how it is cut."""

    spec: ArraySpec
    values: Array


def bits(shape: tuple[int, ...], dtype: Any, seed: int) -> Array:
    """Random bits of a dtype: no two chunks are alike, and NaNs have payloads."""
    dtype = np.dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    values: Array = (raw & _USED_BITS.get(dtype.name, 255)).view(dtype).reshape(shape)
    return values


def array(name: str, shape: tuple[int, ...], dtype: Any = np.float32, chunk_shape: tuple[int, ...] = (), seed: int = 0) -> Stored:
    """An array of random bits, as one chunk unless a chunk's shape is given."""
    spec = ArraySpec(name, shape, np.dtype(dtype), tuple(max(1, n) for n in chunk_shape or shape))
    return Stored(spec, bits(shape, dtype, seed))


def grid(count: int) -> list[Stored]:
    """Many tiny arrays."""
    return [array(f"layer.{i}", (4,), seed=i) for i in range(count)]


def chunks(stored: Stored) -> Iterator[Chunk]:
    """The chunks of an array, in C order, each with values of its own."""
    for index in chunk_indices(stored.spec):
        yield Chunk(stored.spec, index, cell(stored.values, index))


def cell(values: Array, index: Index) -> Array:
    """A C-contiguous copy of a part of an array."""
    return np.array(values[tuple(slice(*bounds) for bounds in index)], order="C")


def write(backend: StorageBackend, location: Location, arrays: Sequence[Stored]) -> None:
    """Stores arrays, each with one call for all of its chunks."""
    writer = backend.writer(location, [stored.spec for stored in arrays], StorageOptions(), Job())
    for stored in arrays:
        writer.write(list(chunks(stored)))
    writer.commit()


def read(backend: StorageBackend, location: Location, arrays: Sequence[Stored]) -> None:
    """Reads arrays back.

    Raises:
      AssertionError: one differs from what was stored; names it.
    """
    reader = backend.reader(location)
    try:
        listed = reader.arrays()
        for spec, _ in arrays:
            assert listed.get(spec.name) == spec, f"arrays() says {listed.get(spec.name)} of what was written as {spec}"
        requests = [(s.spec.name, i, np.empty_like(cell(s.values, i))) for s in arrays for i in chunk_indices(s.spec)]
        reader.read(requests).result(TIMEOUT_SECS)
    finally:
        reader.close()
    values = {stored.spec.name: stored.values for stored in arrays}
    for name, index, out in requests:
        assert out.tobytes() == cell(values[name], index).tobytes(), f"chunk {index} of array {name!r} came back with other bytes"


def files(location: Location) -> Mapping[tuple[Location, str], bytes]:
    """Every file below a directory: the directory that it lies in, its name, and its bytes."""
    found: dict[tuple[Location, str], bytes] = {}
    for name, is_directory in sorted(location.names().items()):
        if is_directory:
            found.update(files(location.child(name)))
        else:
            found[location, name] = location.read_bytes(name)
    return found


def snapshot(location: Location) -> dict[str, bytes]:
    """Every file below a directory by its whole path, to compare before and after."""
    return {f"{directory.url}/{name}": data for (directory, name), data in files(location).items()}


def beside(location: Location) -> list[str]:
    """What lies in the directory above this one and is not this one; nothing where there are no directories."""
    path = location.local_path
    if path is None:
        return []
    above, own = os.path.split(path)
    return sorted(os.path.join(root, name) for root, _, names in os.walk(above) for name in names if f"/{own}/" not in f"{root}/")
