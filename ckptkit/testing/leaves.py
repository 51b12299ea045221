"""The conformance suite of type handlers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit.args import PyTreeRestore
from ckptkit.leaves import Kinds, Leaf, LeafSpec, Problem, SaveArgs, TypeHandler
from ckptkit.options import RestoreDefaults
from ckptkit.registry import Registry
from ckptkit.storage import Index, Job, Location, chunk_indices
from ckptkit.testing import _backends as by_hand
from ckptkit.testing import _checkpoints as checkpoints
from ckptkit.testing import strategies
from ckptkit.testing._promises import drawn, missing_fixture, promise
from ckptkit.testing.comparison import assert_same

__all__ = ["TypeHandlerTests"]

_HANDLER = "ckptkit.leaves.TypeHandler"


class TypeHandlerTests:
    """What every type handler promises.

    Override the fixtures `handler` and `make_leaf`, and the attribute `leaf_types`; the methods below where the defaults do not
    suit.

    Attributes:
      leaf_types: which leaves the handler takes, as `Registry.add_type_handler` is told.
      many: leaves that must not take out of proportion longer than a tenth as many.
    """

    leaf_types: ClassVar[Any] = None
    many: ClassVar[int] = 10_000

    @pytest.fixture
    def handler(self) -> TypeHandler[Any]:
        return missing_fixture(self, "handler", "the TypeHandler under test")  # type: ignore[no-any-return]  # it raises

    @pytest.fixture
    def make_leaf(self) -> Callable[[int], Any]:
        """Makes a leaf from a seed: the same for the same seed, another for another, of every kind that the handler takes."""
        return missing_fixture(self, "make_leaf", "a function: seed -> leaf")  # type: ignore[no-any-return]  # it raises

    def assert_same(self, found: Any, expected: Any) -> None:
        """Fails where a restored tree differs from what was saved; by default leaves other than arrays are compared by `==`."""
        assert_same(found, expected)

    def spoil(self, leaf: Any) -> None:
        """Changes a leaf in place, as a training step would after the save; override it where that can be done."""
        pytest.skip("leaves of this kind cannot be changed: override `spoil` where they can")

    def targets(self, leaf: Any) -> Sequence[tuple[Any, Any]]:
        """Leaves of a target tree, and what restoring the leaf into each gives: the leaf itself unless overridden."""
        return [(leaf, leaf)]

    @pytest.fixture
    def with_handler(self, registry: Registry, handler: TypeHandler[Any]) -> Registry:
        """A registry with what comes with ckptkit and the handler under test."""
        if self.leaf_types is None:
            pytest.fail(f"{type(self).__name__} must set leaf_types, as Registry.add_type_handler takes them")
        registry.add_type_handler(handler, self.leaf_types, override=True)
        return registry

    # What is said of leaves

    @promise("The handler takes its leaf types, and is found by its type string.", "ckptkit.Registry.add_type_handler")
    def test_is_registered_for_its_leaves(
        self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any], with_handler: Registry
    ) -> None:
        assert with_handler.type_handler_for(type(make_leaf(0))) is handler
        assert with_handler.type_handler_named(handler.typestr) is handler

    @promise(
        "describe() gives a LeafSpec for each leaf: its array has the leaf's name, the rest is JSON.", f"{_HANDLER}.describe"
    )
    def test_describes_each_leaf(self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any]) -> None:
        leaves = _leaves(make_leaf, 20)
        specs = handler.describe(leaves)
        assert len(specs) == len(leaves)
        for leaf, spec in zip(leaves, specs, strict=True):
            assert isinstance(spec, LeafSpec), f"{leaf.value!r} was refused: {spec}"
            assert _as_json([spec.inline, spec.sharding, spec.extra]) == [spec.inline, spec.sharding, spec.extra]
            if spec.array is not None:
                assert spec.array.name == leaf.name
                assert len(spec.array.chunk_shape) == len(spec.array.shape)
                assert all(n >= 1 for n in spec.array.chunk_shape), f"chunks of {spec.array.chunk_shape}"
                assert isinstance(spec.array.dtype, np.dtype)

    @promise("A batch is described leaf by leaf: neighbours and earlier calls do not matter.", _HANDLER)
    def test_leaves_of_a_batch_do_not_mix(self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any]) -> None:
        leaves = _leaves(make_leaf, 10)
        alone = [handler.describe([leaf])[0] for leaf in leaves]
        assert list(handler.describe(leaves)) == alone
        assert list(handler.describe(leaves[::-1])) == alone[::-1]

    @promise("Leaves of one kind are described alike, since the first of them speaks for all.", f"{_HANDLER}.kinds")
    @given(data=st.data())
    @drawn
    def test_leaves_of_one_kind_have_equal_specs(
        self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any], data: st.DataObject
    ) -> None:
        leaves = [make_leaf(data.draw(st.integers(0, 200))) for _ in range(4)]
        kinds = handler.kinds(leaves)
        if kinds is None:
            return
        hash(kinds)
        assert len(kinds.numbers) == len(leaves)
        assert list(dict.fromkeys(kinds.numbers)) == list(range(len(kinds.keys)))
        assert [handler.kinds([leaf]) for leaf in leaves] == [Kinds((0,), (kinds.keys[number],)) for number in kinds.numbers]
        specs = [handler.describe([Leaf(("a",), "a", leaf, None)])[0] for leaf in leaves]
        firsts = [specs[kinds.numbers.index(number)] for number in kinds.numbers]
        assert specs == firsts, f"{leaves!r} have the kinds {kinds!r}"

    @promise("A single process writes every cell of the grid, each once.", f"{_HANDLER}.owned")
    def test_every_cell_is_owned_once(self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any]) -> None:
        leaves = _leaves(make_leaf, 20)
        specs = _described(handler, leaves)
        owned = handler.owned(leaves, specs, Job())
        assert len(owned) == len(leaves)
        for spec, cells in zip(specs, owned, strict=True):
            expected = [] if spec.array is None else sorted(chunk_indices(spec.array))
            assert sorted(cells) == expected, spec

    @promise("Of several processes one writes each cell, or a Problem says why they cannot.", f"{_HANDLER}.owned")
    def test_processes_share_the_cells(self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any]) -> None:
        leaves = _leaves(make_leaf, 20)
        specs = _described(handler, leaves)
        first, second = [handler.owned(leaves, specs, Job(process, (0, 1))) for process in (0, 1)]
        assert len(first) == len(second) == len(leaves)
        for spec, mine, theirs in zip(specs, first, second, strict=True):
            if isinstance(mine, Problem) or isinstance(theirs, Problem):  # such as one that lies on devices of this process
                continue
            expected = [] if spec.array is None else sorted(chunk_indices(spec.array))
            assert sorted([*mine, *theirs]) == expected, f"{spec}: process 0 writes {mine}, process 1 {theirs}"

    @promise("stage() gives a C-contiguous array of the spec's dtype for each cell, of the cell's shape.", f"{_HANDLER}.stage")
    def test_stages_what_it_described(self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any]) -> None:
        pieces = _pieces(handler, _leaves(make_leaf, 20))
        staged = handler.stage(pieces)
        assert len(staged) == len(pieces)
        assert len(handler.staged_nbytes(pieces)) == len(pieces)
        for (_, spec, cell), data in zip(pieces, staged, strict=True):
            assert spec.array is not None
            assert (data.dtype, data.shape) == (spec.array.dtype, tuple(stop - start for start, stop in cell))
            assert data.flags.c_contiguous

    # There and back

    @promise("What was staged is assembled again: the same leaves, in the same order.", f"{_HANDLER}.assemble")
    def test_assembles_what_it_staged(self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any]) -> None:
        leaves = _leaves(make_leaf, 20)
        self.assert_same(_there_and_back(handler, leaves), [leaf.value for leaf in leaves])

    @promise("Trees come back, with a target and without, whatever their shape.", _HANDLER)
    @given(data=st.data())
    @drawn
    def test_trees_come_back(
        self,
        make_leaf: Callable[[int], Any],
        new_location: Callable[[], Location],
        with_handler: Registry,
        data: st.DataObject,
    ) -> None:
        tree = data.draw(strategies.trees(st.integers(0, 999).map(make_leaf)))
        self.assert_same(checkpoints.saved(tree, with_handler, new_location()).restore(tree), tree)
        flat = {str(seed): make_leaf(seed) for seed in data.draw(st.sets(st.integers(0, 999), min_size=1, max_size=3))}
        self.assert_same(checkpoints.saved(flat, with_handler, new_location()).restore(), flat)

    @promise("A leaf comes back as what its target asks for.", f"{_HANDLER}.request")
    def test_targets_are_honoured(
        self, make_leaf: Callable[[int], Any], new_location: Callable[[], Location], with_handler: Registry
    ) -> None:
        for seed in range(5):
            leaf = make_leaf(seed)
            checkpoint = checkpoints.saved({"leaf": leaf}, with_handler, new_location())
            for target, expected in self.targets(leaf):
                self.assert_same(checkpoint.restore({"leaf": target}), {"leaf": expected})

    @promise("A leaf may be cut into small chunks: what SaveArgs ask for loses nothing.", f"{_HANDLER}.describe")
    def test_small_chunks_come_back(self, make_leaf: Callable[[int], Any], location: Location, with_handler: Registry) -> None:
        tree = {str(seed): make_leaf(seed) for seed in range(10)}
        small = dict.fromkeys(tree, SaveArgs(chunk_byte_size=16))
        self.assert_same(checkpoints.saved(tree, with_handler, location, save_args=small).restore(), tree)

    @promise("Some leaves of a tree can be restored without the others.", f"{_HANDLER}.needs")
    def test_partial_restore(self, make_leaf: Callable[[int], Any], location: Location, with_handler: Registry) -> None:
        tree = {str(seed): make_leaf(seed) for seed in range(4)}
        target = PyTreeRestore({**dict.fromkeys(tree, ...), "2": tree["2"]})
        found = checkpoints.saved(tree, with_handler, location).restore(target)
        self.assert_same(found["2"], tree["2"])

    @promise("What was staged is safe from what the caller does to the leaf.", f"{_HANDLER}.stage")
    def test_staged_data_is_safe(self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any]) -> None:
        leaves, twins = _leaves(make_leaf, 20), _leaves(make_leaf, 20)
        specs = _described(handler, leaves)
        pieces = _pieces(handler, leaves)
        staged = handler.stage(pieces)
        for leaf in leaves:
            self.spoil(leaf.value)
        self.assert_same(_assembled(handler, specs, pieces, staged), [twin.value for twin in twins])

    @promise("A wrong byte is an error, never a wrong value.", "docs/architecture.md, What is verified")
    def test_damage_is_an_error(self, make_leaf: Callable[[int], Any], location: Location, with_handler: Registry) -> None:
        tree = {str(seed): make_leaf(seed) for seed in range(3)}
        checkpoint = checkpoints.saved(tree, with_handler, location)
        checkpoint.survives(checkpoints.damages, lambda found: self.assert_same(found, tree))

    @promise("A save that was given up leaves nothing running, and the next one is whole.", _HANDLER)
    def test_a_cancelled_save(
        self, make_leaf: Callable[[int], Any], new_location: Callable[[], Location], with_handler: Registry
    ) -> None:
        tree = {str(seed): make_leaf(seed) for seed in range(50)}
        checkpoints.cancelled(tree, with_handler, new_location())
        self.assert_same(checkpoints.saved(tree, with_handler, new_location()).restore(), tree)

    @promise("One handler serves many saves and restores at once.", _HANDLER)
    def test_concurrent_saves(
        self, make_leaf: Callable[[int], Any], new_location: Callable[[], Location], with_handler: Registry
    ) -> None:
        trees = [{str(seed): make_leaf(seed + 10 * number) for seed in range(10)} for number in range(4)]
        places = [new_location() for _ in trees]

        def there_and_back(number: int) -> Any:
            return checkpoints.saved(trees[number], with_handler, places[number]).restore()

        for found, tree in zip(checkpoints.together(there_and_back, len(trees)), trees, strict=True):
            self.assert_same(found, tree)

    @promise("A fresh process restores what was saved: the handler is found by entry point.", "docs/extending.md, A package")
    def test_a_fresh_process_restores(self, make_leaf: Callable[[int], Any], location: Location, with_handler: Registry) -> None:
        tree = {str(seed): make_leaf(seed) for seed in range(5)}
        checkpoint = checkpoints.saved(tree, with_handler, location)
        checkpoint.copied_by_fresh_process()
        self.assert_same(checkpoint.sibling("copy").restore(), tree)

    @promise("Ten times the leaves take about ten times as long.", "docs/architecture.md, Contracts")
    def test_many_leaves_in_proportion(self, handler: TypeHandler[Any], make_leaf: Callable[[int], Any]) -> None:
        few, many = _leaves(make_leaf, self.many // 10), _leaves(make_leaf, self.many)
        checkpoints.in_proportion(lambda leaves: _there_and_back(handler, leaves), few, many)


def _leaves(make_leaf: Callable[[int], Any], count: int) -> list[Leaf]:
    return [Leaf(("layer", str(i)), f"layer.{i}", make_leaf(i % 100), None) for i in range(count)]


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _described(handler: TypeHandler[Any], leaves: Sequence[Leaf]) -> Sequence[LeafSpec]:
    return handler.describe(leaves)  # type: ignore[return-value]  # make_leaf makes none that would be a Problem


def _pieces(handler: TypeHandler[Any], leaves: Sequence[Leaf]) -> list[tuple[Any, LeafSpec, Index]]:
    specs = _described(handler, leaves)
    owned = handler.owned(leaves, specs, Job())
    each = [(leaf.value, spec, cells) for leaf, spec, cells in zip(leaves, specs, owned, strict=True)]
    return [(value, spec, cell) for value, spec, cells in each if not isinstance(cells, Problem) for cell in cells]


def _there_and_back(handler: TypeHandler[Any], leaves: Sequence[Leaf]) -> list[Any]:
    pieces = _pieces(handler, leaves)
    return _assembled(handler, _described(handler, leaves), pieces, handler.stage(pieces))


def _assembled(
    handler: TypeHandler[Any],
    specs: Sequence[LeafSpec],
    pieces: Sequence[tuple[Any, LeafSpec, Index]],
    staged: Sequence[Any],
) -> list[Any]:
    """The leaves as a restore without a target makes them."""
    stored = {spec.array.name: np.empty(spec.array.shape, spec.array.dtype) for spec in specs if spec.array is not None}
    for (_, spec, cell), data in zip(pieces, staged, strict=True):
        assert spec.array is not None
        stored[spec.array.name][tuple(slice(*bounds) for bounds in cell)] = data
    requests = [handler.request(None, spec, _DEFAULTS) for spec in specs]
    parts: list[dict[Index, Any]] = []
    for spec, needs in zip(specs, handler.needs(specs, requests, Job()), strict=True):
        assert not isinstance(needs, Problem), f"{spec} cannot be restored: {needs}"
        parts.append({need: by_hand.cell(stored[spec.array.name], need) for need in needs} if spec.array else {})
    return list(handler.assemble(specs, requests, parts))


_DEFAULTS = RestoreDefaults()
