"""The host of plugins: loads what is built in and what is installed, the same way, and calls observers.

A plugin is a module or an object with hooks (`ckptkit.hookspecs`). Each has a pluggy host of its own, so that one that
raises stops no other. A plugin that fails to load is recorded, and everything that it registered is undone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from ckptkit import __version__, errors, hookspecs
from ckptkit.registry import Owner, Plugin, PluginFailure, Registry, default_registry, owned_by

if TYPE_CHECKING:
    from ckptkit.reports import ProgressEvent, RestoreReport, SaveReport

__all__ = ["Notifier", "PluginFailure", "failures", "load", "load_builtins", "notifier", "ready"]

_logger = logging.getLogger(__name__)
_BUILTINS = Owner("ckptkit.builtins", "ckptkit", __version__)


def ready(registry: Registry | None) -> Registry:
    """The registry to use, filled: the default one, with every installed plugin, where none is given."""
    registry = default_registry() if registry is None else registry
    registry.ensure_loaded()
    return registry


def failures(registry: Registry | None = None) -> tuple[PluginFailure, ...]:
    """The installed plugins that could not be loaded, and why."""
    return tuple(ready(registry).failures)


def load(registry: Registry, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> None:
    """Fills a registry with what is built in and with plugins, those of all installed packages by default.

    A plugin that fails is logged and recorded in `registry.failures`; the others do not notice.

    Raises:
      errors.ConflictError: something registered earlier claims what is built in, without override=True.
    """
    load_builtins(registry)
    found = importlib.metadata.entry_points(group=hookspecs.PROJECT) if entry_points is None else entry_points
    known = {plugin.owner for plugin in registry.plugins} | {failure.owner for failure in registry.failures}
    for owner, point in sorted(((_owner_of(point), point) for point in found), key=lambda pair: str(pair[0])):
        if owner in known:
            continue
        try:
            _load_plugin(registry, owner, functools.partial(_imported, point))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a stranger's module raises, it is its own affair
            failure = PluginFailure(owner, error)
            registry.failures.append(failure)
            _logger.warning("%s", failure)


def load_builtins(registry: Registry) -> None:
    """Registers what comes with ckptkit."""
    if all(plugin.owner != _BUILTINS for plugin in registry.plugins):
        _load_plugin(registry, _BUILTINS, lambda: importlib.import_module(_BUILTINS.module))


def _owner_of(point: importlib.metadata.EntryPoint) -> Owner:
    if point.dist is None:
        return Owner(point.module, "a package without metadata", "", point.name)
    return Owner(point.module, point.dist.name, point.dist.version, point.name)


def _imported(point: importlib.metadata.EntryPoint) -> Any:
    """What an entry point names.

    Raises:
      errors.PluginError: its distribution declares that it needs another ckptkit; nothing was imported.
    """
    from packaging.requirements import InvalidRequirement, Requirement  # noqa: PLC0415 - 11 ms, for nothing without plugins
    from packaging.utils import canonicalize_name  # noqa: PLC0415 - as above

    for line in (point.dist.requires if point.dist is not None else None) or ():
        try:
            required = Requirement(line)
        except InvalidRequirement:
            continue
        applies = required.marker is None or required.marker.evaluate({"extra": ""})
        wanted = canonicalize_name(required.name) == hookspecs.PROJECT and applies
        if wanted and not required.specifier.contains(__version__, prereleases=True):
            raise errors.PluginError(
                f"it is built for ckptkit{required.specifier}, and this is ckptkit {__version__}; install versions that fit, "
                "each from where it came"
            )
    return point.load()


def _load_plugin(registry: Registry, owner: Owner, import_it: Callable[[], Any]) -> None:
    with registry.loading(owner):
        plugin = import_it()
        if any(plugin is other.plugin for other in registry.plugins):
            return
        host = _host(plugin, str(owner))
        if not inspect.ismodule(plugin) and not _hooks(host):
            raise errors.PluginError(f"The entry point names {reprlib.repr(plugin)}, which is no module and has no hook.{_HOW}")
        with owned_by(owner):
            host.hook.ckptkit_register(registry=registry)
        registry.plugins.append(Plugin(owner, plugin, host))


_KNOWN_HOOKS = tuple(name for name in hookspecs.__all__ if name.startswith("ckptkit_"))
_HOW = f" Mark its hooks with @ckptkit.hookimpl; they are {', '.join(_KNOWN_HOOKS)}."


def _host(plugin: Any, name: str) -> pluggy.PluginManager:
    """A pluggy host for this plugin alone.

    Raises:
      errors.PluginError: a hook that is unknown, unmarked, or takes arguments that it will not be given.
    """
    if inspect.isclass(plugin):
        raise errors.PluginError(f"{name}: {reprlib.repr(plugin)} is a class; expected an instance: {plugin.__name__}().")
    unmarked = [attribute for attribute in _KNOWN_HOOKS if _is_unmarked(getattr(plugin, attribute, None))]
    if unmarked:
        raise errors.PluginError(f"{name}: {', '.join(unmarked)} of {reprlib.repr(plugin)} is not marked as a hook.{_HOW}")
    host = pluggy.PluginManager(hookspecs.PROJECT)
    host.add_hookspecs(hookspecs)
    try:
        host.register(plugin, name)
    except pluggy.PluginValidationError as error:
        signatures = [f"{hook}{inspect.signature(getattr(hookspecs, hook))}" for hook in _KNOWN_HOOKS]
        raise errors.PluginError(f"{error}\nThe hooks are:{errors.listing(signatures)}") from error
    try:
        host.check_pending()
    except pluggy.PluginValidationError as error:
        raise errors.PluginError(f"{name}: {error}.{_HOW}") from error
    return host


def _is_unmarked(function: Any) -> bool:
    return callable(function) and not any(hasattr(function, f"{hookspecs.PROJECT}_{mark}") for mark in ("impl", "spec"))


def _hooks(host: pluggy.PluginManager) -> bool:
    return any(host.get_hookcallers(plugin) for plugin in host.get_plugins())


class Notifier:
    """Tells plugins and observers what happened. None can disturb a save or a restore: what one raises is logged.

    Args:
      registry: the plugins loaded into it are told; None for the default one.
      observers: the hosts of those who are told as well.
    """

    def __init__(self, registry: Registry | None, observers: Sequence[pluggy.PluginManager]) -> None:
        self._registry = registry
        self._observers = observers
        self._mute: set[pluggy.PluginManager] = set()

    @functools.cached_property
    def _hosts(self) -> list[pluggy.PluginManager]:
        """Found when first needed: whoever makes one need not load plugins for it."""
        return [*(plugin.host for plugin in ready(self._registry).plugins), *self._observers]

    def save_committed(self, report: SaveReport) -> None:
        """A checkpoint became visible."""
        for host in self._hosts:
            _tell(host, "ckptkit_save_committed", report=report)

    def restored(self, report: RestoreReport) -> None:
        """A restore finished."""
        for host in self._hosts:
            _tell(host, "ckptkit_restored", report=report)

    def progress(self, event: ProgressEvent) -> None:
        """An operation went on. Whoever raises is told no more of it: several tracebacks a second help nobody."""
        for host in self._hosts:
            if host not in self._mute and not _tell(host, "ckptkit_progress", event=event):
                self._mute.add(host)


def _tell(host: pluggy.PluginManager, hook: str, **what: Any) -> bool:
    """Whether the host's plugin took it without raising."""
    try:
        getattr(host.hook, hook)(**what)
    except (Exception, SystemExit):
        names = ", ".join(name for name, _ in host.list_name_plugin())
        _logger.exception("%s raised in %s; the checkpoint is not affected.", names, hook)
        return False
    return True


def notifier(registry: Registry | None = None, observers: Iterable[object] = ()) -> Notifier:
    """Tells the plugins loaded into a registry, and these objects.

    Raises:
      errors.ArgsError: an observer without a hook, or with one that cannot be called.
    """
    return Notifier(registry, [_observer_host(observer) for observer in observers])


def _observer_host(observer: object) -> pluggy.PluginManager:
    name = f"observer {type(observer).__qualname__}"
    try:
        host = _host(observer, name)
    except errors.PluginError as error:
        raise errors.ArgsError(str(error)) from error
    if not _hooks(host):
        raise errors.ArgsError(f"{name}: {reprlib.repr(observer)} has no hook.{_HOW}")
    return host
