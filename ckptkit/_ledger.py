"""Who registered what: the tables of a registry, changed together, every entry with its owner.

So a conflict names both sides, a checkpoint can say who is needed to read it, and what a broken plugin registered can be undone.
What the entries are and how they are found is the registry's affair.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs

from ckptkit._names import in_package, top_package
from ckptkit._tables import Claim, Owner, Table

if TYPE_CHECKING:
    import pluggy

__all__ = ["Ledger", "Plugin", "PluginFailure", "Registration", "Wish", "owned_by"]

_registrant: ContextVar[Owner | None] = ContextVar("ckptkit_registrant", default=None)


@attrs.frozen(eq=False)
class Plugin:
    """A loaded plugin.

    Attributes:
      owner: who brought it.
      plugin: the module or object with its hooks.
      host: calls them.
    """

    owner: Owner
    plugin: object
    host: pluggy.PluginManager = attrs.field(repr=False)


@attrs.frozen(eq=False)
class PluginFailure:
    """A plugin that could not be loaded, and why; nothing of it is registered."""

    owner: Owner
    error: BaseException

    def __str__(self) -> str:
        return f"plugin {self.owner} failed to load: {type(self.error).__name__}: {self.error}"


class Registration(NamedTuple):
    """What a key of the registry stands for.

    Attributes:
      what: what the key is, in words, such as 'storage backend'.
      key: a name, or the class itself where it has none that lasts.
      value: the handler class, type handler, backend or factory.
      owner: who registered it.
    """

    what: str
    key: Hashable
    value: Any
    owner: Owner


class Wish(NamedTuple):
    """A claim to be made: of a key of a table, for a value."""

    table: Table[Any]
    key: Hashable
    value: Any
    override: bool = False


@contextlib.contextmanager
def owned_by(owner: Owner) -> Iterator[None]:
    """What is registered inside belongs to `owner` instead of the module that defines it."""
    token = _registrant.set(owner)
    try:
        yield
    finally:
        _registrant.reset(token)


class Ledger:
    """The tables of one registry. Thread-safe.

    Args:
      tables: whose claims are made and withdrawn here, and nowhere else.

    Attributes:
      lock: to be held while a table is looked into.
      concluded: for what a lookup would not work out again; emptied when a claim is made or withdrawn.
    """

    def __init__(self, tables: Sequence[Table[Any]]) -> None:
        self.lock = threading.RLock()
        self.concluded: dict[Any, Any] = {}
        self._tables = tables

    def record(self, wishes: Sequence[Wish], source: Hashable, module: str) -> None:
        """Makes all of the claims, or none.

        Args:
          wishes: the claims.
          source: names the code that made the values.
          module: owns them unless `owned_by` says who does.

        Raises:
          errors.ConflictError: somebody else holds one of the keys.
        """
        owner = _registrant.get() or Owner(module)
        with self.lock:
            plans = [wish.table.plan(wish.key, Claim(wish.value, source, owner, wish.override)) for wish in wishes]
            for wish, claims in zip(wishes, plans, strict=True):
                wish.table.put(wish.key, claims)
            self.concluded = {}

    @contextlib.contextmanager
    def loading(self, owner: Owner) -> Iterator[None]:
        """A plugin is being loaded: what its package registers while imported is the owner's too; all is undone on an error."""
        mark = Claim(None, None, owner).number

        def imported(claim: Claim[Any], package: str) -> bool:
            return claim.owner.distribution is None and in_package(claim.owner.module, package)

        try:
            yield
        except BaseException:
            package = top_package(owner.module)
            self._withdraw(lambda claim: claim.owner == owner or (claim.number > mark and imported(claim, package)))
            raise
        package = top_package(owner.module)
        with self.lock:
            for table in self._tables:
                table.adopt(owner, lambda claim: imported(claim, package))

    def claims(self) -> list[tuple[str, Hashable, Claim[Any]]]:
        """Every claim that counts, with what its key is, in words, and the key; in the order of the tables."""
        with self.lock:
            found = [(table.what, key, table.claim(key)) for table in self._tables for key in table]
        return [(what, key, claim) for what, key, claim in found if claim is not None]

    def _withdraw(self, gone: Callable[[Claim[Any]], bool]) -> None:
        with self.lock:
            for table in self._tables:
                table.withdraw(gone)
            self.concluded = {}
