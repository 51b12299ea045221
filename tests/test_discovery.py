"""Plugins: how installed ones are found and loaded, and that a broken one harms nobody else."""

import importlib.metadata
import logging
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import ckptkit
from ckptkit import args, discovery, errors
from ckptkit.leaves.numpy import NumpyHandler
from ckptkit.registry import Registry

GOOD = """
from ckptkit.args import CheckpointArgs, register_with_handler
from ckptkit.handlers import CheckpointHandler

class Handler(CheckpointHandler):
    def save(self, directory, args): ...
    def restore(self, directory, args): ...

class Save(CheckpointArgs):
    pass
"""
REGISTERS = """
from ckptkit import hookimpl

@hookimpl
def ckptkit_register(registry):
    registry.add_args(Save, Handler, for_save=True)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes installed packages: {module file: source}, with an entry point; returns what a search would find."""
    made = []

    def make(name, version, value, **files):
        site = tmp_path / name
        (site / f"{name}-{version}.dist-info").mkdir(parents=True)
        (site / f"{name}-{version}.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (site / f"{name}-{version}.dist-info" / "entry_points.txt").write_text(f"[ckptkit]\nplug = {value}\n")
        for module, source in files.items():
            file = site / f"{module.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(source))
            made.append(module)
        monkeypatch.syspath_prepend(site)
        (distribution,) = importlib.metadata.distributions(path=[str(site)])
        return list(distribution.entry_points)

    yield make
    for module in list(sys.modules):
        if module.partition(".")[0] in {name.partition("__")[0] for name in made}:
            del sys.modules[module]


@pytest.fixture
def registry():
    return Registry()


def failure(registry):
    (found,) = registry.failures
    return str(found)


def test_built_ins_are_a_plugin_like_any_other(registry):
    discovery.load(registry, [])
    (builtins,) = registry.plugins
    assert str(builtins.owner) == f"ckptkit {ckptkit.__version__} (built in)"
    assert registry.provider_of("np.ndarray") == f"ckptkit {ckptkit.__version__}"
    assert registry.handler_for_args(args.StandardSave, use="save").__name__ == "StandardCheckpointHandler"


def test_an_installed_module_registers_by_its_hook(registry, install):
    discovery.load(registry, install("good_one", "1.2", "good_one", good_one=GOOD + REGISTERS))
    assert registry.provider_of("good_one.Handler") == "good_one 1.2"
    assert registry.failures == []


def test_an_installed_object_registers_by_its_hook(registry, install):
    source = """
    class Plugin:
        @hookimpl
        def ckptkit_register(self, registry):
            registry.add_args(Save, Handler, for_save=True)

    PLUGIN = Plugin()
    """
    source = GOOD + "from ckptkit import hookimpl\n" + textwrap.dedent(source)
    discovery.load(registry, install("good_object", "1.0", "good_object:PLUGIN", good_object=source))
    assert registry.provider_of("good_object.Handler") == "good_object 1.0"


def test_a_module_without_hooks_registers_by_being_imported(install):
    points = install(
        "good_import", "2.0", "good_import", good_import=GOOD + "register_with_handler(Handler, for_save=True)(Save)\n"
    )
    registry = ckptkit.default_registry()
    discovery.ready(registry)
    discovery.load(registry, points)
    assert registry.provider_of("good_import.Handler") == "good_import 2.0"


def test_two_entry_points_for_one_module_are_one_plugin(registry, install):
    (point,) = install("good_twice", "1.0", "good_twice", good_twice=GOOD + REGISTERS)
    discovery.load(registry, [point, importlib.metadata.EntryPoint("again", "good_twice", "ckptkit")])
    assert len(registry.plugins) == 2
    assert registry.failures == []


def test_loading_twice_loads_once(registry, install):
    points = install("good_again", "1.0", "good_again", good_again=GOOD + REGISTERS)
    discovery.load(registry, points)
    discovery.load(registry, points)
    assert [plugin.owner.distribution for plugin in registry.plugins] == ["ckptkit", "good_again"]


BROKEN = {
    "raises while imported": ("raise ValueError('no such device')", "ValueError: no such device"),
    "exits while imported": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "does not parse": ("def", "SyntaxError"),
    "needs what is not there": (
        "import no_such_library_anywhere",
        "ModuleNotFoundError: No module named 'no_such_library_anywhere'",
    ),
    "raises in its hook": (
        "from ckptkit import hookimpl\n@hookimpl\ndef ckptkit_register(registry): raise KeyError('x')",
        "KeyError: 'x'",
    ),
    "has an unknown hook": (
        "from ckptkit import hookimpl\n@hookimpl\ndef ckptkit_registers(registry): ...",
        r"(?s)unknown hook 'ckptkit_registers'.*they are .*ckptkit_register\b",
    ),
    "forgot the mark": (
        "def ckptkit_register(registry): ...",
        r"ckptkit_register of .* is not marked as a hook.*@ckptkit\.hookimpl",
    ),
    "misnames an argument": (
        "from ckptkit import hookimpl\n@hookimpl\ndef ckptkit_register(register): ...",
        r"(?s)'register'.*The hooks are:.*ckptkit_register\(registry",
    ),
    "takes what is built in": (
        """
        from ckptkit import JsonCheckpointHandler, args, hookimpl
        @hookimpl
        def ckptkit_register(registry):
            registry.add_args(args.StandardSave, JsonCheckpointHandler, for_save=True)
        """,
        r"ConflictError.*ckptkit .* \(built in\) holds it.*broken 0\.9 \(entry point 'plug'\) wants it",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_and_breaks_nothing_else(registry, install, caplog, case):
    source, message = BROKEN[case]
    points = install("broken", "0.9", "broken", broken=source) + install(
        "good_other", "1.0", "good_other", good_other=GOOD + REGISTERS
    )
    with caplog.at_level(logging.WARNING, logger="ckptkit.discovery"):
        discovery.load(registry, points)
    assert failure(registry).startswith("plugin broken 0.9 (entry point 'plug') failed to load: ")
    assert caplog.messages == [failure(registry)]
    with pytest.raises(errors.RegistryError, match=message):
        registry.handler_for_typestr("broken.Handler")
    assert registry.provider_of("good_other.Handler") == "good_other 1.0"
    assert registry.handler_for_args(args.JsonSave, use="save").__name__ == "JsonCheckpointHandler"


def test_every_missing_thing_tells_of_the_broken_plugin(registry, install):
    discovery.load(registry, install("broken_all", "0.9", "broken_all", broken_all="raise ValueError('no such device')"))
    for lookup in (
        lambda: registry.storage("acme"),
        lambda: registry.location("acme://x"),
        lambda: registry.provider_of("acme"),
        lambda: registry.handler_for_args(type("Save", (args.CheckpointArgs,), {}), use="save"),
    ):
        with pytest.raises(errors.RegistryError, match=r"plugin broken_all 0\.9 .* no such device"):
            lookup()


def test_what_a_broken_plugin_registered_is_undone(registry, install):
    hook = """
    from ckptkit import hookimpl
    from ckptkit.leaves import TypeHandler
    import numpy as np
    from ckptkit.leaves.numpy import NumpyHandler

    class Arrays(NumpyHandler):
        typestr = "half.arrays"

    @hookimpl
    def ckptkit_register(registry):
        registry.add_args(Save, Handler, for_save=True)
        registry.add_type_handler(Arrays(), np.ndarray, override=True)
        raise RuntimeError("half way")
    """
    discovery.load(registry, install("half", "1.0", "half", half=GOOD + textwrap.dedent(hook)))
    assert "half way" in failure(registry)
    assert type(registry.type_handler_for(np.ndarray)) is NumpyHandler
    with pytest.raises(errors.RegistryError):
        registry.handler_for_typestr("half.Handler")


def test_decorators_of_an_import_that_fails_half_way_are_undone(install):
    source = GOOD + "register_with_handler(Handler, for_save=True)(Save)\nraise OSError('half way')\n"
    registry = ckptkit.default_registry()
    discovery.ready(registry)
    discovery.load(registry, install("half_import", "1.0", "half_import", half_import=source))
    assert "half way" in str(registry.failures.pop())
    with pytest.raises(errors.RegistryError):
        registry.handler_for_typestr("half_import.Handler")


def test_a_broken_package_does_not_take_the_package_that_it_imports(install):
    common = GOOD + "register_with_handler(Handler, for_save=True)(Save)\n"
    points = install("a_broken", "1.0", "a_broken", a_broken="import common\nraise OSError('x')")
    points += install("common", "1.0", "common", common=common)
    registry = ckptkit.default_registry()
    discovery.ready(registry)
    discovery.load(registry, points)
    registry.failures.pop()
    assert registry.provider_of("common.Handler") == "common 1.0"


def test_parts_of_a_namespace_package_are_told_apart(registry, install):
    points = install("ns_one", "1.0", "ns.one", ns__one=GOOD + REGISTERS)
    points += install("ns_two", "2.0", "ns.two", ns__two=GOOD + REGISTERS)
    discovery.load(registry, points)
    assert registry.provider_of("ns.one.Handler") == "ns_one 1.0"
    assert registry.provider_of("ns.two.Handler") == "ns_two 2.0"


def test_an_interrupt_is_not_swallowed_and_loading_can_go_on(registry, install):
    points = install("interrupted", "1.0", "interrupted", interrupted="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discovery.load(registry, points)
    assert registry.failures == []
    assert len(registry.plugins) == 1


def test_ready_leaves_ones_own_registry_alone(registry):
    assert discovery.ready(registry) is registry
    assert registry.plugins == []
    assert discovery.failures(registry) == ()


def fresh(code):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_default_registry_loads_at_the_first_lookup_and_not_before():
    code = """
    import sys, ckptkit
    registry = ckptkit.default_registry()
    ckptkit.Registry()
    print("ckptkit.builtins" in sys.modules)
    registry.storages()
    print("ckptkit.builtins" in sys.modules)
    """
    assert fresh(code) == ["False", "True"]


def test_a_decorated_class_that_takes_what_is_built_in_fails_loudly_at_the_first_lookup():
    code = """
    import ckptkit
    from ckptkit import args
    class Mine(ckptkit.CheckpointHandler):
        def save(self, directory, args): ...
        def restore(self, directory, args): ...
    args.register_with_handler(Mine, for_save=True)(args.StandardSave)
    for _ in range(2):
        try:
            ckptkit.default_registry().storages()
        except ckptkit.errors.ConflictError as error:
            print("Mine" in str(error), "(built in)" in str(error))
    """
    assert fresh(code) == ["True", "True"] * 2


def test_many_threads_load_once(install):
    counting = GOOD + REGISTERS.replace("    registry.add", "    calls.append(1)\n    registry.add") + "\ncalls = []\n"
    points = install("counted", "1.0", "counted", counted=counting)
    registry = Registry(load=lambda registry: discovery.load(registry, points))
    threads = [threading.Thread(target=discovery.ready, args=(registry,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.modules["counted"].calls == [1]
