"""Plugins that answer wrongly: one error that says whose plugin it is and what was wrong, and nothing half-written stays."""

import re
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest

import ckptkit
from ckptkit import StandardCheckpointer, errors
from ckptkit.args import CheckpointArgs, Composite
from ckptkit.handlers import AsyncCheckpointHandler, CheckpointHandler
from ckptkit.leaves import Kinds, LeafSpec, RestoreArgs, TypeHandler
from ckptkit.leaves.numpy import NumpyHandler
from ckptkit.pipeline import answers
from ckptkit.processes import Job
from ckptkit.registry import Owner, owned_by
from ckptkit.storage import ArraySpec, Reader, whole
from ckptkit.storage.base import ChecksumReader
from ckptkit.storage.ocdbt import OcdbtBackend
from ckptkit.storage.zarr import ZarrBackend

PAIR = whole((2,))
ACME = Owner("acme_plugin", "acme", "1.2", "plug")
BLAME = r"^Plugin acme 1\.2 \(entry point 'plug'\): test_faulty_plugins\.\w+\."
INT = np.dtype(np.int64)


class Fractions(TypeHandler):
    """A numerator and a denominator; what `wrong` names is answered by its function."""

    typestr = "acme.fraction"

    def __init__(self, **wrong):
        self.wrong = wrong

    def __getattribute__(self, name):
        wrong = object.__getattribute__(self, "__dict__").get("wrong", {})
        return wrong[name] if name in wrong else object.__getattribute__(self, name)

    def describe(self, leaves):
        return [LeafSpec(self.typestr, ArraySpec(leaf.name, (2,), INT, (2,))) for leaf in leaves]

    def owned(self, leaves, specs, job):
        return [[PAIR] for _ in leaves]

    def stage(self, pieces):
        return [np.array(leaf.as_integer_ratio(), INT) for leaf, _, _ in pieces]

    def needs(self, specs, requests, job):
        return [[PAIR] for _ in specs]

    def assemble(self, specs, requests, parts):
        return [Fraction(*part[PAIR].tolist()) for part in parts]


class Store(OcdbtBackend):
    """A backend under another name; what `wrong` names is answered by its function."""

    name = "acme_store"

    def __init__(self, **wrong):
        self.wrong = wrong

    __getattribute__ = Fractions.__getattribute__


TREE = {"half": Fraction(1, 2), "third": Fraction(1, 3), "plain": np.arange(3)}


@pytest.fixture(autouse=True)
def _named(monkeypatch):
    monkeypatch.setattr(Fractions, "__module__", "test_faulty_plugins")
    monkeypatch.setattr(Store, "__module__", "test_faulty_plugins")


def install(registry, handler=None, backend=None):
    with owned_by(ACME):
        registry.add_type_handler(handler or Fractions(), Fraction)
        if backend is not None:
            registry.add_storage(backend)


def spec(array=None, **fields):
    return LeafSpec("acme.fraction", array or ArraySpec("half", (2,), INT, (2,)), **fields)


def array(**changes):
    return lambda leaves: [
        spec(ArraySpec(**{"name": leaf.name, "shape": (2,), "dtype": INT, "chunk_shape": (2,), **changes})) for leaf in leaves
    ]


def staged(make):
    return lambda pieces: [make() for _ in pieces]


def answer(value):
    return lambda *args: value


def fails(*args):
    raise KeyError("no such thing")


def save_whole(checkpointer, path, tree):
    checkpointer.save(path, tree)
    checkpointer.wait_until_finished()


SAVE_FAULTS = {
    "describes nothing": ({"describe": answer(None)}, r"describe returned NoneType; expected 2 of LeafSpec or Problem"),
    "describes one of two": ({"describe": lambda leaves: array()(leaves)[:1]}, r"describe returned 1 results for 2"),
    "describes as text": ({"describe": lambda leaves: ["x" for _ in leaves]}, r"describe returned str among its results"),
    "raises when describing": ({"describe": fails}, r"describe raised KeyError: 'no such thing'"),
    "another's type string": (
        {"describe": lambda leaves: [s._replace(typestr="np.ndarray") for s in array()(leaves)]},
        r"describe returned a LeafSpec of typestr 'np.ndarray'; expected its own, 'acme.fraction'",
    ),
    "another's name": ({"describe": array(name="other")}, r"expected a LeafSpec with an ArraySpec named 'half'"),
    "no array": (
        {"describe": lambda leaves: [LeafSpec("acme.fraction", None, inline="x") for _ in leaves]},
        r"an ArraySpec named",
    ),
    "a dtype that is none": ({"describe": array(dtype="int64")}, r"'int64' is no numpy dtype"),
    "a shape that is none": ({"describe": array(shape=[2])}, r"describe returned what is no shape.* expected tuples of ints"),
    "chunks of another rank": ({"describe": array(chunk_shape=(2, 2))}, r"two tuples of ints of one length"),
    "empty chunks": ({"describe": array(chunk_shape=(0,))}, r"chunks at least 1 long"),
    "extra that JSON cannot hold": (
        {"describe": lambda leaves: [s._replace(extra={"at": {1}}) for s in array()(leaves)]},
        r"extra or sharding .* expected a dict that JSON holds",
    ),
    "kinds that cannot be hashed": ({"kinds": answer(Kinds((0, 0), ([1],)))}, r"kinds returned what cannot be hashed"),
    "kinds of another class": ({"kinds": answer((0, 0))}, r"kinds returned \(0, 0\); expected a ckptkit.leaves.*Kinds"),
    "too few numbers of kinds": ({"kinds": answer(Kinds((0,), ("a",)))}, r"kinds returned 1 results for 2"),
    "kinds without keys": ({"kinds": answer(Kinds((0, 1), ("a",)))}, r"kinds returned the numbers \[0, 1\] for 1 kinds"),
    "kinds that begin at 1": ({"kinds": answer(Kinds((1, 0), ("a", "b")))}, r"kinds returned the numbers \[1, 0\]"),
    "owns nothing": (
        {"owned": lambda leaves, specs, job: [() for _ in leaves]},
        r"owned returned 0 cells .* expected each of the 1",
    ),
    "owns too few": ({"owned": answer([])}, r"owned returned 0 results for 2"),
    "owns no cell of the grid": (
        {"owned": lambda leaves, specs, job: [[((0, 1),)] for _ in leaves]},
        r"owned returned \(\(0, 1\),\) .* expected cells of the array's grid",
    ),
    "owns one cell twice": ({"owned": lambda leaves, specs, job: [[PAIR, PAIR] for _ in leaves]}, r"owned returned 2 cells"),
    "sizes too few": ({"staged_nbytes": answer([1])}, r"staged_nbytes returned 1 results for 2"),
    "sizes below zero": ({"staged_nbytes": lambda pieces: [-1 for _ in pieces]}, r"staged_nbytes returned -1"),
    "stages nothing": ({"stage": answer(None)}, r"stage returned NoneType; expected 2 of ndarray"),
    "stages one of two": ({"stage": lambda pieces: [np.zeros(2, INT)]}, r"stage returned 1 results for 2"),
    "stages lists": ({"stage": staged(lambda: [1, 2])}, r"stage returned list among its results"),
    "stages another shape": (
        {"stage": staged(lambda: np.zeros(3, INT))},
        r"stage returned a int64 array of shape \(3,\) for 'half'",
    ),
    "stages another dtype": ({"stage": staged(lambda: np.zeros(2, np.int32))}, r"expected a C-contiguous int64 array"),
    "stages every other value": ({"stage": staged(lambda: np.zeros(4, INT)[::2])}, r"stage returned a not C-contiguous int64"),
    "raises when staging": ({"stage": fails}, r"stage raised KeyError"),
}


@pytest.mark.parametrize("case", SAVE_FAULTS)
def test_a_type_handler_that_answers_wrongly_stops_the_save_and_leaves_nothing(tmp_path, registry, case):
    wrong, message = SAVE_FAULTS[case]
    install(registry, Fractions(**wrong))
    with StandardCheckpointer(registry=registry) as checkpointer:
        with pytest.raises(errors.PluginError, match=BLAME) as caught:
            save_whole(checkpointer, tmp_path / "checkpoint", TREE)
        assert re.search(message, str(caught.value))
        assert list(tmp_path.iterdir()) == []
        checkpointer.save(tmp_path / "checkpoint", {"plain": np.arange(3)})  # everything else works
        checkpointer.wait_until_finished()
        assert checkpointer.restore(tmp_path / "checkpoint")["plain"].tolist() == [0, 1, 2]


RESTORE_FAULTS = {
    "requests nothing": ({"requests": answer(None)}, r"requests returned NoneType; expected 2 of RestoreArgs"),
    "requests as text": ({"request": answer("x")}, r"requests returned str among its results"),
    "needs too little": ({"needs": answer([])}, r"needs returned 0 results for 2"),
    "needs None": ({"needs": lambda specs, requests, job: [None for _ in specs]}, r"needs returned NoneType among its results"),
    "needs what is not stored": (
        {"needs": lambda specs, requests, job: [[((0, 9),)] for _ in specs]},
        r"needs returned \(\(0, 9\),\) for an array of shape \(2,\)",
    ),
    "needs lists": ({"needs": lambda specs, requests, job: [[[[0, 2]]] for _ in specs]}, r"needs returned what is no .* index"),
    "assembles nothing": ({"assemble": answer(None)}, r"assemble returned NoneType; expected 2"),
    "assembles one of two": ({"assemble": answer([Fraction(1)])}, r"assemble returned 1 results for 2"),
    "raises when assembling": ({"assemble": fails}, r"assemble raised KeyError"),
}


@pytest.mark.parametrize("target", [None, {"half": Fraction(), "third": Fraction(), "plain": np.zeros(3, int)}])
@pytest.mark.parametrize("case", RESTORE_FAULTS)
def test_a_type_handler_that_answers_wrongly_stops_the_restore(tmp_path, registry, case, target):
    wrong, message = RESTORE_FAULTS[case]
    handler = Fractions()
    install(registry, handler)
    with StandardCheckpointer(registry=registry) as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", TREE)
        checkpointer.wait_until_finished()
        handler.wrong |= wrong
        with pytest.raises(errors.PluginError, match=BLAME) as caught:
            checkpointer.restore(tmp_path / "checkpoint", target)
        assert re.search(message, str(caught.value))
        handler.wrong.clear()
        assert checkpointer.restore(tmp_path / "checkpoint", target)["third"] == Fraction(1, 3)


STORE_SAVE_FAULTS = {
    "refuses nothing": ({"refuse": answer(None)}, r"Store\.refuse returned NoneType; expected 2 of str or NoneType"),
    "refuses too few": ({"refuse": answer([])}, r"Store\.refuse returned 0 results for 2"),
    "refuses with numbers": ({"refuse": lambda arrays: [0 for _ in arrays]}, r"Store\.refuse returned int among its results"),
    "raises when refusing": ({"refuse": fails}, r"Store\.refuse raised KeyError"),
    "refuses no names": ({"refuse_names": answer(None)}, r"refuse_names returned NoneType; expected 3 .* one for each name"),
    "refuses too few names": ({"refuse_names": answer([])}, r"Store\.refuse_names returned 0 results for 3"),
    "raises at names": ({"refuse_names": fails}, r"Store\.refuse_names raised KeyError"),
    "no writer": ({"writer": answer(None)}, r"Store\.writer returned None; expected a ckptkit\.storage\.base\.Writer"),
    "raises when opening": ({"writer": fails}, r"Store\.writer raised KeyError"),
    "no directories": ({"data_directories": answer(None)}, r"Store\.data_directories raised TypeError"),
    "directories that are none": ({"data_directories": answer([7])}, r"Store\.data_directories returned int among its results"),
}


@pytest.mark.parametrize("case", STORE_SAVE_FAULTS)
def test_a_backend_that_answers_wrongly_stops_the_save_and_leaves_nothing(tmp_path, registry, case):
    wrong, message = STORE_SAVE_FAULTS[case]
    install(registry, backend=Store(**wrong))
    with StandardCheckpointer(registry=registry, storage="acme_store") as checkpointer:
        with pytest.raises(errors.PluginError, match=BLAME) as caught:
            save_whole(checkpointer, tmp_path / "checkpoint", TREE)
        assert re.search(message, str(caught.value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [None, {7: 0}, {"a": -1}, {"a": True}])
def test_a_writer_that_names_no_files_with_heads_stops_the_save_and_leaves_nothing(tmp_path, registry, wrong):
    class Naming(OcdbtBackend):
        name = "acme_store"

        def writer(self, *place):
            writer = super().writer(*place)
            writer.data_files = lambda: wrong
            return writer

    install(registry, backend=Naming())
    checkpointer = StandardCheckpointer(registry=registry, storage="acme_store")
    with checkpointer, pytest.raises(errors.PluginError, match=r"data_files returned"):
        save_whole(checkpointer, tmp_path / "checkpoint", TREE)
    assert list(tmp_path.iterdir()) == []


STORE_RESTORE_FAULTS = {
    "no reader": ({"reader": answer(None)}, r"Store\.reader returned None; expected a ckptkit\.storage\.base\.Reader"),
    "raises when opening": ({"reader": fails}, r"Store\.reader raised KeyError"),
    "raises when recognising": ({"recognises": fails}, r"Store\.recognises raised KeyError"),
}


@pytest.mark.parametrize("case", STORE_RESTORE_FAULTS)
def test_a_backend_that_answers_wrongly_stops_the_restore_of_its_own_checkpoints_alone(tmp_path, case):
    wrong, message = STORE_RESTORE_FAULTS[case]
    ckptkit.save(tmp_path / "zarr", {"a": np.arange(3)}, storage="zarr")
    ckptkit.save(tmp_path / "ocdbt", {"a": np.arange(3)})
    registry = ckptkit.Registry.with_builtins()
    with owned_by(ACME):
        backend = Store(**{"recognises": lambda location: location.exists("manifest.ocdbt"), **wrong})
        registry._backends.withdraw(lambda claim: claim.value.name == "ocdbt")  # so that it is the one that reads them
        registry.add_storage(backend)
    with StandardCheckpointer(registry=registry) as checkpointer:
        with pytest.raises(errors.PluginError, match=BLAME) as caught:
            checkpointer.restore(tmp_path / "ocdbt")
        assert re.search(message, str(caught.value))
        assert checkpointer.restore(tmp_path / "zarr")["a"].tolist() == [0, 1, 2]


class Broken(Reader):
    """Lists what another reader does; the future of what it reads raises `error`."""

    __module__ = "acme_plugin.storage"

    def __init__(self, reader, error):
        self._reader = reader
        self._error = error

    def arrays(self):
        return self._reader.arrays()

    def read(self, requests):
        future = Future()
        future.set_exception(self._error)
        return future

    def close(self):
        self._reader.close()


class Miscounting(Broken, ChecksumReader):
    """Gives no checksum of what it reads."""

    def read_checksums(self, requests, checksum, block_nbytes):
        future = Future()
        future.set_result([])
        return future


def broken(path, registry, error, kind=Broken):
    """Saves to a path, and makes a registry's reader of it raise an error."""
    ckptkit.save(path, {"a": np.arange(3)})
    registry._backends.withdraw(lambda claim: claim.value.name == "ocdbt")
    with owned_by(ACME):
        registry.add_storage(Store(reader=lambda location: kind(OcdbtBackend().reader(location), error)))


def restored(path, registry):
    with StandardCheckpointer(registry=registry) as checkpointer:
        return checkpointer.restore(path)


@pytest.mark.parametrize("use", [restored, ckptkit.verify])
def test_a_reader_that_gives_too_few_checksums_is_told_of(tmp_path, registry, use):
    broken(tmp_path / "checkpoint", registry, None, Miscounting)
    with pytest.raises(errors.PluginError, match=r"Miscounting\.read_checksums returned 0 results for 1; expected 1 of str"):
        use(tmp_path / "checkpoint", registry=registry)


@pytest.mark.parametrize("use", [restored, ckptkit.verify])
def test_what_the_future_of_a_reader_raises_is_told_of_its_plugin(tmp_path, registry, use):
    broken(tmp_path / "checkpoint", registry, KeyError("gone"))
    message = r"^Plugin module acme_plugin\.storage: acme_plugin\.storage\.Broken\.read raised KeyError: 'gone'\.$"
    with pytest.raises(errors.PluginError, match=message) as caught:
        use(tmp_path / "checkpoint", registry=registry)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), errors.StorageError(13, "denied")])
def test_what_the_system_says_to_a_reader_is_told_as_it_is(tmp_path, registry, error):
    broken(tmp_path / "checkpoint", registry, error)
    with pytest.raises(type(error)) as caught:
        restored(tmp_path / "checkpoint", registry)
    assert caught.value is error


def test_a_backend_whose_keys_are_none_is_named(tmp_path, registry):
    ckptkit.save(tmp_path / "named", {"a": np.arange(3)}, storage="zarr")
    for file in (tmp_path / "named").iterdir():
        if file.is_file():
            file.unlink()

    class Names(ZarrBackend):
        name = "acme_store"

        def keys_of(self, name):
            return [name]

    with owned_by(ACME):
        registry._backends.withdraw(lambda claim: claim.value.name == "zarr")
        registry.add_storage(Names())
    with pytest.raises(errors.PluginError, match=r"acme 1\.2 .*keys_of returned \['a'\] for 'a'; expected a tuple of strings"):
        ckptkit.Checkpointer(registry=registry).restore(tmp_path / "named")


class Args(CheckpointArgs):
    pass


class Plain(CheckpointHandler):
    def save(self, directory, args): ...

    def restore(self, directory, args): ...


class Coroutine(Plain):
    async def save(self, directory, args): ...


class NoText(Plain):
    @classmethod
    def typestr(cls):
        return 7


class Async(AsyncCheckpointHandler):
    returned = None

    async def async_save(self, directory, args):
        (directory / "half").write_text("half")
        return type(self).returned

    def restore(self, directory, args): ...


class NoCoroutine(Async):
    def async_save(self, directory, args):
        return []


class Number(Async):
    returned = 7


class Numbers(Async):
    returned = (Future(), 7)


class Bare(Async):
    returned = Future()


class Text(Async):
    returned = "ab"


HANDLER_FAULTS = {
    NoCoroutine: r"NoCoroutine\.async_save returned \[\]; expected a coroutine: define it with async def",
    Number: r"Number\.async_save returned 7; expected a list of concurrent\.futures\.Future, or None",
    Numbers: r"Numbers\.async_save returned .* expected a list of concurrent\.futures\.Future",
    Bare: r"Bare\.async_save returned <Future.* expected a list of concurrent\.futures\.Future",
    Text: r"Text\.async_save returned 'ab'; expected a list of concurrent\.futures\.Future",
    Coroutine: r"Coroutine\.save is a coroutine; expected a plain method",
    NoText: r"NoText\.typestr returned 7; expected a builtins\.str",
}


@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("handler_class", HANDLER_FAULTS)
def test_a_handler_that_answers_wrongly_stops_the_save_and_leaves_nothing(tmp_path, registry, handler_class, composite):
    typestr = handler_class.typestr
    handler_class.typestr = classmethod(lambda cls: f"acme.{cls.__name__}")  # registered while it was still right
    with owned_by(ACME):
        registry.add_args(Args, handler_class, for_save=True)
    handler_class.typestr = typestr
    args = Composite(item=Args()) if composite else Args()
    with ckptkit.Checkpointer(registry=registry) as checkpointer, pytest.raises(errors.PluginError) as caught:
        checkpointer.save(tmp_path / "checkpoint", args)
    assert re.search(rf"Plugin acme 1\.2 \(entry point 'plug'\): .*{HANDLER_FAULTS[handler_class]}", str(caught.value), re.DOTALL)
    assert list(tmp_path.iterdir()) == []


def test_a_pending_future_in_a_wrong_answer_does_not_hold_up_its_error(tmp_path, registry, monkeypatch):
    pending = Future()
    monkeypatch.setattr(Bare, "returned", pending)
    with owned_by(ACME):
        registry.add_args(Args, Bare, for_save=True)
    start = time.monotonic()
    with ckptkit.Checkpointer(registry=registry) as checkpointer, pytest.raises(errors.PluginError):
        checkpointer.save(tmp_path / "checkpoint", Args())
    assert time.monotonic() - start < 20
    assert pending.cancelled()


def test_what_still_writes_after_a_wrong_answer_is_waited_for(tmp_path, registry):
    ended = []

    class Working(Async):
        async def async_save(self, directory, args):
            working = Future()
            working.set_running_or_notify_cancel()

            def write():
                time.sleep(0.2)
                (directory / "rest").write_text("rest")
                ended.append(True)
                working.set_result(None)

            threading.Thread(target=write).start()
            return (working, 7)

    with owned_by(ACME):
        registry.add_args(Args, Working, for_save=True)
    with ckptkit.Checkpointer(registry=registry) as checkpointer, pytest.raises(errors.PluginError):
        checkpointer.save(tmp_path / "checkpoint", Args())
    assert ended
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_stop_after_a_wrong_answer_is_waited_for_within_bounds(tmp_path, registry, monkeypatch):
    stuck = Future()
    stuck.set_running_or_notify_cancel()
    monkeypatch.setattr(Numbers, "returned", (stuck, 7))
    monkeypatch.setattr(answers, "_STOP_SECS", 0.05)
    with owned_by(ACME):
        registry.add_args(Args, Numbers, for_save=True)
    with ckptkit.Checkpointer(registry=registry) as checkpointer, pytest.raises(errors.PluginError):
        checkpointer.save(tmp_path / "checkpoint", Args())


@pytest.mark.parametrize("gathered", [set, tuple, iter, dict.fromkeys], ids=["set", "tuple", "iterator", "keys"])
def test_futures_may_come_in_anything_that_can_be_gone_through(tmp_path, registry, gathered):
    class Working(Async):
        async def async_save(self, directory, args):
            def write(name):
                time.sleep(0.05)
                (directory / name).write_text(name)

            threads = ThreadPoolExecutor(2)
            started = [threads.submit(write, name) for name in "ab"]
            threads.shutdown(wait=False)
            return gathered(started)

    registry.add_args(Args, Working, for_save=True)
    with ckptkit.Checkpointer(registry=registry) as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", Args())
    assert {"a", "b"} <= {path.name for path in (tmp_path / "checkpoint").iterdir()}


def test_a_handler_class_that_lacks_methods_is_refused_when_it_is_registered(registry):
    class Half(CheckpointHandler):
        def save(self, directory, args): ...

    with pytest.raises(errors.ArgsTypeError, match=r"Half cannot be a handler: it lacks restore\."):
        registry.add_args(Args, Half, for_save=True)


def test_what_the_operating_system_says_stays_what_it_is(tmp_path, registry):
    def full(pieces):
        raise OSError(28, "No space left on device")

    install(registry, Fractions(stage=full))
    with StandardCheckpointer(registry=registry) as checkpointer, pytest.raises(OSError, match="No space left") as caught:
        checkpointer.save(tmp_path / "checkpoint", TREE)
    assert not isinstance(caught.value, errors.PluginError)


class Calls:
    """Counts the calls, in any thread, of functions that a class and its bases outside of ckptkit's pipeline define."""

    def __init__(self, *classes):
        functions = [function for cls in classes for each in cls.__mro__ for function in vars(each).values()]
        self.codes = {function.__code__ for function in functions if hasattr(function, "__code__")}
        self.names = []

    def __enter__(self):
        threading.setprofile(self.seen)
        sys.setprofile(self.seen)
        return self.names

    def __exit__(self, *error):
        sys.setprofile(None)
        threading.setprofile(None)

    def seen(self, frame, event, _):
        if event == "call" and frame.f_code in self.codes:
            self.names.append(frame.f_code.co_name)


class Batched(NumpyHandler):
    """Arrays of a plugin's own; every method answers for a batch in one expression."""

    typestr = "acme.array"

    def describe(self, leaves):
        specs = [ArraySpec(leaf.name, leaf.value.shape, leaf.value.dtype, leaf.value.shape) for leaf in leaves]
        return [LeafSpec(self.typestr, spec) for spec in specs]

    def requests(self, targets, specs, defaults):
        return [RestoreArgs(restore_type=np.ndarray, defaults=defaults) for _ in specs]

    def needs(self, specs, requests, job):
        return [(((0, 4),),) for _ in specs]

    def stage(self, pieces):
        return [leaf.copy() for leaf, _, _ in pieces]

    def assemble(self, specs, requests, parts):
        return [part[((0, 4),)] for part in parts]


@pytest.mark.parametrize("with_target", [False, True])
def test_a_tree_of_10000_leaves_costs_a_few_calls_per_batch_and_none_per_leaf(tmp_path, registry, with_target):
    tree = {f"leaf {i}": np.full(4, i) for i in range(10_000)}
    with owned_by(ACME):
        registry.add_type_handler(Batched(), np.ndarray, override=True)
    with StandardCheckpointer(registry=registry) as checkpointer:
        with Calls(Batched, OcdbtBackend) as saving:
            save_whole(checkpointer, tmp_path / "checkpoint", tree)
        with Calls(Batched, OcdbtBackend) as restoring:
            restored = checkpointer.restore(tmp_path / "checkpoint", tree if with_target else None)
    assert restored["leaf 9999"].tolist() == [9999] * 4
    batches = 3  # of at most 4096 leaves
    assert Counter(saving)["stage"] == Counter(restoring)["assemble"] == batches
    assert max((Counter(saving) + Counter(restoring)).values()) <= batches
    assert len(saving) <= 8 + batches, saving
    assert len(restoring) <= 8 + batches, restoring


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (None, "returned NoneType; expected 1 of Mapping"),
        ([{PAIR: (1, 0)}], r"returned \(1, 0\) for \(\(0, 2\),\); expected the processes that need it, in order"),
        ([{PAIR: (0, 7)}], r"returned \(0, 7\)"),
        ([{PAIR: (1, 2)}], r"returned \(1, 2\)"),
        ([{whole((1,)): (0, 1)}], r"returned \(0, 1\) for \(\(0, 1\),\)"),
    ],
)
def test_a_type_handler_that_names_other_processes_than_those_that_need_a_part_is_named(registry, answer, shown):
    handler = Fractions(sharers=lambda specs, requests, job: answer)
    install(registry, handler=handler)
    stored = [LeafSpec(handler.typestr, ArraySpec("a", (2,), INT, (2,)))]
    with pytest.raises(errors.PluginError, match=BLAME + f"sharers {shown}"):
        answers.shared(registry, handler, stored, [RestoreArgs()], [[PAIR]], Job(0, (0, 1, 2)))
