"""The handler of several items, each in a folder of its own with a handler of its own, found by the class of its args."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ckptkit import args as args_lib
from ckptkit import discovery, errors
from ckptkit._checks import a, optional
from ckptkit._gc import resumed_gc
from ckptkit.file_list import FILE_LIST
from ckptkit.handlers._stored import args_for_files, handler_class_for, item_folders
from ckptkit.handlers.base import AsyncCheckpointHandler, CheckpointHandler
from ckptkit.location import Location, mapped_os_errors
from ckptkit.meeting import on_primary
from ckptkit.metadata.step import STEP_FILE, decode_step
from ckptkit.pipeline import answers

if TYPE_CHECKING:
    from etils import epath

    from ckptkit.registry import Registry

__all__ = ["CompositeCheckpointHandler"]

_TAKEN = (FILE_LIST, "ckptkit_writer.txt", "commit_success.txt", "orbax.checkpoint")


class CompositeCheckpointHandler(AsyncCheckpointHandler):
    """Saves and restores `args.Composite`.

    Args:
      *item_names: with these or with `items_and_handlers`, no other item can be saved.
      **items_and_handlers: the handler of an item, by its name, where the one that its args find is not wanted as it is.

    Raises:
      errors.ArgsError: a name that no folder can have, or something else than a handler.
    """

    def __init__(self, *item_names: str, **items_and_handlers: CheckpointHandler) -> None:
        for name in (*item_names, *items_and_handlers):
            args_lib.check_item_name(name)
        for name, handler in items_and_handlers.items():
            optional(a(CheckpointHandler, "an instance of a CheckpointHandler, or None"))(self, name, handler)
        self._given = items_and_handlers
        self._allowed = {*item_names, *items_and_handlers}
        self._made: dict[tuple[str, type[CheckpointHandler]], CheckpointHandler] = {}
        self._saving: dict[str, CheckpointHandler] = {}

    @classmethod
    def typestr(cls) -> str:
        return "orbax.checkpoint._src.handlers.composite_checkpoint_handler.CompositeCheckpointHandler"

    def item_typestrs(self, args: args_lib.Composite) -> dict[str, str]:
        """Type string of each item's handler.

        Raises:
          errors.ArgsError: an item that cannot be saved, for its name or its args.
          errors.RegistryError: an item's args are not registered with a handler.
        """
        registry = discovery.ready(self.registry)
        return {name: answers.typestr(registry, handler) for name, handler in self._handlers_to_save(args).items()}

    async def async_save(self, directory: epath.Path, args: args_lib.Composite) -> list[Future[Any]]:
        """Starts to save every item. An error carries the name of its item."""
        registry = discovery.ready(self.registry)
        self._saving = self._handlers_to_save(args)
        writing: list[Future[Any]] = []
        try:
            for name, handler in self._saving.items():
                with _naming(name):
                    writing += await _start(registry, handler, directory / name, args[name], name)
        except BaseException:
            for future in writing:
                future.cancel()
            concurrent.futures.wait(writing)  # the directory is about to be removed
            raise
        return writing

    def restore(self, directory: epath.Path, args: args_lib.Composite | None = None) -> args_lib.Composite:
        """The items named in `args`, or all of them where it names none.

        Raises:
          errors.UnknownItemError: the checkpoint has no such item; lists those it has.
          errors.NotFoundError: an item that the checkpoint records is gone.
          errors.RegistryError: nothing registered reads an item.
          errors.FormatError: nothing tells how an item was saved.
        """
        registry = discovery.ready(self.registry)
        stored = _Stored(registry.location(directory))
        wanted: Mapping[str, Any] = stored.requested(args) if args else dict.fromkeys(stored.names(registry))
        ready = {name: self._ready(stored, name, item_args) for name, item_args in wanted.items()}
        restored = {}
        for name, (handler, item_args) in ready.items():
            with _naming(name):
                restored[name] = handler.restore(directory / name, args=item_args)
        return args_lib.Composite(**restored)

    def metadata(self, directory: epath.Path) -> args_lib.Composite:
        """What each item's handler says; None for an item that nothing registered reads."""
        registry = discovery.ready(self.registry)
        stored = _Stored(registry.location(directory))
        described: dict[str, Any] = {}
        for name in stored.names(registry):
            described[name] = None
            with _naming(name), contextlib.suppress(errors.RegistryError):
                described[name] = self._handler_to_restore(registry, stored, name, None).metadata(directory / name)
        return args_lib.Composite(**described)

    def finalize(self, directory: epath.Path) -> None:
        for name, handler in self._saving.items():
            with _naming(name):
                handler.finalize(directory / name)

    def close(self) -> None:
        for handler in (*self._given.values(), *self._made.values()):
            handler.close()

    def _handlers_to_save(self, args: args_lib.Composite) -> dict[str, CheckpointHandler]:
        if not args:
            raise errors.ArgsError("Nothing to save: expected Composite(name=StandardSave(tree), ...), with one item at least.")
        registry = discovery.ready(self.registry)
        return {name: self._handler_to_save(registry, name, item_args) for name, item_args in args.items()}

    def _handler_to_save(self, registry: Registry, name: str, args: Any) -> CheckpointHandler:
        if name.startswith("_") or name in _TAKEN or ".orbax-checkpoint-tmp" in name:
            raise errors.ArgsError(f"Item {name!r}: the name is reserved for files of the checkpoint itself; choose another.")
        if self._allowed and name not in self._allowed:
            raise errors.ArgsError(f"Item {name!r} is not one the handler was made for: {', '.join(sorted(self._allowed))}.")
        if isinstance(args, args_lib.Composite) or not isinstance(args, args_lib.CheckpointArgs):
            hint = "a Composite holds no other; give its items names in this one" if args else "leave out what is not to be saved"
            raise errors.ArgsTypeError(
                f"Item {name!r}: expected CheckpointArgs such as StandardSave(tree), not {type(args).__qualname__} ({hint})."
            )
        if given := self._given_handler(name):
            registry.check_args(type(given), args, "save")
            return given
        return self._make(name, registry.handler_for_args(args, use="save"))

    def _ready(self, stored: _Stored, name: str, args: Any) -> tuple[CheckpointHandler, Any]:
        """The handler that restores an item, and the args for it."""
        registry = discovery.ready(self.registry)
        handler = self._handler_to_restore(registry, stored, name, args)
        if args is not None:
            registry.check_args(type(handler), args, "restore")
            return handler, args
        classes = registry.args_for(type(handler), "restore")
        if not classes:
            raise errors.RegistryError(f"Item {name!r}: no args class restores with {type(handler).__qualname__}; register one.")
        return handler, args_lib.make_args(classes[0], (), {})

    def _handler_to_restore(self, registry: Registry, stored: _Stored, name: str, args: Any) -> CheckpointHandler:
        folder = stored.location.child(name)  # refuses one that leads out of the checkpoint, whoever reads it
        if given := self._given_handler(name):
            return given
        if args is not None:
            return self._make(name, registry.handler_for_args(args, use="restore"))
        if typestr := stored.typestrs.get(name):
            return self._make(name, handler_class_for(registry, stored.location, typestr))
        if (args_class := args_for_files(folder, registry)) is not None:
            return self._make(name, registry.handler_for_args(args_class, use="restore"))
        raise errors.FormatError(
            f"{stored.location.url}: nothing tells how item {name!r} was saved; give its args: Composite({name}=JsonRestore())."
        )

    def _given_handler(self, name: str) -> CheckpointHandler | None:
        handler = self._given.get(name)
        if handler is not None and handler.registry is None:
            handler.registry = self.registry
        return handler

    def _make(self, name: str, handler_class: type[CheckpointHandler]) -> CheckpointHandler:
        handler = self._made.setdefault((name, handler_class), handler_class())
        handler.registry = self.registry
        return handler


class _Stored:
    """What a checkpoint says of its items.

    Attributes:
      typestrs: type string of each item's handler by the item's name, as recorded; empty in older checkpoints.
      folders: the folders that are there.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        step = decode_step(location.read_bytes(STEP_FILE), f"{location.url}/{STEP_FILE}") if location.exists(STEP_FILE) else None
        recorded = None if step is None else step.item_handlers
        if isinstance(recorded, str):
            raise errors.ArgsError(f"{location.url} is no composite: {recorded} saved it whole. Use args of that handler.")
        self.typestrs = recorded or {}
        self.folders = sorted(name for name, is_directory in location.names().items() if is_directory)

    def names(self, registry: Registry) -> list[str]:
        """The items: those recorded, else the folders whose files tell what they are.

        Raises:
          errors.NotFoundError: the folder of a recorded item is gone.
        """
        if gone := sorted(set(self.typestrs) - set(self.folders)):
            raise errors.NotFoundError(f"{self.location.url} records items whose folders are gone: {', '.join(gone)}.")
        return sorted(self.typestrs) or item_folders(self.location, registry)

    def requested(self, args: args_lib.Composite) -> args_lib.Composite:
        """The items that a restore asks for.

        Raises:
          errors.UnknownItemError: one is not there.
        """
        if unknown := sorted(set(args) - set(self.folders)):
            raise errors.UnknownItemError(
                f"{self.location.url} has no item {', '.join(map(repr, unknown))}. It has: {', '.join(self.folders) or 'none'}."
            )
        return args


async def _start(registry: Registry, handler: CheckpointHandler, folder: epath.Path, args: Any, name: str) -> list[Future[Any]]:
    """Saves one item, or starts to."""
    with mapped_os_errors(str(folder), "make the folder"):
        folder.mkdir(exist_ok=True)  # another process may have been faster
    if isinstance(handler, AsyncCheckpointHandler):
        with answers.unhurried(registry, handler):
            started = await answers.coroutine(registry, handler, handler.async_save(folder, args=args))
        return [_ItemFuture(future, name) for future in answers.futures(registry, handler, started)]
    with resumed_gc():
        on_primary(lambda: answers.synchronous(registry, handler, handler.save(folder, args=args)))
    return []


class _ItemFuture(Future[Any]):
    """The future of one item's handler; its error carries the name of the item."""

    def __init__(self, inner: Future[Any], name: str) -> None:
        super().__init__()
        self._inner = inner
        self._name = name
        inner.add_done_callback(self._finish)

    def cancel(self) -> bool:
        return self._inner.cancel()

    def _finish(self, inner: Future[Any]) -> None:
        try:
            with _naming(self._name):
                self.set_result(inner.result())
        except BaseException as error:  # noqa: BLE001 - it is raised again where the result is asked for
            self.set_exception(error)


@contextlib.contextmanager
def _naming(item: str) -> Iterator[None]:
    """Puts the item's name in front of the message of an error; of a foreign exception, in a note below it."""
    try:
        yield
    except errors.CheckpointError as error:
        if isinstance(error, OSError) and error.strerror is not None:
            error.strerror = f"item {item!r}: {error.strerror}"
        elif error.args:
            error.args = (f"item {item!r}: {error.args[0]}", *error.args[1:])
        raise
    except Exception as error:
        error.add_note(f"in item {item!r}")
        raise
