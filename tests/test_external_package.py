"""Packages outside the tree, built and installed with pip: what they register is there in a fresh process, unasked."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import fresh as processes
import pytest

PACKAGES = Path(__file__).parent / "packages"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory with both packages installed in it."""
    target, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source")
    shutil.copytree(PACKAGES, source, dirs_exist_ok=True)
    packages = [source / "acme_checkpoints", source / "broken_checkpoints"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--no-deps", "--target", target, *packages], check=True, timeout=240)
    return target


@pytest.fixture
def fresh(site, tmp_path):
    """Runs code in a process of its own, which sees the installed packages; returns what it printed, and its log."""
    return lambda code: run(f"path = {str(tmp_path / 'checkpoint')!r}\n{textwrap.dedent(code)}", site)


def run(code, *paths):
    done = processes.run(code, paths=paths)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_args_and_handler_of_a_package_save_here_and_restore_in_a_fresh_process(fresh):
    save = """
    import ckptkit
    from acme_checkpoints.notes import NotesSave
    ckptkit.Checkpointer().save(path, NotesSave(["one", "two"]))
    """
    restore = """
    import ckptkit
    print(ckptkit.Checkpointer().restore(path))
    """
    assert "acme saw a checkpoint at" in fresh(save)[0]
    printed, _ = fresh(restore)
    assert "['one', 'two']" in printed
    assert "acme saw a restore from" in printed


def test_their_args_restore_too(fresh):
    code = """
    import ckptkit
    from acme_checkpoints.notes import NotesRestore, NotesSave
    ckptkit.save(path, NotesSave(["one"]))
    print(ckptkit.restore(path, NotesRestore(shout=True)))
    """
    assert "['ONE']" in fresh(code)[0]


def test_a_leaf_type_of_a_package_comes_back_in_a_fresh_process(fresh):
    save = """
    import ckptkit, numpy as np
    from acme_checkpoints.quantity import Quantity
    with ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"mass": Quantity(np.array([1.5, 2.5]), "kg"), "steps": 7})
    """
    restore = """
    import ckptkit
    tree = ckptkit.StandardCheckpointer().restore(path)
    print(type(tree["mass"]).__module__, tree["mass"].values, tree["mass"].unit, tree["steps"])
    """
    fresh(save)
    assert "acme_checkpoints.quantity [1.5 2.5] kg 7" in fresh(restore)[0]


def restored_without(path):
    """The error of a restore in a process that does not see the packages."""
    code = f"import ckptkit\ntry: ckptkit.restore({str(path)!r})\nexcept ckptkit.errors.RegistryError as error: print(error)"
    return run(code)[0]


def test_who_provides_the_leaf_type_is_in_the_checkpoint(fresh, tmp_path):
    save = """
    import ckptkit, numpy as np
    from acme_checkpoints.quantity import Quantity
    ckptkit.save(path, {"mass": Quantity(np.array([1.5]), "kg")})
    """
    fresh(save)
    printed = restored_without(tmp_path / "checkpoint")
    assert "'acme.quantity'" in printed
    assert "acme-checkpoints 1.2.0" in printed


def test_without_the_package_the_error_names_what_is_missing(fresh, tmp_path):
    fresh("import ckptkit\nfrom acme_checkpoints.notes import NotesSave\nckptkit.save(path, NotesSave([]))")
    assert "'acme_checkpoints.notes.NotesHandler'" in restored_without(tmp_path / "checkpoint")


def test_it_is_part_of_a_composite_too(fresh):
    save = """
    import ckptkit, numpy as np
    from ckptkit.args import Composite, StandardSave
    from acme_checkpoints.notes import NotesSave
    ckptkit.save(path, Composite(state=StandardSave({"a": np.arange(3)}), notes=NotesSave(["x"])))
    """
    fresh(save)
    printed = fresh("import ckptkit\nrestored = ckptkit.restore(path)\nprint(restored.notes, restored.state['a'])")[0]
    assert "['x'] [0 1 2]" in printed


def test_broken_packages_are_reported_once_each_and_nothing_else_breaks(fresh):
    code = """
    import ckptkit, numpy as np
    from ckptkit import discovery
    ckptkit.save(path, {"a": np.arange(3)})
    print(ckptkit.restore(path)["a"])
    for failure in discovery.failures():
        print(failure)
    try:
        ckptkit.default_registry().handler_for_typestr("broken_checkpoints.half.HalfHandler")
    except ckptkit.errors.RegistryError as error:
        print("absent" if "entry point 'half'" in str(error) else "")
    """
    printed, log = fresh(code)
    assert "[0 1 2]" in printed
    assert "plugin broken-checkpoints 0.9.0 (entry point 'half') failed to load: OSError: no such device" in printed
    assert "plugin broken-checkpoints 0.9.0 (entry point 'raising') failed to load: LookupError: not today" in printed
    assert "plugin broken-checkpoints 0.9.0 (entry point 'taken') failed to load: ConflictError: args class (for save)" in printed
    assert "absent" in printed
    assert log.count("failed to load") == 3
