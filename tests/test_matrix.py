"""Every kind of leaf in every format at every place: it comes back as it was, or is refused before anything is written.

The table is in `docs/formats-and-places.md`, which a test compares with this one.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ckptkit
from ckptkit import errors
from ckptkit.testing import assert_same

PLUGINS = Path(__file__).parent.parent / "plugins"

LEAVES = {
    "jax.Array": lambda: jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4),
    "np.ndarray": lambda: np.arange(12, dtype=np.int16).reshape(4, 3),
    "scalar": lambda: 2.5,
    "str": lambda: "text",
    "PRNG key": lambda: jax.random.split(jax.random.key(7), 3),
    "torch.Tensor": lambda: pytest.importorskip("torch").arange(6.0).reshape(2, 3),
}
FORMATS: dict[str, dict[str, Any]] = {
    "ocdbt": {},
    "ocdbt, zarr3": {"use_zarr3": True},
    "zarr": {"storage": "zarr"},
    "zarr, zarr3": {"storage": "zarr", "use_zarr3": True},
    "safetensors": {"storage": "safetensors"},
}
PLACES = ("file", "memory", "s3")

# What is refused, and why; all other cells round-trip.
REFUSED = {
    ("safetensors", "memory"): "is not on this machine",
    ("safetensors", "s3"): "is not on this machine",
}
NEEDS = {"torch.Tensor": "ckptkit_torch", "safetensors": "ckptkit_safetensors", "s3": "ckptkit_s3"}


@pytest.fixture(scope="module")
def s3_server(tmp_path_factory):
    """A real S3 server on loopback, as the plugin's own tests start it."""
    spec = importlib.util.spec_from_file_location("s3_conftest", PLUGINS / "ckptkit-s3" / "tests" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in module.ACCESS.items():
            patch.setenv(name, value)
        server = module.Server(tmp_path_factory.mktemp("s3"))
        server.start()
        patch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        yield server
        server.kill()


@pytest.fixture
def place(request, tmp_path):
    name = request.param
    if name == "s3":
        request.getfixturevalue("s3_server")
    return {
        "file": str(tmp_path / "checkpoint"),
        "memory": f"memory://matrix/{uuid.uuid4()}",
        "s3": f"s3://bucket/{uuid.uuid4()}",
    }[name]


def _save(checkpointer, place, value):
    checkpointer.save(place, value)
    checkpointer.wait_until_finished()


def same(found, expected):
    if type(expected).__module__ == "torch":
        assert type(found) is type(expected)
        assert found.dtype == expected.dtype
        assert (found == expected).all()
    else:
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("leaf", "form", "place", "cell"),
    [(leaf, form, place, (leaf, form, place)) for leaf in LEAVES for form in FORMATS for place in PLACES],
    indirect=["place"],
    ids=[f"{leaf}-{form}-{place}" for leaf in LEAVES for form in FORMATS for place in PLACES],
)
def test_a_leaf_comes_back_or_is_refused(leaf, form, place, cell):
    for part in cell:
        if part in NEEDS and importlib.util.find_spec(NEEDS[part]) is None:
            pytest.skip(f"{NEEDS[part]} is not installed")
    value = {"leaf": LEAVES[leaf]()}
    handler = ckptkit.handlers.PyTreeCheckpointHandler(**FORMATS[form])
    with ckptkit.AsyncCheckpointer(handler) as checkpointer:
        if cell[1:] in REFUSED:
            with pytest.raises(errors.ArgsError, match=REFUSED[cell[1:]]):
                _save(checkpointer, place, value)
            return
        _save(checkpointer, place, value)
        same(checkpointer.restore(place)["leaf"], value["leaf"])
    if place.startswith("memory:"):
        ckptkit.default_registry().location(place).delete()


def test_the_table_in_the_documentation_is_this_one():
    text = (Path(__file__).parent.parent / "docs" / "formats-and-places.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    table = {(row[0], place): cell for row in rows[2:] for place, cell in zip(PLACES, row[1:], strict=True)}
    assert table == {(form, place): "refused" if (form, place) in REFUSED else "yes" for form in FORMATS for place in PLACES}
