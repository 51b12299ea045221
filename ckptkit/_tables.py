"""The tables of the registry: who provides which key, and what happens when two want the same one.

A key is claimed by an owner; a second claim is a conflict unless it comes from the same source, executed again, or was
made with `override=True`. An overridden claim stays beneath, so that a broken plugin's claims can be withdrawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import attrs

from ckptkit import errors

__all__ = ["Claim", "Owner", "Table"]

V = TypeVar("V")
_numbers = itertools.count()


@attrs.frozen
class Owner:
    """Who made a registration.

    Attributes:
      module: the module that it was made by or for.
      distribution: the installed package that brought it, or None where it was made by hand.
      version: of the distribution.
      entry_point: its name in group `ckptkit`; None for what is built in.
    """

    module: str
    distribution: str | None = None
    version: str | None = None
    entry_point: str | None = None

    @property
    def is_builtin(self) -> bool:
        """Whether it belongs to ckptkit itself."""
        return self.distribution == "ckptkit" and self.entry_point is None

    @property
    def provider(self) -> str:
        """Distribution and version, as checkpoints record them; the module where there is no distribution."""
        return f"module {self.module}" if self.distribution is None else f"{self.distribution} {self.version}"

    def __str__(self) -> str:
        if self.distribution is None:
            return self.provider
        return f"{self.provider} ({'built in' if self.entry_point is None else f'entry point {self.entry_point!r}'})"


@attrs.frozen(eq=False)
class Claim(Generic[V]):
    """One registration.

    Attributes:
      value: what the key stands for.
      source: names the code that made the value: two claims of one source are the same thing executed twice.
      owner: who made it.
      override: whether it may cover another's claim.
      number: counts all claims ever made, in order.
    """

    value: V
    source: Hashable
    owner: Owner
    override: bool = False
    number: int = attrs.field(factory=lambda: next(_numbers))


class Table(Generic[V]):
    """Key -> claims, of which the last one counts. Not thread-safe: the registry holds a lock.

    Args:
      what: what a key is, in messages.
      way_out: what to do about a conflict, as a sentence.
    """

    def __init__(self, what: str, way_out: str) -> None:
        self.what = what
        self._way_out = way_out
        self._claims: dict[Hashable, list[Claim[V]]] = {}

    def __iter__(self) -> Iterator[Any]:
        return iter(self._claims)

    def get(self, key: Hashable) -> V | None:
        """What the key stands for, or None."""
        claim = self.claim(key)
        return None if claim is None else claim.value

    def claim(self, key: Hashable) -> Claim[V] | None:
        """The claim that counts, or None."""
        claims = self._claims.get(key)
        return claims[-1] if claims else None

    def plan(self, key: Hashable, new: Claim[V]) -> list[Claim[V]]:
        """The key's claims with the new one among them; nothing is changed yet.

        Raises:
          errors.ConflictError: somebody else holds the key.
        """
        held = self._claims.get(key, [])
        again = [claim.source == new.source for claim in held]
        if any(again) and (again[-1] or not new.override):
            return [_again(claim, new) if same else claim for claim, same in zip(held, again, strict=True)]
        if new.override or not held:
            return [*held, new]
        if new.owner.is_builtin and all(claim.override for claim in held):
            return [new, *held]  # an override made before the built-ins were loaded covers them all the same
        raise errors.ConflictError(
            f"{self.what} {key!r}: {held[-1].source} of {held[-1].owner} holds it, and {new.source} of {new.owner} "
            f"wants it too. {self._way_out}"
        )

    def put(self, key: Hashable, claims: list[Claim[V]]) -> None:
        """Sets what `plan` returned."""
        self._claims[key] = claims

    def adopt(self, owner: Owner, gets: Callable[[Claim[Any]], bool]) -> None:
        """Makes `owner` the owner of the claims chosen."""
        for claims in self._claims.values():
            claims[:] = [attrs.evolve(claim, owner=owner) if gets(claim) else claim for claim in claims]

    def withdraw(self, gone: Callable[[Claim[Any]], bool]) -> None:
        """Removes the claims chosen, uncovering what they had overridden."""
        kept = {key: [claim for claim in claims if not gone(claim)] for key, claims in self._claims.items()}
        self._claims = {key: claims for key, claims in kept.items() if claims}


def _again(old: Claim[V], new: Claim[V]) -> Claim[V]:
    """The claim of code that was executed again. It stays with its first owner: should a later one fail, it must not go."""
    return attrs.evolve(old, value=new.value, override=old.override or new.override)
