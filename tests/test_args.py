"""Args: what each class takes and refuses when made, how it is registered, and other people's classes."""

import dataclasses
import pickle
import subprocess
import sys

import attrs
import jax
import numpy as np
import pytest

import ckptkit
from ckptkit import args, errors
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.metadata.values import TreeMetadata
from ckptkit.registry import Registry

TREE = {"a": np.arange(3)}
METADATA = TreeMetadata(tree={"a": None})


class Handler(CheckpointHandler):
    def save(self, directory, args):
        pass

    def restore(self, directory, args):
        pass


# Registration


def test_the_decorator_registers_and_returns_the_class():
    registry = Registry()

    @args.register_with_handler(Handler, for_save=True, for_restore=True, registry=registry)
    class Both(args.CheckpointArgs):
        pass

    assert registry.handler_for_args(Both, use="save") is Handler
    assert registry.handler_for_args(Both, use="restore") is Handler


def test_without_a_registry_it_is_the_default_one():
    @args.register_with_handler(Handler, for_save=True)
    class DefaultSave(args.CheckpointArgs):
        pass

    assert ckptkit.default_registry().handler_for_args(DefaultSave, use="save") is Handler


def test_for_neither_use_is_a_value_error():
    with pytest.raises(ValueError, match="both False"):

        @args.register_with_handler(Handler, registry=Registry())
        class Neither(args.CheckpointArgs):
            pass


def test_a_class_that_is_no_args_is_a_type_error():
    with pytest.raises(TypeError, match=r"expected a subclass of ckptkit\.args\.CheckpointArgs"):

        @args.register_with_handler(Handler, for_save=True, registry=Registry())
        class NoArgs:
            pass


def test_a_class_that_is_no_handler_is_a_type_error():
    with pytest.raises(TypeError, match=r"expected a subclass of ckptkit\.handlers\.base\.CheckpointHandler"):

        @args.register_with_handler(object, for_save=True, registry=Registry())
        class Save(args.CheckpointArgs):
            pass


# Other people's classes


@dataclasses.dataclass
class DataclassSave(args.CheckpointArgs):
    item: object
    level: int = 1


@dataclasses.dataclass(frozen=True)
class FrozenSave(args.CheckpointArgs):
    item: object
    level: int = 1


@attrs.frozen
class AttrsSave(args.CheckpointArgs):
    item: object
    level: int = 1


class PlainSave(args.CheckpointArgs):
    def __init__(self, item, level=1):
        self.item = item
        self.level = level


FOREIGN = [DataclassSave, FrozenSave, AttrsSave, PlainSave]


@pytest.mark.parametrize("args_class", FOREIGN)
def test_any_kind_of_class_can_be_args(args_class):
    made = args.make_args(args_class, (TREE,), {"level": 2})
    assert isinstance(made, args.CheckpointArgs)
    assert made.item is TREE
    assert made.level == 2


@pytest.mark.parametrize("args_class", [*FOREIGN, args.StandardSave, args.PyTreeSave])
def test_arguments_that_do_not_fit_are_told_what_does(args_class):
    with pytest.raises(
        errors.ArgsTypeError, match=rf"{args_class.__qualname__} takes \(item, .*unexpected keyword argument 'leve'"
    ):
        args.make_args(args_class, (TREE,), {"leve": 2})


def test_a_missing_argument_is_named():
    with pytest.raises(TypeError, match=r"StandardSave takes \(item, save_args=None, custom_metadata=None\): missing .*'item'"):
        args.make_args(args.StandardSave, (), {})


# The built-in classes


def test_long_names_are_the_same_classes():
    for name in ("StandardSave", "StandardRestore", "PyTreeSave", "PyTreeRestore", "JsonSave", "JsonRestore", "Composite"):
        assert getattr(args, f"{name}Args") is getattr(args, name)


def test_positions_are_orbaxs():
    assert args.StandardSave(1, 2, 3).custom_metadata == 3
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert args.StandardRestore(TREE, False, True, sharding).fallback_sharding is sharding
    assert args.PyTreeSave(1, 2, 4096, 3).ocdbt_target_data_file_size == 4096
    assert args.PyTreeRestore(TREE, {"a": None}, {}).restore_args == {"a": None}


@pytest.mark.parametrize("args_class", [args.StandardSave, args.PyTreeSave])
def test_metadata_cannot_be_saved(args_class):
    with pytest.raises(ValueError, match=r"Cannot save TreeMetadata\."):
        args_class(METADATA)


@pytest.mark.parametrize("args_class", [args.StandardRestore, args.PyTreeRestore])
def test_metadata_as_a_target_stands_for_its_tree(args_class):
    assert args_class(METADATA).item is METADATA.tree


@pytest.mark.parametrize("args_class", [args.StandardRestore, args.PyTreeRestore])
def test_casting_is_one_of_numpys_words(args_class):
    assert args_class(casting="same_kind").casting == "same_kind"
    with pytest.raises(errors.ArgsError, match=r"casting='maybe'\): expected one of no, equiv"):
        args_class(casting="maybe")


def test_a_sharding_in_the_place_of_strict_is_noticed():
    with pytest.raises(errors.ArgsTypeError, match=r"StandardRestore\(strict='sharding'\): expected True or False"):
        args.StandardRestore(TREE, "sharding")


def test_transforms_are_refused():
    assert args.PyTreeRestore(transforms={}).transforms == {}
    with pytest.raises(errors.ArgsError, match=r"transforms=\.\.\.\) is not supported; restore without a target"):
        args.PyTreeRestore(transforms={"a": 1})


def test_a_repr_does_not_print_the_tree():
    assert repr(args.StandardSave(TREE)) == "StandardSave(item=<dict>, save_args=<NoneType>, custom_metadata=None)"


def test_args_need_no_jax():
    code = "import sys; from ckptkit import args, registry; registry.default_registry(); print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


# Composite


def test_items_are_reached_by_name_and_by_attribute():
    composite = args.Composite(state=1, note=2)
    assert composite.state == composite["state"] == 1
    assert dict(composite) == {"state": 1, "note": 2}
    assert "note" in composite
    assert len(composite) == 2
    assert composite == {"note": 2, "state": 1}


def test_names_of_methods_are_reached_by_brackets():
    composite = args.Composite(items=1, keys=2, _Composite__names=3)
    assert composite["items"] == 1
    assert sorted(composite.keys()) == ["_Composite__names", "items", "keys"]


def test_an_unknown_item_lists_those_there_are():
    composite = args.Composite(state=1)
    with pytest.raises(KeyError, match=r"^No item 'model'; there are: state\.$") as caught:
        composite["model"]
    assert isinstance(caught.value, errors.UnknownItemError)
    with pytest.raises(AttributeError, match=r"No item 'model'; there are: state\."):
        composite.model  # noqa: B018 - the access is what fails
    assert composite.get("model") is None


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "__x", "a\\b", "a\0"])
def test_a_name_that_is_no_folders_is_refused(name):
    with pytest.raises(errors.ArgsError, match="cannot name an item"):
        args.Composite(**{name: 1})


def test_a_composite_does_not_change():
    composite = args.Composite(state=1)
    with pytest.raises(errors.ArgsError, match="does not change"):
        composite.state = 2


def test_a_composite_is_pickled_and_printed():
    composite = args.Composite(state=1, note="x")
    assert pickle.loads(pickle.dumps(composite)) == composite  # noqa: S301 - our own
    assert repr(composite) == "Composite(state=1, note='x')"


def test_attributes_are_completed():
    assert "state" in dir(args.Composite(state=1))
