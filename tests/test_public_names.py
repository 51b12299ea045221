"""The public names: which there are, and that type checkers and the interpreter see the same."""

import ast
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest

import ckptkit

ROOT = Path(__file__).parents[1]

NAMES = {
    "": """ArrayCheckpointHandler ArrayRestoreArgs AsyncCheckpointHandler AsyncCheckpointer AsyncOptions CheckpointHandler
        Checkpointer CompositeCheckpointHandler JaxRandomKeyCheckpointHandler JsonCheckpointHandler
        NumpyRandomKeyCheckpointHandler PLACEHOLDER PyTreeCheckpointHandler PyTreeCheckpointer Registry RestoreArgs SaveArgs
        StandardCheckpointHandler StandardCheckpointer StorageBackend TypeHandler args checkpoint_utils clean
        construct_restore_args default_registry errors handlers hookimpl hookspec hookspecs leaves metadata options progress
        reached_preemption reports restore save save_async storage type_handlers utils verify""",
    ".handlers": """ArrayCheckpointHandler AsyncCheckpointHandler CheckpointHandler CompositeCheckpointHandler
        DeferredPathAsyncCheckpointHandler JaxRandomKeyCheckpointHandler JsonCheckpointHandler NumpyRandomKeyCheckpointHandler
        PathAwaitingCreation PyTreeCheckpointHandler StandardCheckpointHandler""",
    ".storage": """ArraySpec Chunk FileLocation Index Job KvStoreLocation Location LocationPath ManyWriters MarkerLocation
        PartialReader Pending Reader StorageBackend Workers Writer chunk_count chunk_indices fit_chunk_shape joined
        mapped_os_errors saved_names whole""",
    ".testing": "CheckpointHandlerTests StorageBackendTests TypeHandlerTests abstract assert_same",
    ".metadata": """ArrayMetadata Metadata ScalarMetadata ShardingMetadata StepMetadata StorageMetadata StringMetadata
        TreeMetadata""",
}


@pytest.mark.parametrize("module", NAMES)
def test_these_names_are_public(module):
    assert importlib.import_module(f"ckptkit{module}").__all__ == NAMES[module].split()


@pytest.mark.parametrize("module", NAMES)
def test_type_checkers_see_the_same_names_from_the_same_homes(module):
    loaded = importlib.import_module(f"ckptkit{module}")
    (block,) = [node for node in ast.parse(inspect.getsource(loaded)).body if isinstance(node, ast.If)]
    seen = {}
    for statement in block.body:
        (alias,) = statement.names
        assert alias.asname == alias.name, "a plain import is not re-exported"
        seen[alias.name] = statement.module
    homes = inspect.getclosurevars(loaded.__getattr__).nonlocals["homes"]
    assert seen == {name: home.removesuffix(f".{name}") for name, home in homes.items()}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_the_object_in_its_home(module):
    loaded = importlib.import_module(f"ckptkit{module}")
    homes = inspect.getclosurevars(loaded.__getattr__).nonlocals["homes"]
    for name, home in homes.items():
        defined = importlib.import_module(home)
        expected = defined if home == f"{loaded.__name__}.{name}" else getattr(defined, name)
        assert getattr(loaded, name) is expected


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ckptkit' has no attribute 'CheckpointManger'"):
        ckptkit.CheckpointManger  # noqa: B018 - the access is what fails


def test_the_version_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("version", ckptkit.__version__) == ckptkit.__version__
