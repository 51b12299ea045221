"""The registry: lookups, conflicts, classes executed again, undoing."""

import collections
import os
import pathlib
import sys
import threading
import types
from typing import Any

import numpy as np
import pytest
from etils import epath

from ckptkit import args, errors
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.handlers.json import JsonCheckpointHandler
from ckptkit.leaves.numpy import NumpyHandler
from ckptkit.leaves.scalar import ScalarHandler
from ckptkit.leaves.string import StringHandler
from ckptkit.location import FileLocation
from ckptkit.registry import Owner, Registry, owned_by
from ckptkit.storage.base import StorageBackend

ACME = Owner("acme.plugin", "acme-checkpoints", "1.2", "acme")
OTHER = Owner("other", "other-package", "3.0", "other")
BUILTIN = Owner("ckptkit.builtins", "ckptkit", "0.1.0")


class NotesHandler(CheckpointHandler):
    def save(self, directory, args):
        pass

    def restore(self, directory, args):
        pass


class OtherNotesHandler(NotesHandler):
    pass


class NotesSave(args.CheckpointArgs):
    pass


class NotesRestore(args.CheckpointArgs):
    pass


class ArrayLikeHandler(NumpyHandler):
    typestr = "acme.array-like"


class ForeignBackend(StorageBackend):
    name = "foreign"

    def refuse(self, arrays):
        return [None for _ in arrays]

    def writer(self, location, arrays, options, job):
        raise NotImplementedError

    def reader(self, location):
        raise NotImplementedError

    def recognises(self, location):
        return False


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def notes(registry):
    registry.add_args(NotesSave, NotesHandler, for_save=True)
    registry.add_args(NotesRestore, NotesHandler, for_restore=True)
    return registry


# Args and handlers


def test_the_class_of_args_finds_the_handler(notes):
    assert notes.handler_for_args(NotesSave(), use="save") is NotesHandler
    assert notes.handler_for_args(NotesRestore, use="restore") is NotesHandler


def test_args_of_an_unregistered_class_are_told_how_to_register(registry):
    with pytest.raises(
        ValueError, match=r"NotesSave is not registered .*register_with_handler\(TheHandler, for_save=True\)"
    ) as caught:
        registry.handler_for_args(NotesSave(), use="save")
    assert isinstance(caught.value, errors.RegistryError)


def test_args_registered_for_the_other_use_are_told_what_to_take(notes):
    with pytest.raises(errors.RegistryError, match=r"registered for save, not for restore. .* takes for restore: .*NotesRestore"):
        notes.handler_for_args(NotesSave(), use="restore")


def test_args_for_neither_use_are_refused(registry):
    with pytest.raises(ValueError, match="both False"):
        registry.add_args(NotesSave, NotesHandler)


@pytest.mark.parametrize(
    ("args_class", "handler_class"),
    [(dict, NotesHandler), (NotesSave(), NotesHandler), (NotesSave, dict), (NotesSave, NotesHandler())],
)
def test_what_is_no_args_or_handler_class_is_a_type_error(registry, args_class, handler_class):
    with pytest.raises(TypeError, match="expected a subclass of ckptkit"):
        registry.add_args(args_class, handler_class, for_save=True)


def test_args_bound_to_another_handler_conflict_and_both_owners_are_named(registry):
    with owned_by(ACME):
        registry.add_args(NotesSave, NotesHandler, for_save=True)
    with (
        owned_by(OTHER),
        pytest.raises(errors.ConflictError, match=r"acme-checkpoints 1\.2 .*'acme'.*other-package 3\.0 .*'other'"),
    ):
        registry.add_args(NotesSave, JsonCheckpointHandler, for_save=True)
    assert registry.handler_for_args(NotesSave, use="save") is NotesHandler


def test_registering_twice_changes_nothing(notes):
    notes.add_args(NotesSave, NotesHandler, for_save=True)
    assert notes.args_for(NotesHandler, "save") == (NotesSave,)


def test_args_classes_of_a_handler_come_in_order_and_those_of_its_bases_last(notes):
    class MoreSave(args.CheckpointArgs):
        pass

    class SpecialSave(args.CheckpointArgs):
        pass

    notes.add_args(MoreSave, NotesHandler, for_save=True)
    notes.add_args(SpecialSave, OtherNotesHandler, for_save=True)
    assert notes.args_for(OtherNotesHandler, "save") == (SpecialSave, NotesSave, MoreSave)
    assert notes.args_for(NotesHandler, "save") == (NotesSave, MoreSave)


def test_args_of_another_handler_are_refused_with_both_names(notes):
    notes.add_args(args.JsonSave, JsonCheckpointHandler, for_save=True)
    message = (
        r"NotesHandler cannot save with ckptkit\.args\.JsonSave, which belongs to .*JsonCheckpointHandler\. It takes: .*NotesSave"
    )
    with pytest.raises(errors.ArgsError, match=message):
        notes.check_args(NotesHandler, args.JsonSave({}), "save")


def test_args_that_are_no_args_are_refused(notes):
    with pytest.raises(errors.ArgsError, match=r"cannot save with builtins\.dict\. It takes: .*NotesSave"):
        notes.check_args(NotesHandler, {}, "save")


def test_an_unregistered_subclass_of_a_handlers_args_belongs_to_it(notes):
    class Special(NotesSave):
        pass

    notes.check_args(NotesHandler, Special(), "save")


def test_args_of_a_subclass_do_not_belong_to_the_base(notes):
    class Special(NotesSave):
        pass

    notes.add_args(Special, OtherNotesHandler, for_save=True)
    notes.check_args(OtherNotesHandler, Special(), "save")
    with pytest.raises(errors.ArgsError, match=r"belongs to .*OtherNotesHandler"):
        notes.check_args(NotesHandler, Special(), "save")


def test_classes_made_by_one_function_are_told_apart(registry):
    def make(handler):
        class Save(args.CheckpointArgs):
            pass

        registry.add_args(Save, handler, for_save=True)
        return Save

    first, second = make(NotesHandler), make(JsonCheckpointHandler)
    assert registry.handler_for_args(first, use="save") is NotesHandler
    assert registry.handler_for_args(second, use="save") is JsonCheckpointHandler


def test_handlers_made_by_one_function_take_their_own_args_alone(registry):
    def make():
        class Handler(NotesHandler):
            pass

        class Save(args.CheckpointArgs):
            pass

        registry.add_args(Save, Handler, for_save=True)
        return Save, Handler

    (first, first_handler), (second, _) = make(), make()
    assert registry.args_for(first_handler, "save") == (first,)
    with pytest.raises(errors.ArgsError, match="belongs to"):
        registry.check_args(first_handler, second(), "save")


# Type strings of handlers


def test_a_type_string_finds_the_handler(notes):
    assert notes.handler_for_typestr(NotesHandler.typestr()) is NotesHandler


def test_further_type_strings_find_it_too(registry):
    class Renamed(NotesHandler):
        further_typestrs = ("acme.old.Name",)

    registry.add_handler(Renamed)
    assert registry.handler_for_typestr("acme.old.Name") is Renamed


def test_an_unknown_type_string_is_told_what_is_known(notes):
    with pytest.raises(errors.RegistryError, match=r"(?s)'acme\.Missing'.*Install the package.*NotesHandler"):
        notes.handler_for_typestr("acme.Missing")


def test_a_taken_type_string_is_a_conflict_and_nothing_is_registered(notes):
    class Thief(CheckpointHandler):
        def save(self, directory, args):
            pass

        def restore(self, directory, args):
            pass

        @classmethod
        def typestr(cls):
            return NotesHandler.typestr()

    class ThiefSave(args.CheckpointArgs):
        pass

    with pytest.raises(ValueError, match=r"NotesHandler.*wants it too"):
        notes.add_args(ThiefSave, Thief, for_save=True)
    assert notes.args_for(Thief, "save") == ()


class MyJsonHandler(JsonCheckpointHandler):
    """Inherits the type string."""


@pytest.mark.parametrize("order", [(JsonCheckpointHandler, MyJsonHandler), (MyJsonHandler, JsonCheckpointHandler)])
def test_an_inherited_type_string_stays_with_the_base(registry, order):
    for handler_class in order:
        registry.add_handler(handler_class)
    assert registry.handler_for_typestr(JsonCheckpointHandler.typestr()) is JsonCheckpointHandler


@pytest.mark.parametrize("typestr", [lambda self: "acme", classmethod(lambda cls: ""), classmethod(lambda cls: None)])
def test_a_type_string_that_is_none_is_a_type_error(registry, typestr):
    broken = type("Broken", (NotesHandler,), {"typestr": typestr})
    with pytest.raises(errors.ArgsTypeError, match=r"(?i)type ?str"):
        registry.add_handler(broken)


# Type handlers


def test_a_leaf_type_is_matched_along_its_bases(registry):
    handler = ScalarHandler()
    registry.add_type_handler(handler, (int, float))
    assert registry.type_handler_for(bool) is handler
    assert registry.type_handler_for(str) is None


def test_the_nearest_base_wins(registry):
    registry.add_type_handler(NumpyHandler(), np.ndarray)
    special = ArrayLikeHandler()
    registry.add_type_handler(special, np.ma.MaskedArray)
    assert registry.type_handler_for(type("Mine", (np.ma.MaskedArray,), {})) is special


def test_a_dotted_name_matches_without_an_import(registry):
    registry.add_type_handler(NumpyHandler(), "acme_arrays.Tensor")
    tensor = type("Tensor", (), {"__module__": "acme_arrays"})
    assert isinstance(registry.type_handler_for(tensor), NumpyHandler)


def test_a_public_name_leads_to_a_class_with_another(registry, monkeypatch):
    registry.add_type_handler(NumpyHandler(), "acme_public.Tensor")
    public = types.ModuleType("acme_public")
    public.Tensor = type("TensorImpl", (), {"__module__": "acme_public._core"})
    monkeypatch.setitem(sys.modules, "acme_public", public)
    assert isinstance(registry.type_handler_for(public.Tensor), NumpyHandler)


def test_a_public_name_conflicts_with_the_class_behind_it(registry):
    registry.add_type_handler(NumpyHandler(), collections.OrderedDict)
    with pytest.raises(errors.ConflictError, match=r"override=True"):
        registry.add_type_handler(StringHandler(), "collections.OrderedDict")


def test_a_leaf_type_registered_twice_is_a_conflict(registry):
    registry.add_type_handler(NumpyHandler(), np.ndarray)
    with pytest.raises(ValueError, match=r"'numpy\.ndarray'.*NumpyHandler.*ArrayLikeHandler.*override=True"):
        registry.add_type_handler(ArrayLikeHandler(), np.ndarray)


def test_override_replaces_and_the_cache_notices(registry):
    registry.add_type_handler(NumpyHandler(), np.ndarray)
    assert isinstance(registry.type_handler_for(np.ndarray), NumpyHandler)
    replacement = ArrayLikeHandler()
    registry.add_type_handler(replacement, np.ndarray, override=True)
    assert registry.type_handler_for(np.ndarray) is replacement
    assert isinstance(registry.type_handler_named("np.ndarray"), NumpyHandler)


def test_a_colliding_type_string_is_a_conflict(registry):
    class Impostor(StringHandler):
        typestr = "np.ndarray"

    registry.add_type_handler(NumpyHandler(), np.ndarray)
    with pytest.raises(ValueError, match=r"type string of a type handler 'np\.ndarray'"):
        registry.add_type_handler(Impostor(), str)
    assert registry.type_handler_for(str) is None


def test_further_type_strings_name_the_type_handler(registry):
    handler = NumpyHandler()
    registry.add_type_handler(handler, np.ndarray, further_typestrs=["acme.array"])
    assert registry.type_handler_named("acme.array") is handler
    assert registry.type_handler_named("acme.unknown") is None


@pytest.mark.parametrize(
    ("handler", "leaf_type", "message"),
    [
        (NumpyHandler, np.ndarray, r"is a class; expected an instance: NumpyHandler\(\)"),
        (object(), np.ndarray, "is not a type handler"),
        (NumpyHandler(), "ndarray", "expected a class, or a dotted name"),
        (NumpyHandler(), 5, "expected a class, or a dotted name"),
    ],
)
def test_what_is_no_type_handler_or_type_is_a_type_error(registry, handler, leaf_type, message):
    with pytest.raises(errors.ArgsTypeError, match=message):
        registry.add_type_handler(handler, leaf_type)


def test_a_word_that_orbax_does_not_know_is_refused(registry):
    class Invented(NumpyHandler):
        orbax_typestr = "tensor"

    with pytest.raises(errors.ArgsError, match=r"'tensor'; expected jax\.Array or"):
        registry.add_type_handler(Invented(), np.ndarray)


def test_asking_for_something_that_is_no_type_is_a_type_error(registry):
    with pytest.raises(errors.ArgsTypeError, match="is not a class"):
        registry.type_handler_for("np.ndarray")


# Storage backends and places


def test_a_backend_is_found_by_name(registry):
    backend = ForeignBackend()
    registry.add_storage(backend)
    assert registry.storage("foreign") is backend
    assert registry.storages() == (backend,)


def test_an_unknown_backend_is_told_what_is_known(registry):
    registry.add_storage(ForeignBackend())
    with pytest.raises(errors.RegistryError, match=r"no storage backend 'safetensors'. Known: foreign"):
        registry.storage("safetensors")


def test_a_backend_name_is_taken_once(registry):
    class Second(ForeignBackend):
        pass

    registry.add_storage(ForeignBackend())
    with pytest.raises(errors.ConflictError, match="storage backend 'foreign'"):
        registry.add_storage(Second())
    registry.add_storage(Second(), override=True)
    assert isinstance(registry.storage("foreign"), Second)


@pytest.fixture
def places(registry):
    registry.add_scheme("file", FileLocation)
    return registry


@pytest.mark.parametrize("kind", [str, pathlib.Path, epath.Path])
def test_a_path_of_any_kind_is_a_place(places, tmp_path, kind):
    assert places.location(kind(tmp_path / "run")).local_path == str(tmp_path / "run")


def test_a_relative_path_is_resolved(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert places.location("run/1").local_path == str(tmp_path / "run" / "1")


def test_a_tilde_is_the_home_directory(places, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.location("~/run").local_path == str(tmp_path / "run")


def test_a_place_is_itself(places, tmp_path):
    location = FileLocation(tmp_path)
    assert places.location(location) is location


@pytest.mark.parametrize(("path", "kind"), [("", ValueError), ("a\0b", ValueError), (b"run", TypeError), (5, TypeError)])
def test_what_is_no_path_is_refused(places, path, kind):
    with pytest.raises(kind, match="is not a path"):
        places.location(path)


def test_a_path_of_bytes_is_refused(places):
    class BytesPath:
        def __fspath__(self):
            return b"run"

    with pytest.raises(errors.ArgsTypeError, match="not bytes"):
        places.location(BytesPath())


def test_the_factory_of_a_scheme_is_given_the_url(places):
    urls = []
    places.add_scheme("acme", lambda url: urls.append(url) or FileLocation("/somewhere"))
    places.location("ACME://bucket/run")
    assert urls == ["ACME://bucket/run"]


def test_an_unknown_scheme_is_told_what_is_known(places):
    with pytest.raises(errors.RegistryError, match=r"s3://bucket/run: .*'s3'. Known: file"):
        places.location("s3://bucket/run")


def test_a_url_that_lost_a_slash_is_noticed(places):
    places.add_scheme("s3", FileLocation)
    with pytest.raises(errors.ArgsError, match="lost a '/'"):
        places.location(pathlib.Path("s3://bucket/run"))


@pytest.mark.parametrize("scheme", ["s3://", "", "s 3", "1"])
def test_what_is_no_scheme_is_refused(registry, scheme):
    with pytest.raises(errors.ArgsError, match=r"scheme"):
        registry.add_scheme(scheme, FileLocation)


def test_two_functions_for_a_scheme_conflict(registry):
    registry.add_scheme("acme", lambda url: FileLocation(f"/one/{url}"))
    with pytest.raises(errors.ConflictError, match="scheme 'acme'"):
        registry.add_scheme("acme", lambda url: FileLocation(f"/two/{url}"))


# Owners, undoing, executing again


def test_who_provides_a_type_string_is_known(registry):
    with owned_by(ACME):
        registry.add_type_handler(ArrayLikeHandler(), np.ndarray)
    registry.add_handler(NotesHandler)
    assert registry.provider_of("acme.array-like") == "acme-checkpoints 1.2"
    assert registry.provider_of(NotesHandler.typestr()) == f"module {__name__}"


def test_a_plugin_that_fails_leaves_nothing_behind(registry):
    registry.add_type_handler(NumpyHandler(), np.ndarray)
    with pytest.raises(RuntimeError), registry.loading(ACME), owned_by(ACME):  # noqa: PT012 - the block is what fails
        registry.add_args(NotesSave, NotesHandler, for_save=True)
        registry.add_type_handler(ArrayLikeHandler(), np.ndarray, override=True)
        raise RuntimeError
    assert registry.args_for(NotesHandler, "save") == ()
    assert isinstance(registry.type_handler_for(np.ndarray), NumpyHandler)
    assert registry.type_handler_named("acme.array-like") is None
    registry.add_args(NotesSave, JsonCheckpointHandler, for_save=True)


def load_module(name: str, source: str, namespace: dict[str, Any]) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(namespace)
    sys.modules[name] = module
    exec(source, vars(module))  # noqa: S102 - as a notebook or importlib.reload executes it
    return module


NOTEBOOK = """
class Handler(CheckpointHandler):
    def save(self, directory, args): ...
    def restore(self, directory, args): ...

class Save(CheckpointArgs):
    pass

registry.add_args(Save, Handler, for_save=True)
"""


@pytest.fixture
def notebook(registry, monkeypatch):
    namespace = {"registry": registry, "CheckpointHandler": CheckpointHandler, "CheckpointArgs": args.CheckpointArgs}

    def run(source=NOTEBOOK, name="acme.args"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        return load_module(name, source, namespace)

    return run


def test_a_class_executed_again_replaces_itself(registry, notebook):
    notebook()
    new = notebook()
    assert registry.args_for(new.Handler, "save") == (new.Save,)
    assert registry.handler_for_typestr("acme.args.Handler") is new.Handler
    assert registry.handler_for_args(new.Save(), use="save") is new.Handler


def test_instances_from_before_find_the_new_handler(registry, notebook):
    old, new = notebook(), notebook()
    assert registry.handler_for_args(old.Save(), use="save") is new.Handler
    registry.check_args(old.Handler, new.Save(), "save")
    registry.check_args(new.Handler, old.Save(), "save")


def test_what_a_plugins_package_registers_at_import_is_the_plugins(registry, notebook):
    notebook(name="acme.args")
    notebook(name="beta.args")
    with registry.loading(ACME):
        pass
    assert registry.provider_of("acme.args.Handler") == "acme-checkpoints 1.2"
    assert registry.provider_of("beta.args.Handler") == "module beta.args"


def test_a_reload_leaves_it_with_the_plugin(registry, notebook):
    notebook()
    with registry.loading(ACME):
        pass
    notebook()
    assert registry.provider_of("acme.args.Handler") == "acme-checkpoints 1.2"


def test_what_a_failing_import_registered_is_undone_but_not_what_others_did(registry, notebook):
    notebook(name="acme.before")
    with pytest.raises(ImportError), registry.loading(ACME):  # noqa: PT012 - the block is what fails
        notebook(name="acme.args")
        notebook(name="beta.args")
        raise ImportError
    assert [s for s in ("acme.before", "acme.args", "beta.args") if has(registry, f"{s}.Handler")] == ["acme.before", "beta.args"]


def has(registry, typestr):
    try:
        return bool(registry.handler_for_typestr(typestr))
    except errors.RegistryError:
        return False


def test_a_failing_plugin_does_not_take_what_another_registered_too(registry):
    with owned_by(BUILTIN):
        registry.add_type_handler(NumpyHandler(), np.ndarray)
    with pytest.raises(RuntimeError), registry.loading(ACME), owned_by(ACME):  # noqa: PT012 - the block is what fails
        registry.add_type_handler(NumpyHandler(), np.ndarray)
        raise RuntimeError
    assert isinstance(registry.type_handler_for(np.ndarray), NumpyHandler)
    assert registry.provider_of("np.ndarray") == "ckptkit 0.1.0"


def test_an_override_made_before_the_built_ins_outlasts_them(registry):
    mine = ArrayLikeHandler()
    registry.add_type_handler(mine, np.ndarray, override=True)
    with owned_by(BUILTIN):
        registry.add_type_handler(NumpyHandler(), np.ndarray)
    assert registry.type_handler_for(np.ndarray) is mine


def test_a_claim_to_what_is_built_in_conflicts_when_the_built_ins_come_later(registry):
    registry.add_type_handler(ArrayLikeHandler(), np.ndarray)
    with owned_by(BUILTIN), pytest.raises(errors.ConflictError, match=r"module .*test_registry.*ckptkit 0\.1\.0 \(built in\)"):
        registry.add_type_handler(NumpyHandler(), np.ndarray)


# Loading


def test_the_first_lookup_loads_once(tmp_path):
    loaded = []

    def load(registry):
        loaded.append(registry)
        registry.add_scheme("file", FileLocation)
        registry.location(tmp_path)  # a lookup from within does not load again

    registry = Registry(load=load)
    assert loaded == []
    threads = [threading.Thread(target=registry.location, args=(tmp_path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [registry]


def test_loading_that_fails_is_tried_again():
    def load(registry):
        attempts.append(1)
        if len(attempts) == 1:
            raise errors.ConflictError("taken")

    attempts: list[int] = []
    registry = Registry(load=load)
    with pytest.raises(errors.ConflictError):
        registry.storages()
    assert registry.storages() == ()


def test_threads_register_and_look_up_at_once(registry):
    failures = []

    def work(n):
        try:
            for i in range(50):
                registry.add_type_handler(NumpyHandler(), f"acme_{n}.Type{i}")
                cls = type(f"Type{i}", (), {"__module__": f"acme_{n}"})
                assert registry.type_handler_for(cls) is not None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_path_like_objects_of_ones_own_are_paths(places, tmp_path):
    class Mine(os.PathLike):
        def __fspath__(self):
            return str(tmp_path)

    assert places.location(Mine()).local_path == str(tmp_path)
