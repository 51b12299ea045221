"""Measures what checksums cost a save and a restore, and how fast `ckptkit.verify` reads beside plain reads.

    python benchmarks/checksums.py                       # 512 MB in 16 leaves, 10,000 leaves of 1 KB, 5 rounds
    python benchmarks/checksums.py --megabytes 64 --leaves 1000 --rounds 3

Without checksums is with a constant in their place: what is written, read and compared is otherwise the same. Both ways take
turns in one process, and which is first changes from round to round, so that a machine whose speed drifts treats both alike. The
median counts; a share is that of the wall time with checksums, and one below zero says how noisy the machine is. "hashing alone"
is the time that one thread takes for the checksums of all bytes, with nothing beside it. Cold files are no longer in memory when
they are read (Linux only, and only as far as the system follows that advice).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

import ckptkit
from ckptkit import index
from ckptkit.pipeline import check

MEGABYTE = 1 << 20
ROW = "| {:32} | {:>12} | {:>12} | {:>9} |"


def tree_of(count: int, byte_count: int) -> list[jax.Array]:
    """`count` float32 arrays of `byte_count` bytes each; random mantissas, so that nothing is compressed."""
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(byte_count // 4, dtype=np.float32)) for _ in range(count)]


class NoChecksum:
    """Stands for `xxhash.xxh3_64`, which checksums a file block by block."""

    def update(self, data: object) -> None:
        """Does nothing."""

    def hexdigest(self) -> str:
        """The checksum of everything."""
        return "0" * 16


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """Every checksum is a constant."""

    def block_checksums(data: np.ndarray[Any, Any]) -> str:
        return "0" * 16 * -(-data.nbytes // index.BLOCK_BYTE_SIZE)

    with (
        mock.patch.object(index, "block_checksums", block_checksums),
        mock.patch.object(check, "block_checksums", block_checksums),
        mock.patch.object(xxhash, "xxh3_64_hexdigest", return_value="0" * 16),
        mock.patch.object(xxhash, "xxh3_64", NoChecksum),
    ):
        yield


WAYS: Mapping[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "with": contextlib.nullcontext,
    "without": without_checksums,
}


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """The median seconds of each call, `before` which something is done untimed; in every other round they come in reverse."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(rounds):
        for name in list(calls)[:: -1 if n % 2 else 1]:
            before()
            found[name].append(seconds(calls[name]))
    return {name: statistics.median(each) for name, each in found.items()}


def cost(tree: list[jax.Array], folder: Path, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The seconds of a save and of restores, with and without checksums; where not said, the files are in memory."""
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)

    def save(way: str) -> None:
        with WAYS[way]():
            ckptkit.save(folder / way, tree, force=True)

    def restore(way: str) -> None:
        with WAYS[way]():
            jax.block_until_ready(ckptkit.restore(folder / way, target))

    for name, operation in (("save", save), ("restore", restore)):
        calls = {way: functools.partial(operation, way) for way in WAYS}
        in_turn(calls, 1)  # the first time plans, compiles and allocates
        yield name, in_turn(calls, rounds)
    if hasattr(os, "posix_fadvise"):
        files = [file for file in folder.rglob("*") if file.is_file()]
        yield "restore from the disk", in_turn(calls, rounds, before=lambda: forget(files))


def hash_all(tree: list[jax.Array]) -> None:
    """Computes the checksums of all leaves."""
    for leaf in tree:
        index.block_checksums(np.asarray(leaf))


def read_all(files: Sequence[Path]) -> None:
    """Reads files as `cat` does."""
    buffer = memoryview(bytearray(MEGABYTE))
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def forget(files: Sequence[Path]) -> None:
    """Asks the system to keep nothing of the files in memory."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def verify_beside_reads(path: Path, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The seconds of `ckptkit.verify` and of reading the same files, from memory and from the disk."""
    files = [file for file in path.rglob("*") if file.is_file()]
    calls = {"verify": lambda: ckptkit.verify(path), "read": lambda: read_all(files)}
    if ckptkit.verify(path).state != "whole":
        raise SystemExit(f"{path} is not whole")
    yield "in memory", in_turn(calls, rounds)
    if hasattr(os, "posix_fadvise"):
        yield "cold", in_turn(calls, rounds, before=lambda: forget(files))


def table(*titles: str) -> None:
    """Prints the head of a table."""
    print(f"\n{ROW.format(*titles)}\n|---|---:|---:|---:|")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="size of the tree of 16 leaves")
    parser.add_argument("--leaves", type=int, default=10_000, help="number of leaves of 1 KB of the other tree")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    trees = {
        f"{options.megabytes} MB in 16 leaves": tree_of(16, options.megabytes * MEGABYTE // 16),
        f"{options.leaves:,} leaves of 1 KB": tree_of(options.leaves, 1024),
    }
    folder = Path(tempfile.mkdtemp(prefix="ckptkit-checksums-"))
    try:
        for n, (name, tree) in enumerate(trees.items()):
            table(name, "with", "without", "share")
            for operation, found in cost(tree, folder / str(n), options.rounds):
                share = 1 - found["without"] / found["with"]
                print(ROW.format(operation, f"{found['with']:.3f} s", f"{found['without']:.3f} s", f"{share:.1%}"), flush=True)
            alone = in_turn({"alone": functools.partial(hash_all, tree)}, options.rounds)["alone"]
            print(ROW.format("hashing alone", f"{alone:.3f} s", "", ""))
        table("verify", "ckptkit", "plain reads", "times")
        for n, name in enumerate(trees):
            for state, found in verify_beside_reads(folder / str(n) / "with", options.rounds):
                times = f"{found['verify'] / found['read']:.2f}"
                print(ROW.format(f"{name}, {state}", f"{found['verify']:.3f} s", f"{found['read']:.3f} s", times), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
