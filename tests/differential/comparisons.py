"""One and the same thing done with both libraries: what was asked for, and in what the outcomes differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orbax.checkpoint as ocp
from differential.cases import made
from differential.outcomes import Gap, Outcome, by_path, gaps, outcome
from hypothesis import currently_in_test_context, note

import ckptkit

Found = Iterator[tuple[Gap, Any]]
"""Gaps, each with the leaf that was asked for, or saved, at its place."""

_numbers = itertools.count()


class Comparison(Protocol):
    """Something that both libraries can be asked to do."""

    def gaps(self, folder: Path) -> Found:
        """In what the outcomes differ; files go into new directories of `folder`."""


def _handler(library: Any, name: str, **options: Any) -> Any:
    return library.Checkpointer(getattr(library, f"{name}CheckpointHandler")(**options))


def _save(library: Any, path: Path, name: str, tree: Any, save_args: Any = None, **options: Any) -> None:
    args = getattr(library.args, f"{name}Save")(tree, save_args=made(save_args, library))
    _handler(library, name, **options).save(path, args=args)


def _compared(ours: Outcome, theirs: Outcome, asked: Any) -> Found:
    if currently_in_test_context():
        note(f"ckptkit: {ours}\nOrbax: {theirs}")
    leaves = by_path(asked)
    for gap in gaps(ours, theirs):
        yield gap, leaves.get(gap.path)


def _both(call: Callable[[Any], Any]) -> tuple[Outcome, Outcome]:
    return outcome(lambda: call(ckptkit)), outcome(lambda: call(ocp))


class Save(NamedTuple):
    """A tree is saved by each library, and each of the checkpoints restored by each."""

    handler: str
    tree: Any
    save_args: Any = None
    options: Mapping[str, Any] = {}

    def gaps(self, folder: Path) -> Found:
        number = next(_numbers)
        paths = {library: folder / f"{number}-{library.__name__}" for library in (ckptkit, ocp)}
        both = _both(lambda library: _save(library, paths[library], self.handler, self.tree, self.save_args, **self.options))
        yield from _compared(*both, asked=self.tree)
        if all(each.error is None for each in both):
            for reader in (ckptkit, ocp):
                handler = _handler(reader, "PyTree")
                restored = [outcome(lambda path=path, handler=handler: handler.restore(path)) for path in paths.values()]
                yield from _compared(*restored, asked=self.tree)


class Restore(NamedTuple):
    """A tree that Orbax saved is restored into a target."""

    tree: Any
    target: Any
    options: Mapping[str, Any] = {}

    def gaps(self, folder: Path) -> Found:
        path = folder / str(next(_numbers))
        _save(ocp, path, "Standard", self.tree)

        def restored(library: Any) -> Any:
            return _handler(library, "Standard").restore(path, args=library.args.StandardRestore(self.target, **self.options))

        yield from _compared(*_both(restored), asked=self.target)


class RestoreLeaves(NamedTuple):
    """A tree that Orbax saved is restored leaf by leaf, as a tree of restore args says."""

    tree: Any
    item: Any
    restore_args: Any
    partial: bool = False

    def gaps(self, folder: Path) -> Found:
        path = folder / str(next(_numbers))
        _save(ocp, path, "PyTree", self.tree)

        def restored(library: Any) -> Any:
            args = library.args.PyTreeRestore(
                self.item, restore_args=made(self.restore_args, library), partial_restore=self.partial
            )
            return _handler(library, "PyTree").restore(path, args=args)

        yield from _compared(*_both(restored), asked=self.restore_args)


class OneArray(NamedTuple):
    """An array or number is saved by each library, and each of the checkpoints restored by each."""

    item: Any
    save_args: Any = None
    name: str | None = None
    restore_args: Any = None

    def gaps(self, folder: Path) -> Found:
        number = next(_numbers)

        def saved(library: Any) -> Path:
            path = folder / f"{number}-{library.__name__}"
            args = library.args.ArraySave(self.item, save_args=made(self.save_args, library))
            library.Checkpointer(library.ArrayCheckpointHandler(self.name)).save(path, args=args)
            return path

        ours, theirs = _both(saved)
        yield from _compared(ours._replace(value=None), theirs._replace(value=None), asked=self.item)
        for path in (ours.value, theirs.value) if ours.error is None and theirs.error is None else ():

            def restored(library: Any, path: Path = path) -> Any:
                args = library.args.ArrayRestore(restore_args=made(self.restore_args, library))
                return library.Checkpointer(library.ArrayCheckpointHandler(self.name)).restore(path, args=args)

            yield from _compared(*_both(restored), asked=None)
