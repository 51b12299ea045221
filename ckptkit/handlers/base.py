"""The interface of a checkpoint handler: it owns one directory, and what is in there is its own affair.

A handler knows nothing of commits, temporary names or threads; a `Checkpointer` gives it an empty directory to save
into and makes the result visible only when everything is written.
"""

from __future__ import annotations

import abc
import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from etils import epath

    from ckptkit.registry import Registry

__all__ = ["AsyncCheckpointHandler", "CheckpointHandler", "run_coroutine"]

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
    def save(self, directory: epath.Path, args: Any) -> None:
        """Writes into `directory`, which exists and is empty; complete when it returns."""

    @abc.abstractmethod
    def restore(self, directory: epath.Path, args: Any) -> Any:
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
    async def async_save(self, directory: epath.Path, args: Any) -> list[Future[Any]] | None:
        """Starts to write into `directory`.

        What must happen before the caller may change or donate its arrays happens before this returns.

        Returns:
          futures that are done when everything is written; None or an empty list when it already is.
        """

    def save(self, directory: epath.Path, args: Any) -> None:
        for future in run_coroutine(self.async_save(directory, args=args)) or ():
            future.result()


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, also where an event loop already runs in this thread (Jupyter)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(asyncio.run(coroutine))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the calling thread
            result.set_exception(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name="ckptkit-coroutine")
    thread.start()
    thread.join()
    return result.result()
