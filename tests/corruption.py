"""Small checkpoints of every format, and every damage that the sweeps over them do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sandbox import Damage, files_of, read

import ckptkit
from ckptkit import args
from ckptkit.handlers import PyTreeCheckpointHandler
from ckptkit.testing.strategies import Pair

FORMATS: dict[str, dict[str, bool]] = {
    "ocdbt": {},
    "ocdbt-zarr3": {"use_zarr3": True},
    "ocdbt-zstd": {"use_compression": True},
    "zarr": {"use_ocdbt": False},
    "zarr-zstd": {"use_ocdbt": False, "use_compression": True},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
    "zarr3-zstd": {"use_ocdbt": False, "use_zarr3": True, "use_compression": True},
    "zarr3-crc32c": {"use_ocdbt": False, "use_zarr3": True, "zarr3_crc32c": True},
    "composite": {},
}


def tree(seed: int) -> dict[str, Any]:
    """Every kind of leaf and container; an odd seed has a list where an even one has a tuple."""
    pair = (np.arange(3) + seed, float(seed))
    return {
        "w": jnp.arange(70.0) * seed,  # more than what lies in a node of the database
        "p": Pair(jnp.arange(4, dtype="bfloat16") + seed, None),
        "t": list(pair) if seed % 2 else pair,
        "s": f"text {seed}",
        "k": jax.random.key(seed),
    }


def saved(path: Any, name: str, seed: int) -> Any:
    """A checkpoint of a format, under `path`, which is returned."""
    checkpointer = ckptkit.Checkpointer(None if name == "composite" else PyTreeCheckpointHandler(**FORMATS[name]))
    custom = {"step": seed}
    state = args.PyTreeSave(tree(seed), custom_metadata=custom)
    if name == "composite":
        state = args.Composite(state=state, config=args.JsonSave({"lr": seed}), key=args.JaxRandomKeySave(jax.random.key(seed)))
    checkpointer.save(path, state, custom_metadata=custom)
    return path


def damages(checkpoint: str, other: str) -> Iterator[Damage]:
    """Of every file: one bit of every byte flipped, parts cut off, nothing left of it, and another checkpoint's in its place."""
    for file, others in zip(files_of(checkpoint), _counterparts(checkpoint, other), strict=True):
        data = read(checkpoint, file)
        for i in range(len(data)):
            yield Damage(file, data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :])
        for length in {0, len(data) // 2, max(0, len(data) - 1)} - {len(data)}:
            yield Damage(file, data[:length])
        yield Damage(file, None)
        yield Damage(file, read(other, others))


def _counterparts(checkpoint: str, other: str) -> list[str]:
    """For each file of a checkpoint the one of another that has its name; those of databases, which have none, in turn."""
    theirs = files_of(other)
    blobs = [file for file in theirs if os.path.basename(os.path.dirname(file)) == "d"]
    return [file if file in theirs else blobs[i % len(blobs)] for i, file in enumerate(files_of(checkpoint))]
