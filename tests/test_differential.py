"""ckptkit and Orbax are given the same, good and bad; what comes of it is equal, or a difference with a reason."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest
from differential import cases
from differential.differences import DIFFERENCES
from differential.outcomes import Outcome, by_path, gaps, outcome
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import ckptkit

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Orbax warns of much, and its threads outlive saves that it refuses
]
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """What Orbax leaves unawaited is collected here, where its warnings are ignored, and not in the middle of another test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    logging.disable(logging.ERROR)
    yield tmp_path_factory.mktemp("differential")
    logging.disable(logging.NOTSET)


def _check(ours: Outcome, theirs: Outcome, asked: Any) -> None:
    """Every gap between the outcomes is in the list of differences."""
    note(f"ckptkit: {ours}\nOrbax: {theirs}")
    leaves = by_path(asked)
    found = list(gaps(ours, theirs))
    unlisted = [gap for gap in found if not any(each.covers(gap, leaves.get(gap.path)) for each in DIFFERENCES)]
    assert not unlisted, unlisted


def _handler(library: Any, name: str, **options: Any) -> Any:
    return library.Checkpointer(getattr(library, f"{name}CheckpointHandler")(**options))


def _saved(library: Any, path: Path, name: str, tree: Any, save_args: Any, **options: Any) -> Any:
    args = getattr(library.args, f"{name}Save")(tree, save_args=cases.made(save_args, library))
    _handler(library, name, **options).save(path, args=args)


_handlers = st.sampled_from(["Standard", "PyTree"])


def _saves_alike(folder: Path, data: st.DataObject) -> None:
    name, tree = data.draw(_handlers), data.draw(cases.saved_trees)
    save_args = data.draw(cases.save_args_for(tree))
    options = {"use_ocdbt": data.draw(st.sampled_from([True, True, False]))}
    if name == "PyTree":
        options["use_zarr3"] = data.draw(st.booleans())
    number = next(_numbers)
    paths = [folder / f"{number}-{library.__name__}" for library in (ckptkit, ocp)]
    both = [
        outcome(lambda library=library, path=path: _saved(library, path, name, tree, save_args, **options))
        for library, path in zip((ckptkit, ocp), paths, strict=True)
    ]
    _check(*both, asked=tree)
    if all(each.error is None for each in both):
        for library in (ckptkit, ocp):
            restored = [outcome(lambda path=path, library=library: _handler(library, "PyTree").restore(path)) for path in paths]
            _check(*restored, asked=tree)


def _restores_alike(folder: Path, data: st.DataObject) -> None:
    tree = data.draw(cases.good_trees)
    path = folder / str(next(_numbers))
    _saved(ocp, path, "Standard", tree, None)
    target = data.draw(cases.targets_for(tree))
    options = {
        "strict": data.draw(st.booleans()),
        "support_layout": data.draw(st.booleans()),
        "fallback_sharding": data.draw(st.sampled_from([None, cases.REPLICATED])),
    }

    def restored(library: Any) -> Any:
        return _handler(library, "Standard").restore(path, args=library.args.StandardRestore(target, **options))

    _check(outcome(lambda: restored(ckptkit)), outcome(lambda: restored(ocp)), asked=target)


def _restore_args_work_alike(folder: Path, data: st.DataObject) -> None:
    tree = data.draw(cases.good_trees)
    path = folder / str(next(_numbers))
    _saved(ocp, path, "PyTree", tree, None)
    item = data.draw(cases.items_for(tree))
    restore_args = data.draw(cases.restore_args_for(tree if item is None else item))
    partial = data.draw(st.booleans())

    def restored(library: Any) -> Any:
        args = library.args.PyTreeRestore(item, restore_args=cases.made(restore_args, library), partial_restore=partial)
        return _handler(library, "PyTree").restore(path, args=args)

    _check(outcome(lambda: restored(ckptkit)), outcome(lambda: restored(ocp)), asked=restore_args)


def _arrays_work_alike(folder: Path, data: st.DataObject) -> None:
    item = data.draw(st.one_of(cases.leaves, cases.odd_leaves))
    save_args = data.draw(cases.save_args)
    name = data.draw(st.sampled_from([None, "weights"]))
    restore_args = data.draw(st.one_of(st.none(), cases.restore_arg(item)))
    number = next(_numbers)

    def saved(library: Any) -> Path:
        path = folder / f"{number}-{library.__name__}"
        handler = library.ArrayCheckpointHandler(name)
        args = library.args.ArraySave(item, save_args=cases.made(save_args, library))
        library.Checkpointer(handler).save(path, args=args)
        return path

    def restored(library: Any, path: Path) -> Any:
        args = library.args.ArrayRestore(restore_args=cases.made(restore_args, library))
        return library.Checkpointer(library.ArrayCheckpointHandler(name)).restore(path, args=args)

    ours, theirs = outcome(lambda: saved(ckptkit)), outcome(lambda: saved(ocp))
    _check(ours._replace(value=None), theirs._replace(value=None), asked=item)
    if ours.error is None and theirs.error is None:
        for path in (ours.value, theirs.value):
            _check(outcome(lambda path=path: restored(ckptkit, path)), outcome(lambda path=path: restored(ocp, path)), None)


_CHECKS = [_saves_alike, _restores_alike, _restore_args_work_alike, _arrays_work_alike]


@pytest.mark.parametrize("check", _CHECKS)
def test_some_come_to_the_same(folder: Path, check: Callable[[Path, st.DataObject], None]) -> None:
    _run(check, folder, 25)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("check", _CHECKS)
def test_many_come_to_the_same(folder: Path, check: Callable[[Path, st.DataObject], None]) -> None:
    _run(check, folder, 150)


def _run(check: Callable[[Path, st.DataObject], None], folder: Path, count: int) -> None:
    @given(data=st.data())
    @settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    def examples(data: st.DataObject) -> None:
        check(folder, data)

    examples()
