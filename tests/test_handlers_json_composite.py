"""The Json and Composite handlers, by themselves: into a directory and out of it."""

import concurrent.futures
import json
import math
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import ckptkit
from ckptkit import args, errors
from ckptkit.handlers.base import AsyncCheckpointHandler, CheckpointHandler
from ckptkit.handlers.composite import CompositeCheckpointHandler
from ckptkit.handlers.json import JsonCheckpointHandler
from ckptkit.metadata.step import STEP_FILE, StepMetadata, encode_step

TREE = {"a": np.arange(3.0)}


@pytest.fixture
def directory(tmp_path):
    path = epath.Path(tmp_path / "checkpoint")
    path.mkdir()
    return path


# Json


@pytest.fixture
def handler(registry):
    handler = JsonCheckpointHandler()
    handler.registry = registry
    return handler


VALUES = [{}, {"a": [1, 2.5, None, True], "b": {"c": "ä\ud800"}}, [1], "text", None, 2**70, math.inf]


@pytest.mark.parametrize("value", VALUES, ids=ascii)
def test_json_comes_back(handler, directory, value):
    handler.save(directory, args=args.JsonSave(value))
    assert handler.restore(directory, args=args.JsonRestore()) == value


def test_tuples_come_back_as_lists(handler, directory):
    handler.save(directory, args=args.JsonSave({"a": (1, (2,))}))
    assert handler.restore(directory) == {"a": [1, [2]]}


@pytest.mark.parametrize(
    ("value", "message"),
    [({"a": [1, np.arange(2)]}, r"item\['a'\]\[1\] is a numpy\.ndarray"), ({"a": {1: 2}}, r"item\['a'\] has the key 1\b")],
)
def test_what_json_cannot_hold_is_named_by_its_place(handler, directory, value, message):
    with pytest.raises(TypeError, match=message):
        handler.save(directory, args=args.JsonSave(value))
    assert list(directory.iterdir()) == []


def test_a_missing_file_tells_what_is_there(handler, directory):
    (directory / "other").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no file 'metadata'.* It has: other\."):
        handler.restore(directory)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_a_file_that_is_not_json_is_a_format_error(handler, directory, data):
    (directory / "metadata").write_bytes(data)
    with pytest.raises(errors.FormatError, match="metadata"):
        handler.restore(directory)


def test_the_file_name_can_be_chosen(registry, directory):
    handler = JsonCheckpointHandler("metrics")
    handler.registry = registry
    handler.save(directory, args=args.JsonSave({"loss": 0.5}))
    assert json.loads((directory / "metrics").read_text()) == {"loss": 0.5}


def test_a_file_name_that_leads_elsewhere_is_refused(registry, directory):
    handler = JsonCheckpointHandler("../metrics")
    handler.registry = registry
    with pytest.raises(errors.FormatError, match="does not stay inside"):
        handler.save(directory, args=args.JsonSave({}))


def test_orbax_reads_our_json_and_we_read_orbaxs(handler, directory):
    handler.save(directory, args=args.JsonSave({"a": [1, "ä"]}))
    assert ocp.JsonCheckpointHandler().restore(directory) == {"a": [1, "ä"]}
    ocp.JsonCheckpointHandler().save(directory, args=ocp.args.JsonSave({"b": 1.5}))
    assert handler.restore(directory) == {"b": 1.5}


# Composite


@pytest.fixture
def composite(registry):
    handler = CompositeCheckpointHandler()
    handler.registry = registry
    return handler


def save(handler, directory, items):
    """What a Checkpointer does around a handler."""
    handler.save(directory, items)
    handler.finalize(directory)
    (directory / STEP_FILE).write_bytes(encode_step(StepMetadata(item_handlers=handler.item_typestrs(items))))


@pytest.fixture
def saved(composite, directory):
    save(composite, directory, args.Composite(state=args.StandardSave(TREE), note=args.JsonSave({"x": 1})))
    return directory


def test_every_item_has_a_folder_and_a_type_string(saved):
    recorded = json.loads((saved / STEP_FILE).read_text())["item_handlers"]
    assert recorded == {
        "state": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
        "note": "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler",
    }
    assert (saved / "state" / "_METADATA").exists()
    assert (saved / "note" / "metadata").exists()


@pytest.mark.parametrize("restore_args", [None, args.Composite()])
def test_without_names_every_item_comes_back(composite, saved, restore_args):
    restored = composite.restore(saved, restore_args)
    assert isinstance(restored, args.Composite)
    np.testing.assert_array_equal(restored.state["a"], TREE["a"])
    assert restored.note == {"x": 1}


def test_only_the_items_named_come_back(composite, saved):
    restored = composite.restore(saved, args.Composite(note=args.JsonRestore()))
    assert dict(restored) == {"note": {"x": 1}}


def test_an_item_named_without_args_comes_back_as_saved(composite, saved):
    assert dict(composite.restore(saved, args.Composite(note=None))) == {"note": {"x": 1}}


def test_an_unknown_item_is_a_key_error_that_lists_those_there_are(composite, saved):
    with pytest.raises(KeyError, match=r"has no item 'model'\. It has: note, state\."):
        composite.restore(saved, args.Composite(model=args.StandardRestore()))


def test_a_recorded_item_whose_folder_is_gone_is_damage(composite, saved):
    shutil.rmtree(saved / "note")
    with pytest.raises(errors.NotFoundError, match="folders are gone: note"):
        composite.restore(saved)


def test_without_a_record_items_are_found_by_their_files(composite, saved):
    (saved / STEP_FILE).unlink()
    restored = composite.restore(saved)
    assert sorted(restored) == ["note", "state"]
    assert restored.note == {"x": 1}


def test_without_a_record_an_item_that_no_file_tells_of_needs_args(composite, saved):
    (saved / STEP_FILE).unlink()
    (saved / "note" / "metadata").rename(saved / "note" / "other")
    assert list(composite.restore(saved)) == ["state"]
    with pytest.raises(errors.FormatError, match=r"nothing tells how item 'note' was saved; .*Composite\(note=JsonRestore\(\)\)"):
        composite.restore(saved, args.Composite(note=None))


def test_an_item_of_an_unknown_handler_is_named(composite, saved):
    record = StepMetadata(item_handlers={"note": "acme.NotesHandler"})
    (saved / STEP_FILE).write_bytes(encode_step(record))
    with pytest.raises(errors.RegistryError, match=r"acme\.NotesHandler"):
        composite.restore(saved)
    assert composite.metadata(saved) == {"note": None}


@pytest.mark.parametrize("name", ["../outside", "/etc", "."])
def test_a_hostile_name_in_the_record_leads_nowhere(composite, saved, name):
    record = StepMetadata(item_handlers={name: "orbax.checkpoint._src.handlers.json_checkpoint_handler.JsonCheckpointHandler"})
    (saved / STEP_FILE).write_bytes(encode_step(record))
    with pytest.raises(errors.NotFoundError, match="records items whose folders are gone"):
        composite.restore(saved)


def test_a_checkpoint_of_one_handler_is_no_composite(composite, saved):
    (saved / STEP_FILE).write_bytes(encode_step(StepMetadata(item_handlers="acme.NotesHandler")))
    with pytest.raises(errors.ArgsError, match=r"no composite: acme\.NotesHandler saved it whole"):
        composite.restore(saved)


def test_metadata_is_each_items(composite, saved):
    metadata = composite.metadata(saved)
    assert metadata.state["a"].shape == (3,)
    assert metadata.note is None


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({}, "with one item at least"),
        ({"state": TREE}, r"'state': expected CheckpointArgs such as StandardSave\(tree\), not dict"),
        ({"state": None}, "not NoneType .*leave out"),
        ({"state": args.Composite(a=args.JsonSave({}))}, "a Composite holds no other"),
        ({"state": args.JsonRestore()}, "registered for restore, not for save"),
        ({"_METADATA": args.JsonSave({})}, "reserved"),
        ({"commit_success.txt": args.JsonSave({})}, "reserved"),
    ],
)
def test_items_that_cannot_be_saved_are_refused_before_anything_is_written(composite, directory, items, message):
    items = args.Composite(**items)
    with pytest.raises(ValueError, match=message):
        composite.item_typestrs(items)
    with pytest.raises(ValueError, match=message):
        composite.save(directory, items)
    assert list(directory.iterdir()) == []


def test_an_item_can_have_a_handler_of_its_own(registry, directory):
    handler = CompositeCheckpointHandler("state", note=JsonCheckpointHandler("notes.json"))
    handler.registry = registry
    save(handler, directory, args.Composite(note=args.JsonSave({"x": 1})))
    assert (directory / "note" / "notes.json").exists()
    assert handler.restore(directory).note == {"x": 1}


def test_that_handler_looks_things_up_where_the_composite_does(registry):
    note = JsonCheckpointHandler()
    handler = CompositeCheckpointHandler(note=note)
    handler.registry = registry
    handler.item_typestrs(args.Composite(note=args.JsonSave({})))
    assert note.registry is registry


def test_that_handler_refuses_args_of_another(registry, directory):
    handler = CompositeCheckpointHandler(note=JsonCheckpointHandler())
    handler.registry = registry
    with pytest.raises(errors.ArgsError, match=r"JsonCheckpointHandler cannot save with .*StandardSave"):
        handler.item_typestrs(args.Composite(note=args.StandardSave(TREE)))


def test_names_given_up_front_are_the_only_ones(registry):
    handler = CompositeCheckpointHandler("state")
    handler.registry = registry
    with pytest.raises(errors.ArgsError, match="'note' is not one the handler was made for: state"):
        handler.item_typestrs(args.Composite(note=args.JsonSave({})))


def test_a_failing_item_is_named_and_keeps_its_kind(composite, directory):
    items = args.Composite(note=args.JsonSave({"x": object()}), state=args.StandardSave(TREE))
    with pytest.raises(errors.ArgsTypeError, match=r"^item 'note': item\['x'\] is a builtins\.object"):
        composite.save(directory, items)


def test_a_missing_file_of_an_item_is_named(composite, saved):
    (saved / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(FileNotFoundError, match="item 'state'"):
        composite.restore(saved)


class LaterSave(args.CheckpointArgs):
    def __init__(self, error):
        self.error = error


class LaterHandler(AsyncCheckpointHandler):
    """Fails, if at all, in the background."""

    async def async_save(self, directory, args):
        future = concurrent.futures.Future()
        if args.error is None:
            future.set_result(None)
        else:
            future.set_exception(args.error)
        return [future]

    def restore(self, directory, args):
        return None


class NowHandler(CheckpointHandler):
    """Has no restore args."""

    def save(self, directory, args):
        (directory / "file").write_text("now")

    def restore(self, directory, args):
        return None


class NowSave(args.CheckpointArgs):
    pass


def test_an_error_in_the_background_names_its_item(composite, registry, directory):
    registry.add_args(LaterSave, LaterHandler, for_save=True)
    with pytest.raises(errors.StorageError, match="item 'later': disk full") as caught:
        composite.save(
            directory, args.Composite(fine=LaterSave(None), later=LaterSave(errors.StorageError(28, "disk full", "/x")))
        )
    assert caught.value.errno == 28


def test_a_foreign_error_keeps_its_message_and_has_a_note(composite, registry, directory):
    registry.add_args(LaterSave, LaterHandler, for_save=True)
    with pytest.raises(RuntimeError, match=r"^boom") as caught:
        composite.save(directory, args.Composite(later=LaterSave(RuntimeError("boom"))))
    assert caught.value.__notes__ == ["in item 'later'"]


def test_an_item_that_cannot_be_restored_says_why(composite, registry, directory):
    registry.add_args(NowSave, NowHandler, for_save=True)
    save(composite, directory, args.Composite(now=NowSave()))
    with pytest.raises(errors.RegistryError, match="Item 'now': no args class restores with NowHandler"):
        composite.restore(directory)


def test_orbax_restores_our_composite_and_we_restore_orbaxs(composite, saved, tmp_path):
    restored = ocp.Checkpointer(ocp.CompositeCheckpointHandler()).restore(saved)
    np.testing.assert_array_equal(restored.state["a"], TREE["a"])
    assert restored.note == {"x": 1}
    theirs = epath.Path(tmp_path / "theirs")
    items = ocp.args.Composite(state=ocp.args.StandardSave(TREE), note=ocp.args.JsonSave({"x": 1}))
    ocp.Checkpointer(ocp.CompositeCheckpointHandler()).save(theirs, items)
    ours = composite.restore(theirs)
    np.testing.assert_array_equal(ours.state["a"], TREE["a"])
    assert ours.note == {"x": 1}


def test_a_checkpointer_tells_the_item_that_failed_in_the_background_and_leaves_nothing(registry, tmp_path):
    registry.add_args(LaterSave, LaterHandler, for_save=True)
    items = args.Composite(state=args.StandardSave(TREE), later=LaterSave(errors.StorageError(28, "disk full", "/x")))
    checkpointer = ckptkit.AsyncCheckpointer(registry=registry)
    checkpointer.save(tmp_path / "checkpoint", items)
    with pytest.raises(errors.StorageError, match="item 'later': disk full"):
        checkpointer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpointer_restores_every_item(registry, tmp_path):
    checkpointer = ckptkit.Checkpointer(registry=registry)
    checkpointer.save(tmp_path / "checkpoint", args.Composite(state=args.StandardSave(TREE), note=args.JsonSave({"x": 1})))
    restored = checkpointer.restore(tmp_path / "checkpoint")
    np.testing.assert_array_equal(restored.state["a"], TREE["a"])
    assert restored.note == {"x": 1}
    assert checkpointer.metadata(tmp_path / "checkpoint").item_metadata.state["a"].shape == (3,)
