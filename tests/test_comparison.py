"""The table 'Coming from Orbax' of the README: each of its rows, shown with the real Orbax beside ckptkit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ckptkit
from ckptkit import errors

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| ([^|]+[^ |]) \|", README.split("| Orbax | ckptkit |")[1], re.MULTILINE)
shown: dict[str, Callable[[Path], None]] = {}


def shows(row: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Marks the function that shows what a row of the table claims."""
    return lambda function: shown.setdefault(row, function)


@pytest.mark.parametrize("row", ROWS)
def test_row_is_true(row: str, tmp_path: Path):
    shown[row](tmp_path)


def save(library: Any, path: str | Path, tree: Any, **options: Any) -> None:
    with library.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree, **options)


def restore(library: Any, path: str | Path, *target: Any) -> Any:
    with library.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *target)


@shows("several leaves that cannot be saved")
def several_leaves(folder: Path) -> None:
    tree = {"first": "text", "second": b"bytes"}
    with pytest.raises(ValueError, match="first") as theirs:
        save(ocp, folder / "theirs", tree)
    with pytest.raises(errors.TreeError, match="first") as ours:
        save(ckptkit, folder / "ours", tree)

    assert "second" not in str(theirs.value)
    assert "second" in str(ours.value)


@shows("names that collide once joined (`{'a.b': x, 'a': {'b': y}}`)")
def colliding_names(folder: Path) -> None:
    tree = {"a.b": np.zeros(2), "a": {"b": np.ones(2)}}
    save(ocp, folder / "theirs", tree)
    restored = restore(ocp, folder / "theirs")
    with pytest.raises(errors.TreeError, match=r"a\.b"):
        save(ckptkit, folder / "ours", tree)

    assert np.array_equal(restored["a.b"], restored["a"]["b"])
    assert os.listdir(folder) == ["theirs"]


@shows("arguments of another handler")
def arguments_of_another_handler(folder: Path) -> None:
    with pytest.raises(AttributeError), ocp.Checkpointer(ocp.StandardCheckpointHandler()) as theirs:
        theirs.save(folder / "theirs", args=ocp.args.JsonSave({}))
    with pytest.raises(errors.ArgsError, match="StandardSave"), ckptkit.Checkpointer(ckptkit.StandardCheckpointHandler()) as ours:
        ours.save(folder / "ours", args=ckptkit.args.JsonSave({}))

    assert not any("ours" in name for name in os.listdir(folder))


@shows("`force=True`, and the new tree cannot be saved")
def force_and_failure(folder: Path) -> None:
    for library in (ocp, ckptkit):
        save(library, folder / library.__name__, {"a": 1})
        with pytest.raises(ValueError, match="text"):
            save(library, folder / library.__name__, {"text": "text"}, force=True)

    assert not (folder / ocp.__name__).exists()
    assert ckptkit.restore(folder / "ckptkit") == {"a": 1}


@shows("the disk refuses a write in the background")
def failing_write(folder: Path) -> None:
    code = """
import importlib, resource, signal, sys
import numpy as np

checkpointer = importlib.import_module(sys.argv[1]).StandardCheckpointer()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpointer.save(sys.argv[2], {"w": np.random.default_rng(0).random(100_000)})
try:
    checkpointer.wait_until_finished()
except Exception:
    sys.exit(7)
"""
    for module, name in (("orbax.checkpoint", "theirs"), ("ckptkit", "ours")):
        command = [sys.executable, "-c", code, module, str(folder / name)]
        assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 7

    assert [name.partition(".")[0] for name in os.listdir(folder)] == ["theirs"]


@shows("int64 on its way to jax.Array while x64 is off")
def sixty_four_bits(folder: Path) -> None:
    save(ocp, folder / "tree", {"n": np.array([2**40 + 1])})
    target = {"n": jnp.zeros(1, jnp.int32)}
    sharded = {"n": jax.ShapeDtypeStruct((1,), np.int64, sharding=target["n"].sharding)}

    assert restore(ocp, folder / "tree", sharded)["n"].tolist() == [1]
    with pytest.raises(errors.TargetError, match="x64"):
        restore(ckptkit, folder / "tree", sharded)


@shows("a bit flips in a data file")
def flipped_bit(folder: Path) -> None:
    tree = {"w": np.random.default_rng(0).random(50_000)}
    for library in (ocp, ckptkit):
        save(library, folder / library.__name__, tree)
        file = max((folder / library.__name__).rglob("*"), key=lambda file: file.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    assert not np.array_equal(restore(ocp, folder / ocp.__name__)["w"], tree["w"])
    with pytest.raises(errors.CorruptCheckpointError):
        restore(ckptkit, folder / "ckptkit")


@shows("zero-size arrays")
def zero_size(folder: Path) -> None:
    with pytest.raises(ValueError, match="zero size"):
        save(ocp, folder / "theirs", {"w": np.zeros((0, 3))})
    save(ckptkit, folder / "ours", {"w": np.zeros((0, 3))})

    assert restore(ckptkit, folder / "ours")["w"].shape == (0, 3)


@shows("relative paths")
def relative_paths(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(ValueError, match="absolute"):
            save(ocp, "theirs", {"a": 1})
        save(ckptkit, "ours", {"a": 1})

    assert restore(ckptkit, folder / "ours") == {"a": 1}
