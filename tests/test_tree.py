"""Trees as the rest sees them, where the classes of their nodes are odd."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import numpy as np
import pytest

import ckptkit
from ckptkit import errors, tree


class Untruthful(dict):
    """A mapping that says that it is empty."""

    def __bool__(self):
        return False


class Changing:
    """A node that has one leaf more the first time."""

    extra = 1


jax.tree_util.register_pytree_node(
    Untruthful, lambda node: (tuple(node.values()), tuple(node)), lambda keys, leaves: Untruthful(zip(keys, leaves, strict=True))
)


def _children(node):
    count, Changing.extra = 1 + Changing.extra, 0
    return ((0,) * count, None)


jax.tree_util.register_pytree_node(Changing, _children, lambda _, __: Changing())


def test_empty_nodes_are_leaves():
    leaves, structure = tree.flatten({"a": None, "b": {"c": 1, "d": {}}, "e": ()})
    assert (leaves, structure.names) == ([None, 1, {}, ()], ["a", "b.c", "b.d", "e"])
    assert structure.unflatten(leaves) == {"a": None, "b": {"c": 1, "d": {}}, "e": ()}


@pytest.mark.parametrize("root", [None, {}, 5, [()]])
def test_a_root_may_be_empty_or_a_leaf(root):
    leaves, structure = tree.flatten(root)
    assert structure.unflatten(leaves) == root


def test_a_node_that_says_that_it_is_empty_and_is_not_is_refused():
    with pytest.raises(errors.TreeError, match="says that it is empty and is not"):
        tree.flatten({"a": Untruthful(x=1, y=2), "b": None})


def test_a_node_that_changes_is_refused_and_what_was_seen_of_it_is_not_kept():
    Changing.extra = 1
    with pytest.raises(errors.TreeError, match="a node of it changes"):
        tree.flatten({"a": Changing()})
    leaves, structure = tree.flatten({"a": Changing()})
    assert (leaves, structure.names) == ([0], ["a.0"])


class Config:
    """Equal to every other of its name, whatever else it holds."""

    def __init__(self, name, rate):
        self.name = name
        self.rate = rate

    def __eq__(self, other):
        return self.name == other.name

    def __hash__(self):
        return hash(self.name)

    def __repr__(self):
        return self.name


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A node with a static field."""

    w: Any
    config: Config = dataclasses.field(metadata={"static": True})


@pytest.mark.parametrize("further", [{}, {"empty": {}}])
def test_static_fields_of_a_restored_tree_are_the_targets_not_those_of_an_equal_tree_before(tmp_path, further):
    ckptkit.save(tmp_path / "c", {"state": State(np.ones(3), Config("m", 0.1)), **further})
    target = {"state": State(np.zeros(3), Config("m", 0.2)), **further}
    restored = ckptkit.restore(tmp_path / "c", target)
    assert restored["state"].config is target["state"].config
    assert restored["state"].w.tolist() == [1, 1, 1]


def test_trees_of_equal_structure_share_their_names():
    first, second = [tree.flatten({"state": State(1, Config("m", rate)), "empty": {}})[1] for rate in (0.1, 0.2)]
    assert first.shared is second.shared


class Named(str, enum.Enum):  # noqa: UP042 - whose text would be its value
    """Equal to texts, of which they are not the names."""

    A = "a"


def test_keys_that_are_equal_to_texts_keep_their_own_names():
    names = [tree.flatten(item)[1].names for item in ({"x": [{"a": 1}]}, {"x": [{Named.A: 1}]}, {"x": [{"a": 1}]})]
    assert names == [["x.0.a"], ["x.0.Named.A"], ["x.0.a"]]
