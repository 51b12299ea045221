"""Trains a small network on handwritten digits; killed at any moment, it goes on where its newest checkpoint was.

    python examples/train_digits.py runs/digits                 # train
    python examples/train_digits.py runs/digits --steps 400     # train on

A checkpoint is everything the next step depends on: parameters, optimizer state, random key, step and position in the
data. So a run that was interrupted ends with the same bits as one that was not.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import ckptkit

SEED = 0
BATCH_SIZE = 50
HELD_OUT = 297  # leaves 1,500 images, 30 batches an epoch


class State(NamedTuple):
    """Everything that the next training step depends on."""

    params: Any
    opt_state: Any
    key: jax.Array
    step: int
    epoch: int
    offset: int


class Network(nnx.Module):
    """A perceptron for 8 x 8 images."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(64, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)])
        self.dropout = nnx.Dropout(0.2)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits; without `rngs` nothing is dropped."""
        x = images
        for layer in self.layers:
            x = self.dropout(nnx.relu(layer(x)), deterministic=rngs is None, rngs=rngs)
        return self.head(x)


GRAPH, PARAMS = nnx.split(Network(1024, nnx.Rngs(SEED)), nnx.Param)
OPTIMIZER = optax.adamw(1e-3)


def first_state() -> State:
    """The state that training starts from when there is no checkpoint."""
    params = nnx.to_pure_dict(PARAMS)
    return State(params, OPTIMIZER.init(params), jax.random.key(SEED), step=0, epoch=0, offset=0)


def loss(params: Any, key: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy, with dropout drawn from `key`."""
    logits = nnx.merge(GRAPH, params)(images, nnx.Rngs(dropout=key))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def update(params: Any, opt_state: Any, key: jax.Array, images: jax.Array, labels: jax.Array) -> tuple[Any, ...]:
    """One optimizer step: new params, optimizer state and key, and the loss before it."""
    key, dropout = jax.random.split(key)
    value, grads = jax.value_and_grad(loss)(params, dropout, images, labels)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, key, value


# The arrays are donated: a save that is still writing in the background must not notice that they are gone.
update = jax.jit(update, donate_argnums=(0, 1, 2))


def advance(state: State, images: np.ndarray, labels: np.ndarray) -> tuple[State, jax.Array]:
    """Trains on the next batch of the epoch, whose order depends on the epoch's number alone."""
    order = np.random.default_rng((SEED, state.epoch)).permutation(len(images))
    batch = order[state.offset : state.offset + BATCH_SIZE]
    *arrays, value = update(state.params, state.opt_state, state.key, images[batch], labels[batch])
    offset = (state.offset + BATCH_SIZE) % len(images)
    return State(*arrays, step=state.step + 1, epoch=state.epoch + (offset == 0), offset=offset), value


def checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints, oldest first. A save that was cut short has a name that is not a number."""
    steps = [path for path in root.iterdir() if path.name.isdecimal()] if root.exists() else []
    return sorted(steps, key=lambda path: int(path.name))


def train(root: Path, steps: int, save_every: int, keep: int) -> None:
    """Trains until `steps`, from the newest checkpoint under `root` if there is one."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    state = first_state()
    with ckptkit.AsyncCheckpointer(ckptkit.StandardCheckpointHandler()) as checkpointer:
        if saved := checkpoints(root):
            state = checkpointer.restore(saved[-1], args=ckptkit.args.StandardRestore(state))
            print(f"resumed at step {state.step}", flush=True)
        while state.step < steps:
            state, value = advance(state, images[:-HELD_OUT], labels[:-HELD_OUT])
            if state.step % save_every == 0 or state.step == steps:
                checkpointer.save(root / str(state.step), args=ckptkit.args.StandardSave(state))
                print(f"step {state.step:4}  epoch {state.epoch}  loss {value:.4f}  saving", flush=True)
                for old in checkpoints(root)[:-keep]:
                    shutil.rmtree(old)
    right = nnx.merge(GRAPH, state.params)(images[-HELD_OUT:]).argmax(-1) == labels[-HELD_OUT:]
    print(f"step {state.step:4}  done: {jnp.mean(right):.1%} of {HELD_OUT} unseen digits recognised", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="directory of the checkpoints, one per step")
    parser.add_argument("--steps", type=int, default=200, help="train until this step (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--keep", type=int, default=3, help="checkpoints to keep beside the newest (default: %(default)s)")
    args = parser.parse_args()
    train(args.root, args.steps, args.save_every, args.keep)


if __name__ == "__main__":
    main()
