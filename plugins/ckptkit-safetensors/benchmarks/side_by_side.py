"""Times saving and restoring side by side with the safetensors library, each run in a process of its own.

    python benchmarks/side_by_side.py [--directory DIR] [--megabytes 512] [--rounds 5]

Saving ends when the bytes are on the disk: ckptkit syncs what it commits, the library's `save_file` is followed by an fsync.
Restoring ends when every array is a ready jax.Array, out of the system's page cache. Memory is how far the peak during the
call lies above what the process held before it, where the system tells (Linux).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.flax

import ckptkit

CASES = ("large", "many")
TASKS = {
    "save: safetensors, fsync": ("save", "library"),
    "save: ckptkit": ("save", "ckptkit"),
    "restore: safetensors": ("restore", "library"),
    "restore: ckptkit, a file of the library's": ("restore", "foreign"),
    "restore: ckptkit, its own, verified": ("restore", "ckptkit"),
}


def tree(case: str, megabytes: int) -> dict[str, Any]:
    """Random float32 arrays: eight large ones, or many of 1 KB."""
    rng = np.random.default_rng(0)
    count, length = (8, (megabytes << 20) // 32) if case == "large" else ((megabytes << 10) // 50, 256)
    return {f"layer{i}.w": rng.random(length, np.float32) for i in range(count)}


def save(tool: str, arrays: dict[str, Any], directory: Path) -> Callable[[], None]:
    """The call to time."""
    leaves = jax.block_until_ready({name: jax.numpy.asarray(array) for name, array in arrays.items()})
    if tool == "ckptkit":
        checkpointer = ckptkit.StandardCheckpointer(storage="safetensors")

        def run() -> None:
            checkpointer.save(directory / "ckptkit", leaves)
            checkpointer.wait_until_finished()

        return run

    def run_library() -> None:
        safetensors.flax.save_file(leaves, directory / "library.safetensors")
        for path in (directory / "library.safetensors", directory):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    return run_library


def restore(tool: str, directory: Path) -> Callable[[], None]:
    """The call to time."""
    if tool == "library":
        return lambda: jax.block_until_ready(safetensors.flax.load_file(directory / "library.safetensors"))
    path = directory / ("library.safetensors" if tool == "foreign" else "ckptkit")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpointer = ckptkit.StandardCheckpointer()
    found = checkpointer.metadata(path).item_metadata.tree
    target = {name: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=sharding) for name, m in found.items()}
    return lambda: jax.block_until_ready(checkpointer.restore(path, target))


def child(case: str, megabytes: int, kind: str, tool: str, directory: Path) -> None:
    """Runs one task, and prints its seconds and the bytes by which the peak of memory grew."""
    if kind == "save":
        if tool == "ckptkit":
            shutil.rmtree(directory / "ckptkit", ignore_errors=True)
        run = save(tool, tree(case, megabytes), directory)
    else:
        run = restore(tool, directory)
    os.sync()
    _forget_peak()
    before = _memory("VmRSS")
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, _memory("VmHWM") - before]))


def _forget_peak() -> None:
    """Lets the system take the peak of this process's memory from now on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """A field of the process's status, in bytes; 0 where there is none."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
    return 0


def main() -> None:
    """Reads the command line, and runs each task in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--megabytes", type=int, default=512, help="size of the case large, in 2**20 bytes; many has a fiftieth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case, kind, tool = options.child
        child(case, options.megabytes, kind, tool, options.directory)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for case in CASES:
            found: dict[str, list[tuple[float, int]]] = {name: [] for name in TASKS}
            for _ in range(options.rounds):  # in turns, so that noise meets all alike
                for name, (kind, tool) in TASKS.items():
                    command = [sys.executable, __file__, f"--directory={directory}", f"--megabytes={options.megabytes}"]
                    done = subprocess.run([*command, "--child", case, kind, tool], check=True, capture_output=True, text=True)
                    found[name].append(tuple(json.loads(done.stdout)))
            print(f"{case}: median of {options.rounds} (least, most); peak memory beyond what was there")
            for name, runs in found.items():
                seconds = [run[0] for run in runs]
                memory = statistics.median(run[1] for run in runs) / 1e6
                spread = f"({min(seconds):.2f}, {max(seconds):.2f})"
                print(f"  {name:<42} {statistics.median(seconds):7.3f} s {spread:>16} {memory:8.0f} MB")


if __name__ == "__main__":
    main()
