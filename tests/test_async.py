"""Saves in the background: what the caller may do meanwhile, how errors surface, and how the program may end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

import ckptkit
from ckptkit import args, commit, errors, saving
from ckptkit.handlers import PathAwaitingCreation
from ckptkit.options import AsyncOptions
from ckptkit.testing import assert_same

SIZE = 1 << 22


def test_arrays_may_be_overwritten_donated_and_deleted_right_after_save(tmp_path: Path) -> None:
    host = np.arange(SIZE, dtype=np.float32)
    donated, deleted = jnp.arange(SIZE, dtype=jnp.float32), jnp.arange(SIZE, dtype=jnp.float32)
    tree = {"host": host, "small": np.ones(3), "donated": donated, "deleted": deleted}
    with ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
        host[:] = -1
        tree["small"][:] = -1
        jax.block_until_ready(jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(donated))
        deleted.delete()
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "c")
    for name in ("host", "donated", "deleted"):
        np.testing.assert_array_equal(restored[name], np.arange(SIZE))
    np.testing.assert_array_equal(restored["small"], np.ones(3))


def test_a_budget_below_the_tree_still_saves_what_it_held(tmp_path: Path) -> None:
    tree = {f"a{i}": np.full(1 << 20, i, np.float32) for i in range(16)}
    with ckptkit.StandardCheckpointer(save_concurrent_gb=0.006, restore_concurrent_gb=0.006) as checkpointer:
        checkpointer.save(tmp_path / "c", tree)
        for array in tree.values():
            array[:] = -1
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "c")
    assert_same(restored, {f"a{i}": np.full(1 << 20, i, np.float32) for i in range(16)})


def test_the_next_save_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    with ckptkit.StandardCheckpointer() as checkpointer:
        for step in range(3):
            checkpointer.save(tmp_path / str(step), {"a": np.full(SIZE, step)})
            if step:
                assert (tmp_path / str(step - 1)).is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


class _Failing(ckptkit.AsyncCheckpointHandler):
    async def async_save(self, directory: Any, args: Any) -> Any:
        (directory / "half").write_text("half")
        future: Future[None] = Future()
        threading.Timer(0.05, future.set_exception, [OSError(28, "No space left on device")]).start()
        return [future]

    def restore(self, directory: Any, args: Any) -> Any:
        return None


class _FailingSave(args.CheckpointArgs):
    pass


@pytest.fixture
def failing(registry: ckptkit.Registry) -> ckptkit.AsyncCheckpointer:
    registry.add_args(_FailingSave, _Failing, for_save=True)
    return ckptkit.AsyncCheckpointer(registry=registry)


@pytest.mark.parametrize("see", ["wait_until_finished", "close", "save", "check_for_errors"])
def test_an_error_stays_until_it_is_seen(tmp_path: Path, failing: ckptkit.AsyncCheckpointer, see: str) -> None:
    failing.save(tmp_path / "c", _FailingSave())
    if see == "check_for_errors":
        while failing.is_saving_in_progress():
            pass
    with pytest.raises(errors.AsyncSaveError, match="No space left"):
        failing.save(tmp_path / "d", _FailingSave()) if see == "save" else getattr(failing, see)()
    failing.check_for_errors()
    assert not list(tmp_path.iterdir())


def test_a_handle_raises_its_error_at_every_call(tmp_path: Path) -> None:
    handle = ckptkit.save_async(tmp_path / "c", {"a": np.ones(3)})
    handle.result(60)
    assert handle.done()
    handle.result()


def test_waiting_ends_with_a_typed_error_where_time_is_over(tmp_path: Path, failing: ckptkit.AsyncCheckpointer) -> None:
    failing.save(tmp_path / "c", _FailingSave())
    with pytest.raises(TimeoutError, match="goes on"):
        failing.join(0.001)
    with pytest.raises(errors.AsyncSaveError):
        failing.wait_until_finished()


def test_a_blocking_save_takes_as_long_as_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync_tree = commit.sync_tree

    def sync_slowly(*arguments: Any) -> None:
        time.sleep(0.2)
        sync_tree(*arguments)

    monkeypatch.setitem(AsyncOptions.__init__.__kwdefaults__, "timeout_secs", 0.01)
    monkeypatch.setattr(commit, "sync_tree", sync_slowly)
    ckptkit.save(tmp_path / "c", {"a": 1})
    ckptkit.save(tmp_path / "d", args.StandardSave({"a": 1}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]


def test_saves_work_inside_a_running_event_loop(tmp_path: Path) -> None:
    async def notebook() -> Any:
        ckptkit.save(tmp_path / "c", {"a": np.ones(3)})
        with ckptkit.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "d", {"a": np.ones(4)})
        return ckptkit.restore(tmp_path / "d")

    assert_same(asyncio.run(notebook()), {"a": np.ones(4)})


def test_two_writers_on_one_path_one_wins_and_the_other_is_told(tmp_path: Path) -> None:
    told = []
    for checkpointer, value in ((ckptkit.StandardCheckpointer(), 1.0), (ckptkit.StandardCheckpointer(), 2.0)):
        with contextlib.suppress(errors.ExistsError):  # the first may have ended before the second begins
            checkpointer.save(tmp_path / "c", {"a": np.full(1 << 24, value)})
            told.append((checkpointer, value))
    winners = []
    for checkpointer, value in told:
        try:
            checkpointer.close()
        except (errors.BusyError, errors.ExistsError):
            continue
        winners.append(value)
    np.testing.assert_array_equal(ckptkit.restore(tmp_path / "c")["a"], np.full(1 << 24, *winners))


class _Awaited:
    """A directory that is made when the test says so."""

    def __init__(self, path: epath.Path, now: threading.Event) -> None:
        self.path = path
        self._now = now

    def __truediv__(self, name: str) -> _Awaited:
        return _Awaited(self.path / name, self._now)

    async def await_creation(self) -> epath.Path:
        assert self._now.wait(60)
        self.path.mkdir()
        return self.path


@pytest.mark.parametrize("kind", ["Standard", "PyTree"])
def test_a_handler_does_not_wait_for_a_directory_that_is_still_being_created(tmp_path: Path, kind: str) -> None:
    handler = getattr(ckptkit, f"{kind}CheckpointHandler")()
    directory, now, value = epath.Path(tmp_path / "c"), threading.Event(), np.ones(3)
    writing = asyncio.run(handler.async_save(_Awaited(directory, now), args=getattr(args, f"{kind}Save")({"a": value})))
    value[:] = 2  # the caller has been let go, though nothing is there yet
    assert not directory.exists()
    now.set()
    for future in writing:
        future.result(60)
    assert_same(handler.restore(directory, args=getattr(args, f"{kind}Restore")()), {"a": np.ones(3)})


def _is_there(directory: Any) -> bool:
    return os.path.exists(str(directory.path if isinstance(directory, PathAwaitingCreation) else directory))


class _Looking(ckptkit.StandardCheckpointHandler):
    """Notes what it is given to save into, and uses it as a path where it is told to."""

    def __init__(self, *, use: bool = False) -> None:
        super().__init__()
        self.use = use
        self.found: list[bool] = []

    async def async_save(self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None) -> Any:
        if self.use:
            (directory / "note").write_text("x")
        self.found.append(_is_there(directory))
        return await super().async_save(directory, args=args)


@pytest.mark.parametrize(("asynchronously", "use", "there"), [(True, False, False), (True, True, True), (False, False, True)])
def test_the_directory_is_made_in_the_background_unless_it_is_used_or_told_otherwise(
    tmp_path: Path, asynchronously: bool, use: bool, there: bool
) -> None:
    handler = _Looking(use=use)
    options = ckptkit.AsyncOptions(create_directories_asynchronously=asynchronously)
    with ckptkit.AsyncCheckpointer(handler, async_options=options) as checkpointer:
        checkpointer.save(tmp_path / "c", args=args.StandardSave({"a": 1}))
        assert checkpointer.restore(tmp_path / "c", args=args.StandardRestore()) == {"a": 1}
    assert handler.found == [there]
    assert (tmp_path / "c" / "note").exists() is use


def test_a_directory_that_cannot_be_made_is_told_by_the_background(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpointer = ckptkit.StandardCheckpointer()
    checkpointer.save(tmp_path / "file" / "c", {"a": 1})
    with pytest.raises(OSError, match="prepare the save"):
        checkpointer.close()


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "raise SystemExit(3)", "raise RuntimeError('boom')"])
def test_the_interpreter_finishes_a_save_in_flight_before_it_exits(tmp_path: Path, end: str) -> None:
    done = fresh.run(
        f"""
        import sys, numpy as np, jax.numpy as jnp, ckptkit
        ckptkit.StandardCheckpointer().save(sys.argv[1], {{"a": np.ones(1 << 23), "b": jnp.ones(1 << 20)}})
        {end}
        """,
        tmp_path / "c",
    )
    assert done.returncode == {"": 0, "sys.exit(0)": 0, "raise SystemExit(3)": 3}.get(end, 1), done.stderr
    np.testing.assert_array_equal(ckptkit.restore(tmp_path / "c")["a"], np.ones(1 << 23))


INTERRUPTED = """
    import os, signal, sys, time, numpy as np, ckptkit
    from ckptkit import commit
    sync_tree = commit.sync_tree
    commit.sync_tree = lambda *args: [time.sleep(1), sync_tree(*args)]
    checkpointer = ckptkit.StandardCheckpointer()
    checkpointer.save(sys.argv[1], {"a": np.ones(5)})
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        checkpointer.wait_until_finished()
    except KeyboardInterrupt:
        assert checkpointer.is_saving_in_progress() and not os.path.exists(sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no SIGALRM here")
@pytest.mark.parametrize(
    "then",
    [
        "sys.exit(0)",
        "checkpointer.wait_until_finished(); assert not checkpointer.is_saving_in_progress(); os._exit(0)",
        "checkpointer.close(); os._exit(0)",
        "assert ckptkit.save_async(sys.argv[1], {'a': np.ones(5)}, force=True).result() is None; os._exit(0)",
    ],
)
def test_an_interrupted_wait_loses_nothing(tmp_path: Path, then: str) -> None:
    """Before Python 3.13 a thread whose `join` was interrupted counts as ended, and nobody waits for it any more."""
    done = fresh.run(INTERRUPTED + f"        {then}\n", tmp_path / "c")
    if "save_async" in then:  # another checkpointer does not wait for the first
        assert "is under way" in done.stderr
    else:
        assert (done.returncode, done.stderr) == (0, "")
    assert ckptkit.restore(tmp_path / "c")["a"].tolist() == [1] * 5


FULL_DISK = """
    import resource, signal, sys, numpy as np, ckptkit
    from ckptkit import errors
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    checkpointer = ckptkit.StandardCheckpointer()
    checkpointer.save(sys.argv[1], {"a": np.zeros(10)})
    checkpointer.wait_until_finished()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpointer.save(sys.argv[1], {"a": np.random.default_rng(0).random(1 << 20)}, force=True)
"""


def test_a_write_that_fails_surfaces_at_the_next_call_and_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    done = fresh.run(
        FULL_DISK
        + """
    try:
        checkpointer.wait_until_finished()
    except errors.StorageError as error:
        print("seen", error.errno, error)
    """,
        tmp_path / "c",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("seen 27"), done.stdout
    np.testing.assert_array_equal(ckptkit.restore(tmp_path / "c")["a"], np.zeros(10))
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_a_failed_save_that_nobody_asked_about_makes_the_exit_status_1(tmp_path: Path) -> None:
    done = fresh.run(FULL_DISK, tmp_path / "c")
    assert done.returncode == 1
    assert "nobody" not in done.stdout
    assert "a save in the background failed" in done.stderr
    assert "File too large" in done.stderr
    np.testing.assert_array_equal(ckptkit.restore(tmp_path / "c")["a"], np.zeros(10))


@pytest.mark.parametrize("depth", ["save", "restore"])
def test_at_most_eight_frames_lie_above_tensorstore(tmp_path: Path, depth: str) -> None:
    """A stack trace from a failing disk is read by people. Local files are read without TensorStore."""
    done = fresh.run(
        """
        import os, sys, threading
        import numpy as np
        import ckptkit
        folder = os.path.dirname(ckptkit.__file__)
        import tensorstore as ts
        path, what = sys.argv[1:]
        checkpointer = ckptkit.StandardCheckpointer()
        if what == "restore":
            checkpointer.save(path, {"a": np.ones(3)})
            checkpointer.wait_until_finished()
        main = threading.get_ident()
        counts = []

        def ours(frame):
            count = 0
            while frame is not None:
                count += frame.f_code.co_filename.startswith(folder)
                frame = frame.f_back
            return count

        def profile(frame, event, callee):
            modules = (getattr(callee, "__module__", None), type(getattr(callee, "__self__", None)).__module__)
            if event == "c_call" and any((module or "").startswith("tensorstore") for module in modules):
                total = ours(frame)
                if threading.get_ident() != main:
                    total += ours(sys._current_frames()[main])
                counts.append(total)

        threading.setprofile(profile)
        sys.setprofile(profile)
        if what == "save":
            checkpointer.save(path, {"a": np.ones(3)})
        else:
            checkpointer.restore(path)
        sys.setprofile(None)
        checkpointer.close()
        print(*counts)
        """,
        tmp_path / "c",
        depth,
    )
    assert done.returncode == 0, done.stderr
    counts = [int(count) for count in done.stdout.split()]
    if depth == "restore":
        assert not counts
    else:
        assert 0 < counts[0] <= 8, counts


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path) -> None:
    """Ctrl-C at any moment, staging included: no lock, nobody who goes on writing, and the next save tidies the rest."""
    done = fresh.run(
        """
        import os, signal, sys, threading, time, numpy as np, ckptkit
        path = sys.argv[1]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests in the background may have it ignored
        tree = {f"a{i}": np.random.default_rng(i).random(1 << 20) for i in range(12)}
        ckptkit.save(os.path.join(path, "warm"), tree)
        interrupted = 0
        for n in range(12):
            try:
                threading.Timer(0.004 * (n + 1), os.kill, (os.getpid(), signal.SIGINT)).start()
                ckptkit.PyTreeCheckpointer().save(os.path.join(path, "c"), tree, force=True)
                time.sleep(0.2)
            except KeyboardInterrupt:
                interrupted += 1
            deadline = time.monotonic() + 5
            while any(thread.name.startswith("ckptkit") for thread in threading.enumerate()):
                assert time.monotonic() < deadline
        ckptkit.save(os.path.join(path, "c"), tree, force=True)
        print(interrupted, sorted(os.listdir(path)))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("['c', 'warm']\n"), done.stdout
    assert int(done.stdout.split()[0]) > 0


def test_saves_from_several_threads_take_turns_and_every_error_is_told(
    tmp_path: Path, failing: ckptkit.AsyncCheckpointer
) -> None:
    seen = []

    def save(name: str) -> None:
        try:
            failing.save(tmp_path / name, _FailingSave())
        except errors.AsyncSaveError as error:
            seen.append(error)

    threads = [threading.Thread(target=save, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = 4 - len(seen)  # a save that tells of an earlier one's error does not start
    try:
        failing.wait_until_finished()
    except errors.AsyncSaveError as error:
        seen.append(error)
    assert len(seen) == started
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("refused", [["ckptkit-commit"], ["ckptkit-write", "ckptkit-commit"]])
def test_where_no_thread_starts_the_caller_does_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: list[str]
) -> None:
    checkpointer = ckptkit.StandardCheckpointer(save_concurrent_gb=0.001)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name in refused:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    checkpointer.save(tmp_path / "c", {"a": np.ones(1 << 20), "b": np.ones(1 << 20)})
    assert not checkpointer.is_saving_in_progress()
    assert ckptkit.restore(tmp_path / "c")["b"].sum() == 1 << 20


def test_another_thread_may_wait_while_the_thread_of_a_save_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = ckptkit.StandardCheckpointer()
    start = threading.Thread.start
    waited = []

    def start_slowly(thread: threading.Thread) -> None:
        if thread.name == "ckptkit-commit":
            with ThreadPoolExecutor() as others:
                waited.append(others.submit(checkpointer.wait_until_finished).exception(30))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_slowly)
    checkpointer.save(tmp_path / "c", {"a": 1})
    assert waited == [None]
    checkpointer.close()
    assert ckptkit.restore(tmp_path / "c") == {"a": 1}


@pytest.mark.parametrize("use", ["wait_until_finished", "close", "save", "restore"])
def test_a_callback_that_would_wait_for_its_own_save_is_told(tmp_path: Path, use: str) -> None:
    arguments = {"save": (tmp_path / "d", {"a": 1}), "restore": (tmp_path / "c",)}.get(use, ())
    options = ckptkit.options.AsyncOptions(post_finalization_callback=lambda: getattr(checkpointer, use)(*arguments))
    checkpointer = ckptkit.StandardCheckpointer(async_options=options)
    checkpointer.save(tmp_path / "c", {"a": np.ones(3)})
    with pytest.raises(errors.BusyError, match="callback"):
        checkpointer.join(30)
    assert ckptkit.restore(tmp_path / "c")["a"].sum() == 3


def test_a_thread_that_waits_for_its_turn_to_save_is_told_when_its_time_is_over(
    tmp_path: Path, registry: ckptkit.Registry
) -> None:
    begun, end = threading.Event(), threading.Event()

    class Slow(ckptkit.AsyncCheckpointHandler):
        async def async_save(self, directory: Any, args: Any) -> None:
            begun.set()
            end.wait(30)

        def restore(self, directory: Any, args: Any) -> None:
            return None

    registry.add_args(_FailingSave, Slow, for_save=True)
    checkpointer = ckptkit.AsyncCheckpointer(registry=registry, timeout_secs=0.05)
    first = threading.Thread(target=checkpointer.save, args=(tmp_path / "c", _FailingSave()))
    first.start()
    begun.wait(30)
    with pytest.raises(errors.TimeoutError):
        checkpointer.save(tmp_path / "d", _FailingSave())
    end.set()
    first.join()
    checkpointer.join(30)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("wrong", ["asyncio", "coroutine", "number"])
def test_futures_of_another_kind_are_the_handlers_fault_and_leave_nothing(
    tmp_path: Path, registry: ckptkit.Registry, wrong: str
) -> None:
    class Wrong(ckptkit.AsyncCheckpointHandler):
        async def async_save(self, directory: Any, args: Any) -> Any:
            (directory / "half").write_text("half")
            return [{"asyncio": asyncio.get_running_loop().create_future(), "coroutine": asyncio.sleep, "number": 1}[wrong]]

        def restore(self, directory: Any, args: Any) -> None:
            return None

    registry.add_args(_FailingSave, Wrong, for_save=True)
    with pytest.raises(errors.PluginError, match=r"Wrong\.async_save returned"):
        ckptkit.Checkpointer(registry=registry).save(tmp_path / "c", _FailingSave())
    assert not list(tmp_path.iterdir())


def test_ctrl_c_inside_a_running_event_loop_leaves_nothing_behind(tmp_path: Path) -> None:
    done = fresh.run(
        """
        import asyncio, os, signal, sys, threading, time, numpy as np, ckptkit

        class Slow(ckptkit.AsyncCheckpointHandler):
            async def async_save(self, directory, args):
                (directory / "half").write_text("half")
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
                time.sleep(0.3)
            def restore(self, directory, args):
                pass

        class SlowSave(ckptkit.args.CheckpointArgs):
            pass

        async def notebook():
            registry = ckptkit.Registry.with_builtins()
            registry.add_args(SlowSave, Slow, for_save=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as Jupyter has it; asyncio would cancel the task
            try:
                ckptkit.Checkpointer(registry=registry).save(sys.argv[1] + "/c", SlowSave())
            except KeyboardInterrupt:
                print("interrupted", os.listdir(sys.argv[1]))

        asyncio.run(notebook())
        """,
        tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted []\n"), done.stderr


def test_a_writer_that_does_not_stop_keeps_its_directory(
    tmp_path: Path, registry: ckptkit.Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is given the directory next would find its files among their own."""
    stuck: Future[None] = Future()
    stuck.set_running_or_notify_cancel()
    failed: Future[None] = Future()
    failed.set_exception(OSError(28, "No space left on device"))

    class Stuck(ckptkit.AsyncCheckpointHandler):
        async def async_save(self, directory: Any, args: Any) -> Any:
            return [failed, stuck]

        def restore(self, directory: Any, args: Any) -> None:
            return None

    registry.add_args(_FailingSave, Stuck, for_save=True)
    monkeypatch.setattr(saving, "_STOP_SECS", 0.05)
    with pytest.raises(OSError, match="No space"):
        ckptkit.Checkpointer(registry=registry).save(tmp_path / "c", _FailingSave())
    with pytest.raises(errors.BusyError):
        ckptkit.save(tmp_path / "c", {"a": 1})
    stuck.set_result(None)


def test_a_reader_beside_a_writer_that_replaces_the_checkpoint_always_finds_one_whole(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"a": np.zeros(50_000)})
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, numpy, ckptkit as c; [c.save(sys.argv[1], {'a': numpy.full(50_000, n)}, force=True) for n in range(40)]",
            str(tmp_path / "c"),
        ]
    )
    reads = 0
    with ckptkit.StandardCheckpointer() as checkpointer:
        while writer.poll() is None:
            restored = checkpointer.restore(tmp_path / "c")["a"]
            assert (restored == restored[0]).all()
            reads += 1
    assert writer.returncode == 0
    assert reads > 10
