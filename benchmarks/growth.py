"""Measures how save, restore and metadata grow with the number of leaves and with their size, and draws it.

    python benchmarks/growth.py                                # 1,000 to 100,000 leaves of 1 KB; 1 MB to 1 GB in 8 leaves
    python benchmarks/growth.py --leaves 1000,10000,1000000    # other numbers; a million takes minutes and some GB
    python benchmarks/growth.py --plot docs/growth.svg         # needs matplotlib

Every measurement has a process of its own, the best of three rounds counts (noise only ever adds), and every restored value
is compared. The first save of a process is told apart from the second, which uses its plan again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ckptkit

COLUMNS = ("block", "block again", "save", "restore", "metadata")
MEGABYTE = 1 << 20


def tree_of(count: int, byte_count: int) -> Any:
    """`count` float32 arrays of `byte_count` bytes each, in groups of 100."""
    random = np.random.default_rng(0)
    leaves = [jnp.asarray(random.standard_normal(byte_count // 4, dtype=np.float32)) for _ in range(count)]
    return {f"g{i}": {f"p{j}": leaf for j, leaf in enumerate(leaves[i : i + 100])} for i in range(0, count, 100)}


def measure(count: int, byte_count: int, folder: str) -> dict[str, float]:
    """Seconds of each operation on one tree."""
    tree = jax.block_until_ready(tree_of(count, byte_count))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
    seconds: dict[str, float] = {}

    def timed(name: str, start: float) -> None:
        seconds[name] = time.perf_counter() - start

    with ckptkit.StandardCheckpointer() as checkpointer:
        for path, block in (("first", "block"), ("second", "block again")):
            start = time.perf_counter()
            checkpointer.save(os.path.join(folder, path), tree)
            timed(block, start)
            checkpointer.wait_until_finished()
            seconds.setdefault("save", time.perf_counter() - start)
        start = time.perf_counter()
        restored = jax.block_until_ready(checkpointer.restore(os.path.join(folder, "first"), target))
        timed("restore", start)
        start = time.perf_counter()
        checkpointer.metadata(os.path.join(folder, "first"))
        timed("metadata", start)
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
        if not np.array_equal(found, expected):
            raise SystemExit("restored values differ")
    return seconds


def best(count: int, byte_count: int, rounds: int) -> dict[str, float]:
    """The least seconds of several processes."""
    runs = []
    for _ in range(rounds):
        folder = tempfile.mkdtemp(prefix="ckptkit-growth-")
        try:
            command = [sys.executable, os.path.abspath(__file__), "--one", str(count), str(byte_count), folder]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
            )
        finally:
            shutil.rmtree(folder)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {column: min(run[column] for run in runs) for column in COLUMNS}


def table(title: str, rows: dict[int, dict[str, float]]) -> None:
    """Prints seconds, and how many times those of the row before they are."""
    print(f"\n{title:>12}" + "".join(f"{column:>22}" for column in COLUMNS))
    before: dict[str, float] = {}
    for number, row in rows.items():
        cells = [f"{row[c]:.3f} s" + (f" ({row[c] / before[c]:.1f}x)" if before else "") for c in COLUMNS]
        print(f"{number:12,}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
        before = row


def plot(path: Path, by_leaves: dict[int, dict[str, float]], by_bytes: dict[int, dict[str, float]]) -> None:
    """Both tables as lines on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, rows, label in zip(axes, (by_leaves, by_bytes), ("leaves of 1 KB", "MB in 8 leaves"), strict=True):
        for column in COLUMNS:
            axis.loglog(list(rows), [row[column] for row in rows.values()], marker="o", label=column)
        axis.set(xlabel=label, ylabel="seconds")
        axis.grid(visible=True, which="both", alpha=0.2)
    axes[0].legend()
    figure.savefig(path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", default="1000,10000,100000", help="numbers of leaves of 1 KB")
    parser.add_argument("--megabytes", default="1,8,64,512,1024", help="sizes of a tree of 8 leaves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="write an SVG here")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(int(options.one[0]), int(options.one[1]), options.one[2])))
        return
    numbers = [int(n) for n in filter(None, options.leaves.split(","))]
    sizes = [int(n) for n in filter(None, options.megabytes.split(","))]
    by_leaves = {n: best(n, 1024, options.rounds) for n in numbers}
    table("leaves", by_leaves)
    by_bytes = {n: best(8, n * MEGABYTE // 8, options.rounds) for n in sizes}
    table("MB", by_bytes)
    if options.plot:
        plot(options.plot, by_leaves, by_bytes)


if __name__ == "__main__":
    main()
