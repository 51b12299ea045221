"""`ckptkit plugins` and `ckptkit info`: what is installed, what a checkpoint needs, and which package is missing."""

import importlib.metadata
import json
import os
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import ckptkit
from ckptkit import args, cli, discovery, errors, inspection, providers
from ckptkit.leaves.numpy import NumpyHandler
from ckptkit.registry import Owner, PluginFailure, Registry, owned_by
from ckptkit.storage.ocdbt import OcdbtBackend

ACME = Owner("acme_plugin", "acme-checkpoints", "1.2", "plug")


class Meters:
    """A leaf that is a number of meters."""

    def __init__(self, values):
        self.values = values

    shape = property(lambda self: self.values.shape)
    dtype = property(lambda self: self.values.dtype)

    def __getitem__(self, index):
        return self.values[index]


class MetersHandler(NumpyHandler):
    typestr = "acme.meters"


class Store(OcdbtBackend):
    name = "acme_store"

    def recognises(self, location):
        return location.exists("acme.mark") and super().recognises(location)


class Notes(args.CheckpointArgs):
    pass


class NotesHandler(ckptkit.CheckpointHandler):
    def save(self, directory, args):
        (directory / "notes").write_text("note")

    def restore(self, directory, args):
        return (directory / "notes").read_text()


@pytest.fixture
def acme():
    """A registry in which a plugin is installed."""
    registry = Registry.with_builtins()
    with owned_by(ACME):
        registry.add_type_handler(MetersHandler(), Meters)
        registry.add_storage(Store())
        registry.add_args(Notes, NotesHandler, for_save=True, for_restore=True)
    return registry


def save(path, item, registry, **options):
    with ckptkit.StandardCheckpointer(registry=registry, **options) as checkpointer:
        checkpointer.save(path, item)


def missing(found):
    return {(need.kind, need.name) for need in found.missing}


def test_info_tells_leaves_bytes_handler_and_storage(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": np.zeros(5), "b": np.zeros(3), "n": 1})
    found = inspection.info(tmp_path / "c")
    (item,) = found.items
    assert (item.storage, item.leaf_typestrs, item.byte_count) == ("ocdbt", {"np.ndarray": 2, "scalar": 1}, 72)
    assert item.handler.endswith("StandardCheckpointHandler")
    assert found.missing == []
    assert {need.written_by for need in found.needs} == {None, f"ckptkit {ckptkit.__version__}"}


def test_info_of_a_composite_tells_of_each_item(tmp_path):
    items = args.Composite(
        state=args.StandardSave({"a": np.zeros(5)}), notes=args.JsonSave({"a": 1}), key=args.JaxRandomKeySave(jax.random.key(1))
    )
    ckptkit.save(tmp_path / "c", items)
    found = {item.name: (item.storage, dict(item.leaf_typestrs)) for item in inspection.info(tmp_path / "c").items}
    assert found == {"state": ("ocdbt", {"np.ndarray": 1}), "notes": (None, {}), "key": ("zarr", {"jax.Array": 1})}


def test_info_of_orbaxs_checkpoint(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"a": np.zeros(5)})
    found = inspection.info(tmp_path / "c")
    assert (found.has_checksums, found.items[0].leaf_typestrs, found.missing) == (False, {"np.ndarray": 1}, [])


def test_info_where_only_names_of_arrays_tell(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": np.zeros(5)}, storage="zarr")
    for file in (tmp_path / "c").iterdir():
        if file.is_file():
            file.unlink()
    (item,) = inspection.info(tmp_path / "c").items
    assert (item.recorded, item.storage, item.byte_count) == (False, "zarr", 40)


def test_info_names_the_package_of_a_leaf_type_that_is_missing(tmp_path, acme, registry):
    save(tmp_path / "c", {"a": Meters(np.zeros(5))}, acme)
    found = inspection.info(tmp_path / "c", registry=registry)
    assert missing(found) == {("leaf type", "acme.meters")}
    assert found.missing[0].way_out.endswith("install it, if you trust whoever made the checkpoint: pip install acme-checkpoints")
    assert inspection.info(tmp_path / "c", registry=acme).missing == []


def test_info_and_restore_name_the_package_of_a_storage_backend_that_is_missing(tmp_path, acme, registry):
    save(tmp_path / "c", {"a": np.zeros(5)}, acme, storage="acme_store")
    (tmp_path / "c" / "manifest.ocdbt").rename(tmp_path / "c" / "manifest.acme")
    (tmp_path / "c" / "ckptkit_files.json").unlink()
    found = inspection.info(tmp_path / "c", registry=registry)
    assert missing(found) == {("storage backend", "acme_store")}
    assert found.items[0].leaf_typestrs == {"np.ndarray": 1}
    with pytest.raises(
        errors.RegistryError, match=r"backend 'acme_store'.*acme-checkpoints 1\.2 .* pip install acme-checkpoints"
    ):
        ckptkit.Checkpointer(registry=registry).restore(tmp_path / "c")


@pytest.mark.parametrize("composite", [False, True])
def test_info_and_restore_name_the_package_of_a_handler_that_is_missing(tmp_path, acme, registry, composite):
    ckptkit.Checkpointer(registry=acme).save(tmp_path / "c", args.Composite(notes=Notes()) if composite else Notes())
    typestr = f"{__name__}.NotesHandler"
    assert missing(inspection.info(tmp_path / "c", registry=registry)) == {("handler", typestr)}
    with pytest.raises(errors.RegistryError, match=r"acme-checkpoints 1\.2 provided it .* pip install acme-checkpoints"):
        ckptkit.Checkpointer(registry=registry).restore(tmp_path / "c")


def test_orbax_reads_what_records_its_providers(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": np.arange(3)})
    with ocp.StandardCheckpointer() as checkpointer:
        assert checkpointer.restore(tmp_path / "c")["a"].tolist() == [0, 1, 2]
    assert "providers" not in json.loads((tmp_path / "c" / "_CHECKPOINT_METADATA").read_text())


@pytest.mark.parametrize("provider", ["evil; rm -rf /", "x\n1.0 pip install y", "a b c", "-r 1.0", ""])
def test_no_command_is_made_of_what_is_no_name_of_a_package(provider):
    assert "pip" not in providers.way_out(provider)


def test_a_package_that_is_there_but_registered_nothing_is_not_to_be_installed_again():
    way_out = providers.way_out(f"numpy {np.__version__}")
    assert "pip" not in way_out
    assert "`ckptkit plugins` shows why" in way_out


def test_a_package_of_another_version_is_named_with_the_same_caution_as_one_that_is_missing():
    assert "if you trust whoever made the checkpoint: pip install --upgrade numpy" in providers.way_out("numpy 99.0")


def test_no_command_installs_what_bears_the_name_of_ckptkit_elsewhere():
    assert "pip" not in providers.way_out("ckptkit 99.0")
    assert "pip" not in providers.way_out("CkptKit 99.0")


def changed(file, old, new):
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new))


def test_info_believes_no_description_that_is_not_as_it_was_written(tmp_path, acme, capsys):
    save(tmp_path / "c", {"a": Meters(np.zeros(5)), "b": np.zeros(3)}, acme)
    for name, old, new in (
        ("_METADATA", b"np.ndarray", b"jax.Array"),
        ("ckptkit_index.json", b"acme-checkpoints", b"evil-checkpoints"),
    ):
        written = (tmp_path / "c" / name).read_bytes()
        changed(tmp_path / "c" / name, old, new)
        with pytest.raises(errors.CorruptCheckpointError, match=f"{name}: "):
            inspection.info(tmp_path / "c", registry=acme)
        assert cli.main(["info", str(tmp_path / "c")]) == 1
        assert name in capsys.readouterr().err
        (tmp_path / "c" / name).write_bytes(written)


def test_what_a_checkpoint_names_cannot_forge_lines_on_a_terminal(tmp_path, capsys):
    ckptkit.save(tmp_path / "c\x1b[31m\nd", {"a": np.zeros(5)})
    (tmp_path / "c\x1b[31m\nd" / "ckptkit_files.json").unlink()
    file = tmp_path / "c\x1b[31m\nd" / "_CHECKPOINT_METADATA"
    document = json.loads(file.read_text()) | {"item_handlers": "acme.H\x1b[2K\u202e\n  needs handler 'acme.H'; here: acme 1"}
    file.write_text(json.dumps(document))
    assert cli.main(["info", os.fspath(file.parent)]) == 2
    printed = capsys.readouterr().out
    assert r"c\x1b[31m\nd (without a list of checksums)" in printed
    assert r"handler: acme.H\x1b[2K\u202e\n  needs handler" in printed
    assert all(line.isprintable() for line in printed.split("\n"))


@pytest.mark.parametrize("command", ["verify", "clean", "info"])
def test_names_of_files_are_printed_on_one_line(tmp_path, capsys, command):
    root = tmp_path / "a\x1b[2K\nb"
    ckptkit.save(root / "c", args.JsonSave({"a": 1}))
    (root / "c" / "x\ry").write_text("unlisted")
    (root / "d.orbax-checkpoint-tmp").mkdir()
    cli.main([command, os.fspath(root if command == "clean" else root / "c")])
    printed = "".join(capsys.readouterr())
    assert r"a\x1b[2K\nb" in printed
    assert all(line.isprintable() for line in printed.split("\n"))


def test_info_on_the_command_line_needs_no_device(tmp_path):
    ckptkit.save(tmp_path / "c", {"a": jax.numpy.zeros(5)})
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    command = [sys.executable, "-m", "ckptkit", "info", "--json", str(tmp_path / "c")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["items"][0]["leaf_typestrs"] == {"jax.Array": 1}


def test_info_exits_with_2_where_there_is_no_checkpoint(tmp_path, capsys):
    assert cli.main(["info", str(tmp_path)]) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_info_exits_with_2_where_something_is_missing(tmp_path, acme, capsys):
    save(tmp_path / "c", {"a": Meters(np.zeros(5))}, acme)
    assert cli.main(["info", str(tmp_path / "c")]) == 2
    assert "MISSING: acme-checkpoints 1.2 provided it" in capsys.readouterr().out


def test_plugins_lists_what_is_built_in(capsys):
    assert cli.main(["plugins", "--json"]) == 0
    builtin = json.loads(capsys.readouterr().out)[0]
    assert (builtin["distribution"], builtin["version"], builtin["entry_point"]) == ("ckptkit", ckptkit.__version__, None)
    assert builtin["registered"]["storage"]["ocdbt"] == "ckptkit.storage.ocdbt.OcdbtBackend"
    assert builtin["registered"]["leaf_types"]["numpy.ndarray"] == "ckptkit.leaves.numpy.NumpyHandler"
    assert builtin["hooks"] == ["ckptkit_register"]


def test_plugins_exits_with_1_and_shows_the_traceback_of_one_that_failed(monkeypatch, capsys):
    try:
        raise ValueError("no such device")
    except ValueError as error:
        failure = PluginFailure(ACME, error)
    monkeypatch.setattr(ckptkit.default_registry(), "failures", [failure])
    assert cli.main(["plugins"]) == 1
    printed = capsys.readouterr().out
    assert "acme-checkpoints 1.2 (entry point plug = acme_plugin): failed to load" in printed
    assert "Traceback (most recent call last)" in printed
    assert "ValueError: no such device" in printed


def test_a_plugin_for_another_ckptkit_is_refused_before_it_is_imported(tmp_path):
    info = tmp_path / "late-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\nRequires-Dist: ckptkit>=99\n")
    (info / "entry_points.txt").write_text("[ckptkit]\nplug = no_such_module_is_imported\n")
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    registry = Registry()
    discovery.load(registry, distribution.entry_points)
    (failure,) = registry.failures
    assert isinstance(failure.error, errors.PluginError)
    assert "plugin late 1.0 (entry point 'plug') failed to load: PluginError: it is built for ckptkit>=99" in str(failure)
    assert "pip" not in str(failure)
