"""Pickles, and names of importable things where a checkpoint names a handler, a leaf's type or a class: nothing is run."""

from __future__ import annotations

import json
import os
import pickle

import fresh
import pytest
from sandbox import files_of, read, write

import ckptkit
from ckptkit import errors
from ckptkit.handlers import PyTreeCheckpointHandler
from ckptkit.options import PyTreeMetadataOptions

DANGEROUS = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "this",
    "antigravity.webbrowser",
    "ckptkit.save",
    "../x",
    "",
    "a" * 9999,
]


class Bomb:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return (os.mkdir, (self._path,))


def edited(directory, file, change):
    document = json.loads(read(directory, file))
    change(document)
    write(directory, file, json.dumps(document).encode())


def test_a_pickle_in_the_place_of_any_file_is_not_loaded(database, tmp_path):
    trap = os.fspath(tmp_path / "executed")
    for file in files_of(database):
        sound = read(database, file)
        write(database, file, pickle.dumps(Bomb(trap)))
        if file != "commit_success.txt":
            with pytest.raises(errors.CheckpointError):
                ckptkit.restore(database)
        write(database, file, sound)
    assert not os.path.exists(trap)


def test_an_array_of_pickles_is_refused(files, tmp_path):
    trap = os.fspath(tmp_path / "executed")
    edited(files, "a/.zarray", lambda document: document.update(dtype="|O", filters=[{"id": "pickle"}]))
    write(files, "a/0", pickle.dumps(Bomb(trap)))
    with pytest.raises(errors.CorruptCheckpointError, match="dtype"):
        ckptkit.restore(files)
    assert not os.path.exists(trap)


@pytest.mark.parametrize("name", DANGEROUS)
def test_a_handler_is_found_in_the_registry_or_nowhere(database, name):
    edited(database, "_CHECKPOINT_METADATA", lambda document: document.update(item_handlers=name))
    with pytest.raises(errors.RegistryError):
        ckptkit.restore(database)


@pytest.mark.parametrize("name", DANGEROUS)
def test_a_type_of_leaf_is_found_in_the_registry_or_nowhere(database, name):
    edited(database, "ckptkit_index.json", lambda document: document.update(typestrs={"a": name}, providers={name: "evil 1.0"}))
    with pytest.raises(errors.RegistryError, match="no type handler is registered"):
        ckptkit.restore(database)


def test_nothing_that_a_checkpoint_names_is_imported(database, tmp_path):
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')\n")
    rich = {"category": "namedtuple", "module": "planted", "clazz": "Planted", "entries": []}
    edited(database, "_METADATA", lambda d: d.update(value_metadata_tree=json.dumps({"a": rich, "b": rich})))
    edited(database, "ckptkit_index.json", lambda d: d.update(typestrs={"a": "planted.Planted", "b.n": "planted"}))
    script = "import sys, ckptkit\ntry: ckptkit.restore(sys.argv[1])\nexcept ckptkit.errors.CheckpointError: pass\n"
    script += "try: ckptkit.Checkpointer().metadata(sys.argv[1])\nexcept ckptkit.errors.CheckpointError: pass\n"
    script += "assert 'planted' not in sys.modules"
    assert fresh.run(script, database, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("name", ["__import__('os').system('x')", "a b", "class", "_x", "x\ny", "1", "\0"])
def test_a_named_tuple_of_hostile_names_is_refused(database, name):
    leaf = {"category": "custom", "clazz": "ValueMetadataEntry", "data": {}}
    inner = {
        "category": "namedtuple",
        "module": "m",
        "clazz": name,
        "entries": [{"key": name, "value": leaf}, {"key": "s", "value": leaf}],
    }
    edited(database, "_METADATA", lambda d: d.update(value_metadata_tree=json.dumps({"a": leaf, "b": inner})))
    handler = PyTreeCheckpointHandler(pytree_metadata_options=PyTreeMetadataOptions(support_rich_types=True))
    with pytest.raises(errors.FormatError):
        ckptkit.Checkpointer(handler).restore(database)


@pytest.mark.parametrize("impl", ["os.system", "threefry2x32", "x" * 9999, 5, ["rbg"], {"a": 1}])
def test_an_array_that_is_recorded_as_keys_of_any_kind_is_checked(database, impl):
    def change(document):
        document["array_metadatas"][0]["array_metadata"]["ext_metadata"] = {"random_key_impl": impl}

    edited(database, "array_metadatas/process_0", change)
    with pytest.raises(errors.TargetError, match="PRNG key"):
        ckptkit.restore(database)
