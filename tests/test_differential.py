"""ckptkit and Orbax are given the same, good and bad; what comes of it is equal, or a difference with a reason."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from differential import cases
from differential.comparisons import Comparison, OneArray, Restore, RestoreLeaves, Save
from differential.differences import DIFFERENCES, Difference
from differential.outcomes import Gap
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Orbax warns of much, and its threads outlive saves that it refuses
]


@pytest.fixture(autouse=True, scope="module")
def _collected() -> Iterator[None]:
    """What Orbax leaves unawaited is collected after the last test here, where its warnings are ignored, not in another file."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    logging.disable(logging.ERROR)
    yield tmp_path_factory.mktemp("differential")
    logging.disable(logging.NOTSET)


def _unlisted(found: Iterable[tuple[Gap, Any]]) -> list[Gap]:
    """The gaps that are not in the list of differences."""
    return [gap for gap, leaf in found if not any(each.covers(gap, leaf) for each in DIFFERENCES)]


@st.composite
def _saves(draw: Any) -> Save:
    handler, tree = draw(st.sampled_from(["Standard", "PyTree"])), draw(cases.saved_trees)
    options = {"use_ocdbt": draw(st.sampled_from([True, True, False]))}
    if handler == "PyTree":
        options["use_zarr3"] = draw(st.booleans())
    return Save(handler, tree, draw(cases.save_args_for(tree)), options)


@st.composite
def _restores(draw: Any) -> Restore:
    tree = draw(cases.good_trees)
    options = {
        "strict": draw(st.booleans()),
        "support_layout": draw(st.booleans()),
        "fallback_sharding": draw(st.sampled_from([None, cases.REPLICATED])),
    }
    return Restore(tree, draw(cases.targets_for(tree)), options)


@st.composite
def _restores_of_leaves(draw: Any) -> RestoreLeaves:
    tree = draw(cases.good_trees)
    item = draw(cases.items_for(tree))
    return RestoreLeaves(tree, item, draw(cases.restore_args_for(tree if item is None else item)), draw(st.booleans()))


@st.composite
def _arrays(draw: Any) -> OneArray:
    item = draw(st.one_of(cases.leaves, cases.odd_leaves))
    name = draw(st.sampled_from([None, "weights"]))
    return OneArray(item, draw(cases.save_args), name, draw(st.one_of(st.none(), cases.restore_arg(item))))


_DRAWN = [_saves, _restores, _restores_of_leaves, _arrays]


@pytest.mark.parametrize("drawn", _DRAWN)
def test_some_come_to_the_same(folder: Path, drawn: Callable[[], st.SearchStrategy[Comparison]]) -> None:
    _run(drawn, folder, 15)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("drawn", _DRAWN)
def test_many_come_to_the_same(folder: Path, drawn: Callable[[], st.SearchStrategy[Comparison]]) -> None:
    _run(drawn, folder, 150)


def _run(drawn: Callable[[], st.SearchStrategy[Comparison]], folder: Path, count: int) -> None:
    @given(comparison=drawn())
    @settings(max_examples=count, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    def examples(comparison: Comparison) -> None:
        assert _unlisted(comparison.gaps(folder)) == []

    examples()


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.reason[:60])
def test_every_difference_still_occurs(folder: Path, difference: Difference) -> None:
    found = list(difference.example.gaps(folder))
    assert any(difference.covers(gap, leaf) for gap, leaf in found), found
    assert _unlisted(found) == []
