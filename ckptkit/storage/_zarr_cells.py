"""Encoded chunks to values: compressed, transposed, sharded, byte-swapped, or not stored at all.

Chunks that share a document are decoded together, as the chunks of one array in TensorStore's memory: opening an array
costs it 0.1 to 0.6 ms, which thousands of small leaves cannot afford, and a stranger's document never reaches it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from ckptkit.grid import Array
from ckptkit.storage._expansion import blosc_nbytes
from ckptkit.storage._zarr_dtypes import V3_DTYPES
from ckptkit.storage.zarr_documents import Document

__all__ = ["DRIVERS", "canonicalise", "compresses_well", "decode", "encoded_cell", "fill_value", "stored_cell"]

DRIVERS = {2: "zarr", 3: "zarr3"}

# The bits of a byte that mean something, for dtypes that do not use all of them.
_USED_BITS = {
    dtype: bits
    for name, bits in {"int4": 0x0F, "float4_e2m1fn": 0x0F, "int2": 0x03}.items()
    if (dtype := V3_DTYPES.get(name)) is not None
}


def stored_cell(data: Array, document: Document) -> Array:
    """A chunk as it is stored uncompressed: in this machine's byte order, with zeros up to the whole cell at the array's end."""
    data = np.asarray(data, document.dtype, order="C")
    if data.shape == document.chunk_shape:
        return data
    cell = np.zeros(document.chunk_shape, document.dtype)
    cell[tuple(map(slice, data.shape))] = data
    return cell


def compresses_well(data: Array) -> bool:
    """Whether a sample of 16 KiB says that a chunk shrinks to a quarter: its bytes tell less than two bits each.

    Zeros, masks and one-hot rows do; the mantissas of trained floats do not, of which zstd saves 8 % for most of a save's time.
    """
    flat = data.reshape(-1).view(np.uint8)
    starts = np.linspace(0, max(0, flat.size - 1024), 16, dtype=np.int64)
    counts = np.bincount(np.concatenate([flat[start : start + 1024] for start in starts]), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return bool(-(shares * np.log2(shares)).sum() < 2)


def encoded_cell(data: Array, document: Document) -> Array:
    """A chunk as the bytes that are stored.

    Raises:
      Exception: TensorStore's.
    """
    cell = stored_cell(data, document)
    if document.raw:
        return cell.reshape(-1).view(np.uint8)
    context = ts.Context()
    memory = ts.KvStore.open("memory://", context=context).result()
    _open(document, document.stacked(1), memory, context).write(cell[np.newaxis]).result()
    return np.frombuffer(memory.read(f"0{'.0' * cell.ndim}").result().value, np.uint8)


def decode(document: Document, encoded: Sequence[bytes], outs: Sequence[Array]) -> None:
    """Fills each array of `outs` with the beginning, along each axis, of the cell that the chunk at its place holds.

    Raises:
      MemoryError: there is no room for the cells.
      ValueError: a chunk that says it is larger than its cell.
      Exception: TensorStore's, for bytes that are no such chunks.
    """
    if document.is_blosc and any(blosc_nbytes(chunk) > document.stored_nbytes[1] for chunk in encoded):
        raise ValueError(f"it would decode to more than the {document.cell_nbytes} bytes of its cell")
    # Where TensorStore finds no memory it ends the process; where numpy finds none it says so.
    values = np.empty((len(encoded), *document.chunk_shape), document.dtype)
    context = ts.Context()
    memory = ts.KvStore.open("memory://", context=context).result()
    rest = ".0" * len(document.chunk_shape)
    for i, chunk in enumerate(encoded):
        memory.write(f"{i}{rest}", chunk).result()
    cells = _open(document, document.stacked(len(encoded)), memory, context)
    if len(outs) == 1:
        ts.array(outs[0][np.newaxis]).write(cells[(slice(0, 1), *map(slice, outs[0].shape))]).result()
        return
    ts.array(values).write(cells).result()
    for out, cell in zip(outs, values, strict=True):
        out[...] = cell[tuple(map(slice, out.shape))]


@functools.lru_cache(maxsize=256)
def fill_value(document: Document) -> Array:
    """The value, 0-d, of every element that is not stored; zero where the document names none.

    Raises:
      Exception: TensorStore's, for a fill value that does not suit the dtype.
    """
    context = ts.Context()
    memory = ts.KvStore.open("memory://", context=context).result()
    return np.asarray(_open(document, document.filled(), memory, context).read().result()).reshape(())


def has_unused_bits(dtype: np.dtype[Any]) -> bool:
    """Whether `canonicalise` may change values."""
    return dtype.kind == "b" or dtype in _USED_BITS


def canonicalise(values: Array) -> None:
    """Clears the bits that the dtype does not use, in place: a stranger's bytes must not make two unequal Trues."""
    if values.dtype.kind == "b":
        np.not_equal(values.view(np.uint8), 0, out=values)
    elif used := _USED_BITS.get(values.dtype):
        bits = values.view(np.uint8)
        np.bitwise_and(bits, used, out=bits)


def _open(document: Document, metadata: dict[str, Any], memory: ts.KvStore, context: ts.Context) -> ts.TensorStore:
    spec = {"driver": DRIVERS[document.version], "metadata": metadata, "store_data_equal_to_fill_value": True}
    return ts.open(spec, kvstore=memory, context=context, open=True, assume_metadata=True).result()
