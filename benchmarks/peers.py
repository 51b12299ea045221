"""Times ckptkit beside its peers on the same trees and prints how many times longer they take.

    python benchmarks/peers.py                                          # everything, 3 rounds
    python benchmarks/peers.py --cases many,big --peers ckptkit,orbax --rounds 5

Peers: ckptkit; orbax (orbax-checkpoint); safetensors, whose file is fsynced here, so that it is as durable as the others'
checkpoints; raw, which writes the bytes of all leaves into one file and fsyncs it: the limit. Each measurement has a process
of its own, and a round measures every peer once, so that a machine whose speed drifts treats all alike. What a peer
restores is compared with what it was given: value, dtype and sharding.

Columns: seconds until `save` returned (block), until the checkpoint was durable (save) and until the restored arrays were
on their devices (restore); the most resident memory beyond the tree that save and restore took, in MB (Linux only);
MB and files on disk. Ratios are what to quote: seconds belong to one machine on one day.
"""

from __future__ import annotations

import abc
import argparse
import importlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

COLUMNS = ("block", "save", "restore", "save_mb", "restore_mb", "disk_mb", "files")
RATIOS = ("block", "save", "restore")
RANDOM = np.random.default_rng(0)


# The cases: a tree of random values, and the sharding to restore it to.


def normal(*shape: int, dtype: Any = np.float32) -> jax.Array:
    """Standard normal values; random mantissas, so that compression finds little."""
    return jnp.asarray(RANDOM.standard_normal(shape, dtype=np.float32)).astype(dtype)


def grid(groups: int, leaves: int, *shape: int) -> Any:
    """`groups` dicts of `leaves` arrays each."""
    return {f"group{i}": {f"leaf{j}": normal(*shape) for j in range(leaves)} for i in range(groups)}


def decoder(dtype: Any, width: int = 512, vocabulary: int = 16384, depth: int = 12) -> Any:
    """Shaped like the parameters of a small language model."""

    def layer() -> Any:
        return {
            "attention": {n: {"kernel": normal(width, width, dtype=dtype), "bias": normal(width, dtype=dtype)} for n in "qkvo"},
            "mlp": {"up": normal(width, 4 * width, dtype=dtype), "down": normal(4 * width, width, dtype=dtype)},
            "norms": [normal(width, dtype=dtype) for _ in range(2)],
        }

    return {"embedding": normal(vocabulary, width, dtype=dtype), "layers": [layer() for _ in range(depth)]}


def language_model() -> Any:
    """bfloat16 parameters with Adam's moments in float32."""
    return {"params": decoder(jnp.bfloat16), "adam": {"mu": decoder(np.float32), "nu": decoder(np.float32)}}


def sharding(shape: tuple[int, int], *axes: str | None) -> NamedSharding:
    """All devices as a mesh 'x', 'y' of this shape, array axes laid along `axes`."""
    return NamedSharding(jax.make_mesh(shape, ("x", "y")), PartitionSpec(*axes))


def sharded() -> Any:
    """400 MB, each array cut into eight."""
    return jax.device_put([normal(1024, 1024) for _ in range(100)], sharding((4, 2), "x", "y"))


CASES: dict[str, Callable[[], Any]] = {
    "one": lambda: {"x": normal(2)},
    "many": lambda: grid(100, 100, 256),
    "mid": lambda: grid(100, 20, 256, 256),
    "lm": language_model,
    "big": lambda: grid(1, 8, 4096, 4096),
    "sharded": sharded,
    "reshard": sharded,
}
EIGHT_DEVICES = ("sharded", "reshard")
REPEATS = {"one": 10}  # too short to be timed once: the fastest counts


def target_of(case: str, tree: Any) -> Any:
    """What to restore into: the same shapes and dtypes, on another mesh for 'reshard'."""
    other = sharding((2, 4), "y", None) if case == "reshard" else None
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other or x.sharding), tree)


# The peers.


class Peer(Protocol):
    """One way to save a tree."""

    def save(self, path: Path, tree: Any) -> Callable[[], None]:
        """Returns when the caller may go on; calling the result waits until the checkpoint is durable."""

    def restore(self, path: Path, target: Any) -> Any:
        """The tree, on the target's shardings."""

    def close(self) -> None:
        """Releases threads and files."""


class Checkpointer:
    """A module with Orbax's API."""

    def __init__(self, module: str) -> None:
        self._checkpointer = importlib.import_module(module).StandardCheckpointer()

    def save(self, path: Path, tree: Any) -> Callable[[], None]:
        self._checkpointer.save(path, tree)
        wait: Callable[[], None] = self._checkpointer.wait_until_finished
        return wait

    def restore(self, path: Path, target: Any) -> Any:
        return self._checkpointer.restore(path, target)

    def close(self) -> None:
        self._checkpointer.close()


class OneFile(abc.ABC):
    """Leaves in one file, in the tree's order; a subclass says how they are written and read."""

    def save(self, path: Path, tree: Any) -> Callable[[], None]:
        path.mkdir()
        self.write(path / "leaves", jax.tree.leaves(tree))
        with (path / "leaves").open("rb") as file:
            os.fsync(file.fileno())
        return lambda: None

    def restore(self, path: Path, target: Any) -> Any:
        wanted, structure = jax.tree.flatten(target)
        leaves = self.read(path / "leaves", wanted)
        return jax.tree.unflatten(structure, jax.device_put(leaves, [leaf.sharding for leaf in wanted]))

    @abc.abstractmethod
    def write(self, file: Path, leaves: list[jax.Array]) -> None:
        """Puts the leaves, in order, into a new file."""

    @abc.abstractmethod
    def read(self, file: Path, wanted: list[jax.ShapeDtypeStruct]) -> list[Any]:
        """The leaves, as arrays of any kind."""

    def close(self) -> None:  # noqa: B027 - nothing is kept open
        """Nothing is kept open."""


class Safetensors(OneFile):
    """safetensors' own functions for jax arrays."""

    def __init__(self) -> None:
        self._format = importlib.import_module("safetensors.flax")

    def write(self, file: Path, leaves: list[jax.Array]) -> None:
        self._format.save_file({str(i): leaf for i, leaf in enumerate(leaves)}, str(file))

    def read(self, file: Path, wanted: list[jax.ShapeDtypeStruct]) -> list[Any]:
        loaded = self._format.load_file(str(file))
        return [loaded[str(i)] for i in range(len(wanted))]


class Raw(OneFile):
    """Plain writes and plain reads of the leaves' bytes."""

    def write(self, file: Path, leaves: list[jax.Array]) -> None:
        with file.open("wb", buffering=1 << 20) as out:
            for leaf in jax.device_get(leaves):
                out.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)

    def read(self, file: Path, wanted: list[jax.ShapeDtypeStruct]) -> list[Any]:
        arrays = [np.empty(leaf.shape, leaf.dtype) for leaf in wanted]
        with file.open("rb", buffering=1 << 20) as source:
            for array in arrays:
                source.readinto(array.reshape(-1).view(np.uint8).data)
        return arrays


PEERS: dict[str, Callable[[], Peer]] = {
    "ckptkit": lambda: Checkpointer("ckptkit"),
    "orbax": lambda: Checkpointer("orbax.checkpoint"),
    "safetensors": Safetensors,
    "raw": Raw,
}


# One measurement, in a process of its own.


class Watch:
    """Seconds since entry, and the most resident memory beyond that at entry, in MB."""

    def __enter__(self) -> Self:
        self._resident = reset_peak_mb()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.mb = max(0.0, status_mb("VmHWM") - self._resident)

    def secs(self) -> float:
        """Seconds since entry."""
        return time.perf_counter() - self._start


def status_mb(field: str) -> float:
    """A size from this process's status, in MB; NaN where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak_mb() -> float:
    """Sets the peak of resident memory back to what is resident now, which it returns, in MB."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return status_mb("VmRSS")


def measure(peer: str, case: str, tree: Any, path: Path) -> dict[str, float]:
    """One save and one restore; raises AssertionError when the restored tree is not the saved one."""
    target = target_of(case, tree)
    os.sync()
    saving = PEERS[peer]()
    with Watch() as save:
        finish = saving.save(path, tree)
        block_secs = save.secs()
        finish()
        save_secs = save.secs()
    saving.close()
    restoring = PEERS[peer]()
    with Watch() as restore:
        restored = jax.block_until_ready(restoring.restore(path, target))
        restore_secs = restore.secs()
    restoring.close()
    check(tree, restored, target)
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    figures = (block_secs, save_secs, restore_secs, save.mb, restore.mb, sum(sizes) / 1e6, len(sizes))
    return dict(zip(COLUMNS, figures, strict=True))


def check(tree: Any, restored: Any, target: Any) -> None:
    """Raises AssertionError unless every leaf has the value and dtype saved and the sharding asked for."""
    for saved, got, wanted in zip(*map(jax.tree.leaves, (tree, restored, target)), strict=True):
        assert got.sharding == wanted.sharding, f"sharding {got.sharding}, expected {wanted.sharding}"
        assert got.dtype == saved.dtype, f"dtype {got.dtype}, expected {saved.dtype}"
        assert np.array_equal(np.asarray(got), np.asarray(saved)), "restored values differ"


def measure_here(peer: str, case: str) -> dict[str, float]:
    """The fastest of a case's repeats in this process."""
    tree = jax.block_until_ready(CASES[case]())
    results = []
    with tempfile.TemporaryDirectory(prefix="ckptkit-bench-") as folder:
        for repeat in range(REPEATS.get(case, 1)):
            path = Path(folder, str(repeat))
            results.append(measure(peer, case, tree, path))
            shutil.rmtree(path)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6
    return {**min(results, key=lambda result: result["save"]), "tree_mb": size}


def measure_elsewhere(peer: str, case: str) -> dict[str, float] | None:
    """The same in a new process; None when that fails, with its last words on stderr."""
    devices = 8 if case in EIGHT_DEVICES else 1
    env = {"JAX_PLATFORMS": "cpu", **os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-W", "ignore", __file__, "--one", peer, case]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        print(f"{case}: {peer} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


# The tables.


def report(case: str, rounds: list[dict[str, dict[str, float]]], peers: list[str]) -> None:
    """Prints medians for each peer, then medians over rounds of the ratio to the first peer."""
    sizes = [result["tree_mb"] for row in rounds for result in row.values()]
    if not sizes:
        return
    print(f"\n{case} ({sizes[0]:.4g} MB)\n{'':12}" + "".join(f"{column:>12}" for column in COLUMNS))
    for peer in peers:
        if got := [row[peer] for row in rounds if peer in row]:
            print(f"{peer:12}" + "".join(f"{statistics.median(g[column] for g in got):12.3f}" for column in COLUMNS))
    first, *others = peers
    for peer in others:
        if both := [row for row in rounds if peer in row and first in row]:
            ratios = {c: statistics.median(row[peer][c] / row[first][c] for row in both) for c in RATIOS}
            print(f"{peer} / {first}: " + ", ".join(f"{column} {ratio:.2f}x" for column, ratio in ratios.items()), flush=True)


def names(known: dict[str, Any]) -> Callable[[str], list[str]]:
    """A parser for names separated by commas, all of them known."""

    def parse(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return text.split(",")

    return parse


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=names(CASES), default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--peers", type=names(PEERS), default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure_here(*args.one)))
        return
    figures = {}
    for case in args.cases:
        rounds = [{peer: measure_elsewhere(peer, case) for peer in args.peers} for _ in range(args.rounds)]
        figures[case] = [{peer: result for peer, result in row.items() if result} for row in rounds]
        report(case, figures[case], args.peers)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
