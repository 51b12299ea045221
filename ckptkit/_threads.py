"""Threads for work in the background of a save or a restore."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Self, TypeVar

T = TypeVar("T")
_Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Waitable(threading.Thread):
    """A thread that can be waited for again after a wait was interrupted, and that the interpreter still waits for at exit then.

    Where a handler of a signal raises in `join` or `is_alive`, Python before 3.13 takes a running thread for one that has
    ended (https://github.com/python/cpython/issues/90882), from then on and everywhere.
    """

    def __init__(self, target: Callable[..., object], args: tuple[Any, ...], name: str, *, daemon: bool = False) -> None:
        super().__init__(target=target, args=args, name=name, daemon=daemon)
        self._has_run = threading.Event()
        self._runner: threading.Thread | None = None

    def run(self) -> None:
        """Also called by a thread that does itself what no thread could be started for."""
        self._runner = threading.current_thread()
        try:
            super().run()
        finally:
            self._has_run.set()

    def runs_here(self) -> bool:
        """Whether what it runs is what has called this."""
        return self._runner is threading.current_thread() and not self._has_run.is_set()

    def wait(self, timeout_secs: float | None = None) -> bool:
        """Whether what it runs has ended, within so many seconds at most; None waits as long as it takes."""
        if not self._has_run.wait(timeout_secs):
            return False
        if self.ident is not None:
            self.join()  # harmless from here on
        return True


class Workers:
    """A few threads that take calls in order; a context manager that waits for all of them.

    The standard library's executor takes nothing any more once the interpreter is about to exit, which is just when a save in
    flight must be finished. These threads are daemons: whoever has work done here waits for it and is itself waited for at exit,
    while threads that a Ctrl-C kept from being closed must not hold the interpreter up for ever.
    """

    def __init__(self, count: int, name: str) -> None:
        """At most `count` threads; with 0 a call has ended when `submit` returns, and one thread alone may call that."""
        self._count = count
        self._name = name
        self._threads: list[Waitable] = []
        self._calls = _Calls()
        self._closed = False

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Calls `function` in one of the threads."""
        if self._closed:
            raise RuntimeError("these workers were closed")
        future: Future[T] = Future()
        self._calls.put((future, lambda: function(*args)))
        if not self._count:
            self._run_here()
        elif len(self._threads) < self._count:
            self._start_thread()
        return future

    def _start_thread(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = Waitable(_run, (self._calls,), name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # Python 3.12 starts none once the main thread has ended, and a process may have too many
            if not self._threads:
                self._run_here()
        else:
            self._threads.append(thread)

    def _run_here(self) -> None:
        self._calls.put(None)
        _run(self._calls)

    def close(self, *, cancel: bool = False) -> None:
        """Waits until every call has ended; `cancel` drops those that have not begun."""
        self._closed = True
        if cancel:
            with contextlib.suppress(Empty):  # asking whether it is empty first would wait where a thread took the last call
                while call := self._calls.get_nowait():
                    call[0].cancel()
        self._end_threads()
        for thread in self._threads:
            thread.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(cancel=error[0] is not None)

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at the end of the interpreter this module's globals are None
            self._end_threads()
        except AttributeError:  # Ctrl-C came while it was being made
            pass

    def _end_threads(self) -> None:
        # More than are listed, since a Ctrl-C may have kept one from being noted; and several callers at once may start too many.
        for _ in range(self._count + len(self._threads)):
            self._calls.put(None)


def _run(calls: _Calls) -> None:
    """One thread; it refers to the queue alone, so that workers whom nobody uses any more end their threads."""
    while (call := calls.get()) is not None:
        future, function = call
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - it is raised again where the future's result is asked for
            future.set_exception(error)
        else:
            future.set_result(result)
        del call, future, function
