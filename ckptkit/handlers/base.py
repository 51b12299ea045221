"""The interface of a checkpoint handler: it owns one directory, and what is in there is its own affair.

A handler knows nothing of commits, temporary names or threads; a `Checkpointer` gives it an empty directory to save
into and makes the result visible only when everything is written.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import inspect
import warnings
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from ckptkit import errors
from ckptkit._threads import Waitable

if TYPE_CHECKING:
    from etils import epath

    from ckptkit.registry import Registry

__all__ = [
    "AsyncCheckpointHandler",
    "CheckpointHandler",
    "DeferredPathAsyncCheckpointHandler",
    "DelegatingHandler",
    "PathAwaitingCreation",
    "created",
    "folded_args",
    "run_coroutine",
]

A = TypeVar("A")
T = TypeVar("T")


class CheckpointHandler(abc.ABC):
    """Saves and restores one directory.

    A handler that the registry makes takes no constructor arguments. It is always called with `args=`.

    Attributes:
      registry: the registry of the checkpointer that uses the handler; None until then, which means the default one.
      further_typestrs: type strings beside `typestr()` whose checkpoints this handler reads.
    """

    registry: Registry | None = None
    further_typestrs: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def save(self, directory: epath.Path, *, args: Any) -> None:
        """Writes into `directory`, which exists and is empty; complete when it returns.

        Of several processes that save together, the primary alone makes this call.
        """

    @abc.abstractmethod
    def restore(self, directory: epath.Path, *, args: Any) -> Any:
        """Reads what `save` wrote; changes nothing in `directory`."""

    def metadata(self, directory: epath.Path) -> Any:
        """What the checkpoint holds, without its data; None where the handler has nothing to say."""
        return None

    def finalize(self, directory: epath.Path) -> None:  # noqa: B027 - optional, so not abstract
        """Called once after every process has saved, before the checkpoint becomes visible."""

    def close(self) -> None:  # noqa: B027 - optional, so not abstract
        """Releases what the handler holds."""

    def item_typestrs(self, args: Any) -> str | dict[str, str]:
        """What the checkpoint records about who reads it: a type string, or one for each item of a composite."""
        return self.typestr()

    @classmethod
    def typestr(cls) -> str:
        """The name that a checkpoint records, and by which a fresh process finds this handler again."""
        return f"{cls.__module__}.{cls.__qualname__}"


class AsyncCheckpointHandler(CheckpointHandler):
    """A handler whose save returns before everything is written."""

    @abc.abstractmethod
    async def async_save(self, directory: epath.Path, *, args: Any) -> list[Future[Any]] | None:
        """Starts to write into `directory`. Every process makes this call, in one directory, where several save together.

        What must happen before the caller may change or donate its arrays happens before this returns.

        Returns:
          futures that are done when everything is written; None or an empty list when it already is.
        """

    def save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> None:
        """Does what `async_save` does, and waits until it is done."""
        for future in run_coroutine(self.async_save(directory, *args, **kwargs)) or ():
            future.result()


class DelegatingHandler(AsyncCheckpointHandler):
    """A handler that leaves the storing to other handlers, which share its registry and are closed with it."""

    def __init__(self, *parts: CheckpointHandler) -> None:
        """Takes the other handlers."""
        self._parts = parts

    @property
    def registry(self) -> Registry | None:  # one value, kept where it is used
        return self._parts[0].registry

    @registry.setter
    def registry(self, registry: Registry | None) -> None:
        for part in self._parts:
            part.registry = registry

    def close(self) -> None:
        for part in self._parts:
            part.close()


@runtime_checkable
class PathAwaitingCreation(Protocol):
    """A directory that may not be there yet."""

    @property
    def path(self) -> epath.Path:
        """Where it will be; nothing may be written there before it was awaited."""

    def __truediv__(self, name: str) -> PathAwaitingCreation: ...

    async def await_creation(self) -> epath.Path:
        """The directory, once it is there; makes it where nobody has."""


class DeferredPathAsyncCheckpointHandler(AsyncCheckpointHandler):
    """A handler whose `async_save` takes a directory that is still being created, and awaits it off the caller's path."""

    @abc.abstractmethod
    async def async_save(self, directory: epath.Path | PathAwaitingCreation, *, args: Any) -> list[Future[Any]] | None: ...


def created(directory: epath.Path | PathAwaitingCreation) -> epath.Path:
    """The directory; waits until it is there."""
    return run_coroutine(directory.await_creation()) if isinstance(directory, PathAwaitingCreation) else directory


def folded_args(args_class: Callable[..., A], args: A | None, **deprecated: Any) -> A:
    """The args of a call to a handler: `args=`, or what the arguments say that Orbax had before it.

    Args:
      args_class: makes the args.
      args: those given.
      **deprecated: further arguments of the call, by the names of the fields of `args_class`; None where not given.

    Raises:
      errors.ArgsError: both kinds are given, or the args take the place of a deprecated argument.
    """
    given = [name for name, value in deprecated.items() if value is not None]
    name = getattr(args_class, "__name__", repr(args_class))
    if isinstance(args_class, type) and any(isinstance(value, args_class) for value in deprecated.values()):
        raise errors.ArgsError(f"Make sure to specify kwarg name `args=` when providing `{name}` to a handler itself.")
    if args is None:
        if given:
            message = f"{', '.join(given)} of a handler's save and restore are deprecated; pass args={name}(...)."
            warnings.warn(message, DeprecationWarning, stacklevel=3)
        return args_class(**deprecated)
    if given:
        raise errors.ArgsError(f"args={name}(...) already says everything; leave out {', '.join(given)}.")
    return args


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where an event loop already runs in this thread (Jupyter)."""
    try:
        return _result(coroutine)
    finally:
        if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:  # Ctrl-C came first
            coroutine.close()


def _result(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Not `asyncio.run`, which holds back a Ctrl-C until the coroutine has ended, and then drops its result.
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            return loop.run_until_complete(coroutine)
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(asyncio.run(coroutine))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the calling thread
            result.set_exception(error)

    thread = Waitable(contextvars.copy_context().run, (run,), "ckptkit-coroutine")
    thread.start()
    try:
        thread.wait()
    except BaseException:
        thread.wait()
        _give_up(result)
        raise
    return result.result()


def _give_up(result: Future[Any]) -> None:
    """Stops what an interrupted call has started, and waits until it has ended."""
    started = [] if result.exception() is not None else [f for f in result.result() or () if isinstance(f, Future)]
    for future in started:
        future.cancel()
    wait(started)
