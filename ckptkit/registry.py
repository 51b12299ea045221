"""The registry: which handler takes an args class, which type handler a leaf, which backend a name, which place a URL.

What may be registered is `_registrable`'s affair, who registered what `_ledger`'s, finding and loading plugins `discovery`'s.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, TypeVar

from ckptkit import _registrable as registrable
from ckptkit import errors
from ckptkit._ledger import Ledger, Plugin, PluginFailure, Registration, Wish, owned_by
from ckptkit._names import imported, in_package, is_a, key_of, name_of, top_package
from ckptkit._tables import Claim, Owner, Table
from ckptkit.args import CheckpointArgs
from ckptkit.handlers.base import CheckpointHandler
from ckptkit.leaves.base import TypeHandler
from ckptkit.location import Location, LocationPath
from ckptkit.storage.base import StorageBackend

__all__ = ["Owner", "Plugin", "PluginFailure", "Registration", "Registry", "default_registry", "owned_by"]

Use = Literal["save", "restore"]
HandlerClass = type[CheckpointHandler]
Factory = Callable[[str], Location]
T = TypeVar("T")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+")
_MISSING: Any = object()


class _Binding(NamedTuple):
    """An args class and the handler class that takes it."""

    args_class: type[CheckpointArgs]
    handler_class: HandlerClass


class Registry:
    """Everything that is registered. Thread-safe.

    Args:
      load: called once, before the first lookup, to fill the registry.

    Attributes:
      plugins: what was loaded into it, in order.
      failures: what could not be loaded.
    """

    def __init__(self, load: Callable[[Registry], None] | None = None) -> None:
        args_way_out = "Bind a CheckpointArgs subclass of your own."
        typestr_way_out = "Return another string from typestr()."
        override = "Pass override=True to replace it."
        self._args: dict[Use, Table[_Binding]] = {
            "save": Table("args class (for save)", args_way_out),
            "restore": Table("args class (for restore)", args_way_out),
        }
        self._handlers: Table[HandlerClass] = Table("type string of a handler", typestr_way_out)
        self._leaf_types: Table[TypeHandler[Any]] = Table("leaf type", override)
        self._typestrs: Table[TypeHandler[Any]] = Table("type string of a type handler", override)
        self._backends: Table[StorageBackend] = Table("storage backend", override)
        self._schemes: Table[Factory] = Table("scheme", override)
        leaves = (self._leaf_types, self._typestrs)
        self._ledger = Ledger([*self._args.values(), self._handlers, *leaves, self._backends, self._schemes])
        self._load = load
        self._loading = threading.RLock()
        self._state: Literal["empty", "loading", "loaded"] = "empty" if load else "loaded"
        self.plugins: list[Plugin] = []
        self.failures: list[PluginFailure] = []

    @classmethod
    def with_builtins(cls) -> Registry:
        """A registry of its own that knows what comes with ckptkit, and no installed plugin."""
        registry = cls()
        importlib.import_module("ckptkit.discovery").load_builtins(registry)
        return registry

    # Registrations

    def add_args(
        self, args_class: type[CheckpointArgs], handler_class: HandlerClass, *, for_save: bool = False, for_restore: bool = False
    ) -> None:
        """Binds an args class to the handler that takes it, and the handler to its type strings.

        Raises:
          errors.ArgsError: neither for save nor for restore.
          errors.ArgsTypeError: not a subclass of CheckpointArgs, or of CheckpointHandler, or one that lacks methods.
          errors.ConflictError: the class is bound to another handler, or the type string is taken.
        """
        registrable.check_class(args_class, CheckpointArgs, "args class")
        registrable.check_handler_class(handler_class)
        if not (for_save or for_restore):
            raise errors.ArgsError(
                f"{name_of(args_class)}: for_save and for_restore are both False; say what the class is for with for_save=True, "
                "for_restore=True, or both."
            )
        binding = _Binding(args_class, handler_class)
        tables = [self._args["save"]] * for_save + [self._args["restore"]] * for_restore
        with self._ledger.lock:
            wishes = [Wish(table, key_of(args_class), binding) for table in tables]
            self._ledger.record([*wishes, *self._typestr_wishes(handler_class)], name_of(handler_class), args_class.__module__)

    def add_handler(self, handler_class: HandlerClass) -> None:
        """Records the type strings of a handler, by which a restore finds it.

        Raises:
          errors.ArgsTypeError: not a subclass of CheckpointHandler, or one that lacks methods, or its typestr() is not a
            classmethod that returns a str.
          errors.ConflictError: another handler has the type string.
        """
        registrable.check_handler_class(handler_class)
        with self._ledger.lock:
            self._ledger.record(self._typestr_wishes(handler_class), name_of(handler_class), handler_class.__module__)

    def add_type_handler(
        self,
        handler: TypeHandler[Any],
        leaf_types: type | str | tuple[type | str, ...],
        override: bool = False,  # noqa: FBT001, FBT002 - Orbax's signature
        *,
        further_typestrs: Sequence[str] = (),
    ) -> None:
        """Gives leaves of some types, and of their subclasses, to a type handler.

        Args:
          handler: an instance; it serves every save and restore.
          leaf_types: classes, or dotted names such as 'torch.Tensor', so that the library need not be imported.
          override: replaces the type handler that has the types, or the type string.
          further_typestrs: type strings beside the handler's own whose leaves it reads.

        Raises:
          errors.ArgsTypeError: not an instance of TypeHandler, or not types.
          errors.ConflictError: another type handler has a type or a type string, and `override` is False.
        """
        registrable.check_type_handler(handler)
        keys = [registrable.leaf_type_key(each) for each in (leaf_types if isinstance(leaf_types, tuple) else (leaf_types,))]
        typestrs = [registrable.text(typestr, "type string") for typestr in (handler.typestr, *further_typestrs)]
        wishes = [Wish(self._leaf_types, key, handler, override) for key in keys]
        wishes += [Wish(self._typestrs, typestr, handler, override) for typestr in typestrs]
        self._ledger.record(wishes, name_of(type(handler)), type(handler).__module__)

    def add_storage(self, backend: StorageBackend, override: bool = False) -> None:  # noqa: FBT001, FBT002 - as add_type_handler
        """Makes a storage backend available under its name.

        Raises:
          errors.ArgsTypeError: not an instance of StorageBackend.
          errors.ConflictError: another backend has the name, and `override` is False.
        """
        registrable.check_instance(backend, StorageBackend, "storage backend")
        name = registrable.text(backend.name, "name of a storage backend")
        self._ledger.record([Wish(self._backends, name, backend, override)], name_of(type(backend)), type(backend).__module__)

    def add_scheme(
        self,
        scheme: str,
        factory: Factory,
        override: bool = False,  # noqa: FBT001, FBT002 - as add_type_handler
    ) -> None:
        """Makes places from URLs of a scheme, such as 's3'; the factory is given the whole URL.

        Raises:
          errors.ArgsError: not a scheme.
          errors.ArgsTypeError: the factory cannot be called.
          errors.ConflictError: another factory has the scheme, and `override` is False.
        """
        if not _SCHEME.fullmatch(registrable.text(scheme, "scheme")):
            raise errors.ArgsError(
                f"{scheme!r} is not a scheme; expected letters, digits, '+', '.' and '-', such as 's3', and no '://'."
            )
        if not callable(factory):
            raise errors.ArgsTypeError(f"The factory of scheme {scheme!r} is {factory!r}; expected a function: url -> Location.")
        nameless = "<" in getattr(factory, "__qualname__", "<")  # a lambda, a closure or a partial object
        source = factory if nameless else name_of(factory)
        self._ledger.record(
            [Wish(self._schemes, scheme.lower(), factory, override)], source, getattr(factory, "__module__", __name__)
        )

    def _typestr_wishes(self, handler_class: HandlerClass) -> list[Wish]:
        """One for each type string of a handler. A string that is inherited belongs to the base that it comes from."""
        wishes = []
        for typestr in registrable.typestrs_of(handler_class):
            holder = self._handlers.get(typestr)
            if holder is None or name_of(holder) == name_of(handler_class):
                wishes.append(Wish(self._handlers, typestr, handler_class))
            elif not is_a(handler_class, holder):
                wishes.append(Wish(self._handlers, typestr, handler_class, override=is_a(holder, handler_class)))
        return wishes

    def loading(self, owner: Owner) -> AbstractContextManager[None]:
        """A plugin is being loaded: what its package registers while imported is the owner's too; all is undone on an error."""
        return self._ledger.loading(owner)

    # Lookups

    def ensure_loaded(self) -> None:
        """Fills the registry, once; a second thread waits until that is done, a call from within returns at once."""
        if self._state == "loaded":
            return
        with self._loading:
            if self._load is None or self._state != "empty":
                return
            self._state = "loading"
            try:
                self._load(self)
            except BaseException:
                self._state = "empty"
                raise
            self._state = "loaded"

    def handler_for_args(self, args: CheckpointArgs | type[CheckpointArgs], *, use: Use) -> HandlerClass:
        """The handler class that an args class is bound to.

        Raises:
          errors.RegistryError: none, or only for the other use.
        """
        args_class = args if isinstance(args, type) else type(args)
        if (binding := self._get(self._args[use], key_of(args_class))) is not None:
            return binding.handler_class
        other: Use = "restore" if use == "save" else "save"
        if (binding := self._args[other].get(key_of(args_class))) is not None:
            handler_class = binding.handler_class
            raise errors.RegistryError(
                f"{name_of(args_class)} is registered for {other}, not for {use}. Its handler {name_of(handler_class)} takes for "
                f"{use}: {_names(self.args_for(handler_class, use))}."
            )
        raise errors.RegistryError(
            f"{name_of(args_class)} is not registered with a handler. Decorate the class with "
            f"@ckptkit.args.register_with_handler(TheHandler, for_{use}=True).{self.failures_note()}"
        )

    def args_for(self, handler_class: HandlerClass, use: Use) -> tuple[type[CheckpointArgs], ...]:
        """The args classes that a handler takes, its own before those of the classes that it inherits from."""
        self.ensure_loaded()
        with self._ledger.lock:
            bindings = [binding for key in self._args[use] if (binding := self._args[use].get(key))]
        keys = [key_of(cls) for cls in handler_class.__mro__]
        return tuple(args_class for key in keys for args_class, bound in bindings if key_of(bound) == key)

    def check_args(self, handler_class: HandlerClass, args: Any, use: Use) -> None:
        """Refuses args that do not belong to a handler. An unregistered subclass of args that do is fine.

        Raises:
          errors.ArgsError: names the classes that belong to it, and the handler that takes these.
        """
        accepted = self.args_for(handler_class, use)
        binding = self._args[use].get(key_of(type(args)))
        if any(is_a(type(args), cls) for cls in accepted) and (binding is None or is_a(handler_class, binding.handler_class)):
            return
        belongs = f", which belongs to {name_of(binding.handler_class)}" if binding is not None else ""
        raise errors.ArgsError(
            f"{name_of(handler_class)} cannot {use} with {name_of(type(args))}{belongs}. It takes: {_names(accepted)}."
        )

    def handler_for_typestr(self, typestr: str) -> HandlerClass:
        """The handler class that reads checkpoints with this type string.

        Raises:
          errors.RegistryError: none is registered.
        """
        if (handler_class := self._get(self._handlers, typestr)) is not None:
            return handler_class
        raise errors.RegistryError(
            f"No handler is registered for {_cut(typestr)}. Install the package that provides it, import the module that "
            "registers it, or give the args of a handler that reads the checkpoint. "
            f"Known:{errors.listing(sorted(self._handlers))}{self.failures_note()}"
        )

    def type_handler_for(self, leaf_type: type) -> TypeHandler[Any] | None:
        """The type handler of leaves of a class, by the first of its bases that is registered; None where none is.

        Raises:
          errors.ArgsTypeError: not a class.
        """
        if not isinstance(leaf_type, type):
            raise errors.ArgsTypeError(f"{leaf_type!r} is not a class; expected the type of a leaf, such as np.ndarray.")
        handler: TypeHandler[Any] | None = self._ledger.concluded.get(leaf_type, _MISSING)
        if handler is not _MISSING:
            return handler
        self.ensure_loaded()
        with self._ledger.lock:
            matches = (self._match(base) for base in leaf_type.__mro__)
            handler = next((claim.value for claim in matches if claim is not None), None)
            self._ledger.concluded[leaf_type] = handler
            return handler

    def _match(self, base: type) -> Claim[TypeHandler[Any]] | None:
        """The claim for exactly this class: by its name, or by a public name that leads to it."""
        exact = self._leaf_types.claim(key_of(base))
        public = [key for key in self._leaf_types if isinstance(key, str) and imported(key) is base]
        named = self._leaf_types.claim(public[0]) if public else None
        return named if named is not None and (exact is None or named.override) else exact

    def type_handler_named(self, typestr: str) -> TypeHandler[Any] | None:
        """The type handler that reads leaves with this type string, or None."""
        return self._get(self._typestrs, typestr)

    def provider_of(self, typestr: str) -> str:
        """Who provides the type handler, or the handler, of a type string: 'distribution version', or 'module name'.

        Raises:
          errors.RegistryError: nothing is registered for it.
        """
        self.ensure_loaded()
        claim = self._typestrs.claim(typestr) or self._handlers.claim(typestr)
        if claim is None:
            raise errors.RegistryError(f"Nothing is registered for the type string {_cut(typestr)}.{self.failures_note()}")
        return claim.owner.provider

    def owner_of(self, thing: object) -> Owner:
        """Who registered a handler, type handler or backend; of anything else, who brought the package that its class is from."""
        for _, _, claim in self._ledger.claims():
            if claim.value is thing or claim.value is type(thing):
                return claim.owner
        module = type(thing).__module__
        owners = [plugin.owner for plugin in self.plugins]
        return next((owner for owner in owners if in_package(module, top_package(owner.module))), Owner(module))

    def registrations(self) -> list[Registration]:
        """Everything that can be looked up, each with its owner; not what an override covers."""
        self.ensure_loaded()
        return [
            Registration(what, key, claim.value.handler_class if isinstance(claim.value, _Binding) else claim.value, claim.owner)
            for what, key, claim in self._ledger.claims()
        ]

    def storage(self, name: str) -> StorageBackend:
        """The storage backend with this name.

        Raises:
          errors.RegistryError: there is none.
        """
        if (backend := self._get(self._backends, name)) is not None:
            return backend
        raise errors.RegistryError(
            f"There is no storage backend {_cut(name)}. Known: {', '.join(self._backends) or 'none'}. Install the package that "
            f"provides it, or choose another with storage=.{self.failures_note()}"
        )

    def storages(self) -> tuple[StorageBackend, ...]:
        """Every storage backend, in the order of registration."""
        self.ensure_loaded()
        with self._ledger.lock:
            return tuple(backend for name in self._backends if (backend := self._backends.get(name)) is not None)

    def location(self, path_or_url: str | os.PathLike[str] | Location) -> Location:
        """The place that a path or a URL names. A leading '~' is the home directory; relative paths start from the current one.

        Raises:
          errors.ArgsError: an empty path, or one that is not text, or not UTF-8.
          errors.RegistryError: no factory is registered for the URL's scheme.
        """
        if isinstance(path_or_url, Location):
            return path_or_url
        if isinstance(path_or_url, LocationPath):
            return path_or_url.location
        path = _checked_path(path_or_url)
        scheme, separator, rest = path.partition(":/")
        if separator and _SCHEME.fullmatch(scheme):
            if rest.startswith("/"):
                return self._factory(scheme.lower(), path)(path)
            if self._get(self._schemes, scheme.lower()) is not None:
                raise errors.ArgsError(f"{path!r} is a URL that lost a '/' in pathlib.Path; give a str or an epath.Path instead.")
        return self._factory("file", path)(_checked_text(os.path.abspath(os.path.expanduser(path))))

    def _factory(self, scheme: str, path: str) -> Factory:
        if (factory := self._get(self._schemes, scheme)) is not None:
            return factory
        raise errors.RegistryError(
            f"{path}: nothing is registered for the scheme {scheme!r}. Known: {', '.join(self._schemes) or 'none'}. Install the "
            f"package that provides it, or call Registry.add_scheme.{self.failures_note()}"
        )

    def _get(self, table: Table[T], key: Hashable) -> T | None:
        self.ensure_loaded()
        with self._ledger.lock:
            return table.get(key)

    def failures_note(self) -> str:
        """For the end of a message about something that is missing: the plugins that failed to load, if any."""
        return "".join(f"\nNote: {failure}" for failure in self.failures)


def default_registry() -> Registry:
    """The process's registry, which fills itself with what is built in and with installed plugins when first looked into."""
    return _DEFAULT


def _load_installed(registry: Registry) -> None:
    importlib.import_module("ckptkit.discovery").load(registry)


_DEFAULT = Registry(load=_load_installed)


def _checked_path(path: Any) -> str:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise errors.ArgsTypeError(f"{path!r} is not a path: expected a str or os.PathLike, not {type(text).__qualname__}.")
    if not text or "\0" in text:
        raise errors.ArgsError(f"{text!r} is not a path: it is empty, or holds a NUL character.")
    return _checked_text(text)


def _checked_text(path: str) -> str:
    """The path, which stores take as UTF-8; other bytes in the name of a directory are lone surrogates to Python."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise errors.ArgsError(f"{path!r} is not UTF-8; rename the directory, or choose another path.") from error
    return path


def _names(classes: Sequence[type]) -> str:
    return ", ".join(name_of(cls) for cls in classes) or "nothing, since no args class is registered with it"


def _cut(text: Any) -> str:
    """A name from a checkpoint or a user, for a message."""
    shown = repr(text)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
