"""What a stranger starts from: small checkpoints, without lists of their files, that are sound until a test changes them."""

from __future__ import annotations

import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from sandbox import unlisted

import ckptkit
from ckptkit import args
from ckptkit.handlers import PyTreeCheckpointHandler


def _saved(path: Any, **options: Any) -> str:
    with ckptkit.Checkpointer(PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, args.PyTreeSave({"a": jnp.arange(1000.0), "b": {"n": np.arange(4), "s": "text"}}))
    return unlisted(path)


@pytest.fixture
def database(tmp_path: Any) -> str:
    """A checkpoint in an OCDBT database."""
    return _saved(tmp_path / "database")


@pytest.fixture
def files(tmp_path: Any) -> str:
    """A checkpoint whose arrays are directories of files."""
    return _saved(tmp_path / "files", use_ocdbt=False)


@pytest.fixture
def outside(tmp_path: Any) -> Any:
    """A directory that is none of the checkpoint's business."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as path:
        yield path
