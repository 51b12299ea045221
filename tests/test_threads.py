"""The workers of saves and restores."""

from __future__ import annotations

import contextvars
import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from unittest import mock

import pytest

import ckptkit
from ckptkit._gc import paused_gc, resumed_gc
from ckptkit._threads import Workers
from ckptkit.storage import Pending


def test_calls_run_and_their_errors_reach_the_caller() -> None:
    with Workers(2, "test") as workers:
        futures = [workers.submit(divmod, 7, n) for n in (2, 0)]
        assert futures[0].result() == (3, 1)
        with pytest.raises(ZeroDivisionError):
            futures[1].result()


def test_where_there_are_to_be_no_threads_a_call_has_ended_once_it_was_given() -> None:
    with Workers(0, "none") as workers:
        future = workers.submit(threading.current_thread)
        assert future.done()
        assert future.result() is threading.current_thread()


def test_cancelling_drops_what_has_not_begun() -> None:
    begun, end = threading.Event(), threading.Event()
    workers = Workers(1, "test")

    def wait() -> None:
        begun.set()
        end.wait(10)

    first, second = workers.submit(wait), workers.submit(int)
    begun.wait(10)
    threading.Timer(0.05, end.set).start()
    workers.close(cancel=True)
    assert (first.result(), second.cancelled()) == (None, True)


def test_they_take_calls_while_the_interpreter_exits() -> None:
    code = """
import threading, time
from ckptkit._threads import Workers

def late():
    threading.main_thread().join()
    with Workers(2, "late") as workers:
        print(workers.submit(sum, [1, 2]).result())

threading.Thread(target=late).start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_without_a_thread_the_caller_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Workers(2, "test") as workers:
        assert [workers.submit(pow, 2, n).result() for n in range(3)] == [1, 2, 4]


def test_threads_that_several_callers_started_at_once_all_end():
    for _ in range(50):
        workers = Workers(2, "many")
        callers = [threading.Thread(target=workers.submit, args=(int,)) for _ in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        closing = threading.Thread(target=workers.close, daemon=True)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()


def test_workers_that_outlive_the_modules_that_they_use_end_silently():
    code = """
import os
from ckptkit._threads import Workers

os.kept = Workers(2, "kept")  # until the modules that were imported after this one have lost their names
os.kept.submit(int).result()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_pending_keeps_what_failed_first_and_forgets_the_rest():
    pending, parts = Pending(), [Future() for _ in range(4)]
    whole = pending.add(parts)
    parts[2].set_result(None)
    pending.raise_failed()
    parts[3].set_exception(OSError("the first"))
    parts[0].set_exception(OSError("the second"))
    assert not whole.done()
    with pytest.raises(OSError, match="the first"):
        pending.raise_failed()
    parts[1].set_result(None)
    with pytest.raises(OSError, match="the first"):
        pending.wait()
    assert not pending._parts
    Pending().wait()


def test_pending_raises_what_failed_just_now_before_its_callbacks_have_run():
    pending, part = Pending(), Future()
    part.add_done_callback(lambda _: time.sleep(0.3))  # runs before that of `pending`
    pending.add([part])
    failing = threading.Thread(target=part.set_exception, args=[OSError("just now")])
    failing.start()
    while not part.done():
        time.sleep(0.01)
    with pytest.raises(OSError, match="just now"):
        pending.wait()
    failing.join()


def test_collections_are_paused_and_resumed_by_the_thread_that_paused_them_and_never_against_the_program() -> None:
    seen = []
    with paused_gc():
        seen.append(gc.isenabled())
        with resumed_gc():
            seen.append(gc.isenabled())
            with paused_gc():
                seen.append(gc.isenabled())
            seen.append(gc.isenabled())
        seen.append(gc.isenabled())
        other = threading.Thread(target=lambda: seen.append(_enabled_where_resumed()))
        other.start()
        other.join()
    assert [*seen, gc.isenabled()] == [False, True, False, True, False, False, True]
    gc.disable()
    try:
        assert not _enabled_where_resumed()
    finally:
        gc.enable()


def test_collections_are_resumed_in_a_thread_that_goes_on_with_the_call() -> None:
    with paused_gc():
        context = contextvars.copy_context()  # as `run_coroutine` does where an event loop runs
        thread = threading.Thread(target=context.run, args=[lambda: seen.append(_enabled_where_resumed())])
        seen: list[bool] = []
        thread.start()
        thread.join()
    assert seen == [True]


def test_collections_that_a_call_left_off_as_ctrl_c_ended_it_come_back_with_the_next_call(tmp_path: Path) -> None:
    pause = paused_gc()
    pause.__enter__()
    with mock.patch.object(gc, "enable", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        pause.__exit__(None, None, None)
    assert not gc.isenabled()
    ckptkit.save(tmp_path / "c", {"a": 1})
    assert gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_does_not_inherit_a_pause_of_a_thread_that_it_does_not_have() -> None:
    code = """
import gc, os, threading
from ckptkit._gc import paused_gc

def hold():
    with paused_gc():
        paused.set()
        forked.wait()

paused, forked = threading.Event(), threading.Event()
thread = threading.Thread(target=hold)
thread.start()
paused.wait()
child = os.fork()
if not child:
    os._exit(gc.isenabled())
status = os.waitpid(child, 0)[1]
forked.set()
thread.join()
with paused_gc():
    child = os.fork()
    if not child:
        os._exit(gc.isenabled())
    print(os.waitstatus_to_exitcode(status), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("1 0 False\n", 0), done.stderr


def _enabled_where_resumed() -> bool:
    with paused_gc(), resumed_gc():
        return gc.isenabled()
