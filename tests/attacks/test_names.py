"""Names that lead elsewhere, as keys, items, arrays and references: they stay names, or are refused."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from sandbox import read, write

import ckptkit
from ckptkit import args, errors
from ckptkit.location import FileLocation

HOSTILE = ["..", "../..", "../secret", "a/../../secret", "/etc/passwd", "\0", "a\0b", "", ".", "a//b", "\ud800", "x" * 5000]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leaves_a_directory(tmp_path, name):
    location = FileLocation(tmp_path / "inner")
    os.makedirs(tmp_path / "inner")
    (tmp_path / "secret").write_text("secret")
    for use in (location.child, location.exists, location.read_bytes, lambda name: location.write_bytes(name, b"x")):
        try:
            found = use(name)
        except errors.CheckpointError:
            continue
        assert name in ("", "x" * 5000), (name, found)
    assert os.listdir(tmp_path / "inner") == []
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", HOSTILE)
def test_an_item_of_a_hostile_name_is_not_opened(tmp_path, name):
    ckptkit.save(tmp_path / "secret", args.JsonSave({"password": 1}))
    ckptkit.save(tmp_path / "c", args.Composite(state=args.StandardSave({"a": np.arange(3)})))
    document = json.loads(read(tmp_path / "c", "_CHECKPOINT_METADATA"))
    document["item_handlers"] = {name: "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"}
    write(tmp_path / "c", "_CHECKPOINT_METADATA", json.dumps(document).encode())
    with pytest.raises(errors.CheckpointError):
        ckptkit.restore(tmp_path / "c")
    with pytest.raises(errors.CheckpointError):
        ckptkit.Checkpointer().restore(tmp_path / "c", args.Composite(**{name: args.JsonRestore()}))


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("stored", ["database", "files"])
def test_a_leaf_of_a_hostile_name_is_not_found(request, stored, name):
    directory = request.getfixturevalue(stored)
    shutil.copytree(directory, os.path.join(os.path.dirname(directory), "secret"))
    document = json.loads(read(directory, "_METADATA"))
    document["tree_metadata"]["('a',)"]["key_metadata"][0]["key"] = name
    write(directory, "_METADATA", json.dumps(document).encode())
    with pytest.raises(errors.CheckpointError):
        ckptkit.restore(directory)


@pytest.mark.parametrize("name", [r"C:\x", r"\\host\share", "CON", "a:b", "~/x", "$HOME", "%2e%2e", "a\nb"])
def test_names_that_mean_something_elsewhere_are_only_names(tmp_path, name):
    ckptkit.save(tmp_path / "c", {name: np.arange(3)})
    assert list(ckptkit.restore(tmp_path / "c")) == [name]
