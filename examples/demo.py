"""Kills a training in the middle of a save and shows that it loses nothing.

    python examples/demo.py

Trains `train_digits.py` undisturbed; trains it again and kills it with SIGKILL while a checkpoint is half written;
starts it once more; then compares the two final checkpoints bit for bit, read by ckptkit and read by Orbax. Exits
with 1 if anything differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the comparison below is exact, so both runs use the same kind of device

import jax
import numpy as np
import orbax.checkpoint
from train_digits import checkpoints

import ckptkit

TRAIN = [sys.executable, "-u", str(Path(__file__).with_name("train_digits.py"))]
STEPS = 200
UNFINISHED = ".orbax-checkpoint-tmp"
MIN_CHECKPOINTS = 3  # whole ones before the kill
MIN_BYTES = 1_000_000  # of the checkpoint that is being written
MAX_KILLS = 10


def say(text: str) -> None:
    """Prints at once, so that the lines of the trainings come in between."""
    print(text, flush=True)


def train(root: Path) -> None:
    """Trains to the end, from the newest checkpoint in `root` if there is one."""
    if code := subprocess.run([*TRAIN, str(root), "--steps", str(STEPS)], check=False).returncode:
        raise SystemExit(f"FAILED: the training ended with exit status {code}.")


def unfinished(root: Path) -> list[Path]:
    """The directories of saves that are under way or were cut short."""
    return sorted(root.glob(f"*{UNFINISHED}"))


def written(directory: Path) -> int:
    """Bytes of the files in a directory, which may change or vanish meanwhile."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def kill_in_a_save(root: Path) -> Path | None:
    """Trains into `root` and kills that during a save; the half-written directory, or None when the save was faster."""
    process = subprocess.Popen([*TRAIN, str(root), "--steps", str(STEPS)])
    try:
        while process.poll() is None:
            if len(checkpoints(root)) >= MIN_CHECKPOINTS and any(written(path) > MIN_BYTES for path in unfinished(root)):
                break
            time.sleep(0.0005)
    finally:
        process.kill()
        process.wait()
    return next(iter(unfinished(root)), None)


def killed_run(folder: Path) -> Path:
    """The directory of a training that was killed in the middle of a save."""
    for attempt in range(MAX_KILLS):
        root = folder / f"killed-{attempt}"
        if left := kill_in_a_save(root):
            whole = ", ".join(path.name for path in checkpoints(root))
            say(f"killed: {left.name} is left with {written(left) / 1e6:.1f} MB in it; whole checkpoints: {whole}")
            return root
        say("the save was finished before the kill came; once more in a new directory")
    raise SystemExit(f"FAILED: {MAX_KILLS} kills, and none came while a save was under way.")


def digest(tree: Any) -> str:
    """SHA-256 of every leaf's path, dtype, shape and bytes."""
    result = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        value = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        result.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        result.update(value.tobytes())
    return result.hexdigest()


def restored_by_orbax(path: Path) -> Any:
    """The checkpoint, read by Orbax without any help from ckptkit."""
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def digests(reference: Path, resumed: Path) -> list[str]:
    """One digest for each way to read each of the two checkpoints, printed as they come."""
    ways: list[tuple[str, Callable[[Path], Any], Path]] = [
        ("undisturbed, read by ckptkit", ckptkit.restore, reference),
        ("killed and resumed, read by ckptkit", ckptkit.restore, resumed),
        ("killed and resumed, read by Orbax", restored_by_orbax, resumed),
    ]
    found = []
    for name, restore, path in ways:
        tree = restore(path)
        found.append(digest(tree))
        byte_count = sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(tree))
        say(f"{found[-1][:32]}  {byte_count / 1e6:.1f} MB  {name}")
    return found


def main() -> None:
    """The whole story, in a directory that is removed at the end."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ckptkit-demo-") as folder:
        say("1. A training that nothing disturbs")
        reference = Path(folder, "undisturbed")
        train(reference)

        say("\n2. The same training, killed with SIGKILL in the middle of a save")
        killed = killed_run(Path(folder))

        say("\n3. Started again: it goes on from the newest whole checkpoint")
        train(killed)
        if left := unfinished(killed):
            raise SystemExit(f"FAILED: {left} should have been tidied by the save that took their place.")

        say("\n4. SHA-256 over all leaves of the final checkpoint: parameters, optimizer state, random key, step, position")
        found = digests(reference / str(STEPS), killed / str(STEPS))
        if len(set(found)) != 1:
            raise SystemExit("FAILED: these must be equal.")
    say(f"\nThe final checkpoints are equal bit for bit. ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main()
