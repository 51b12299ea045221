"""Trees as the rest sees them, where the classes of their nodes are odd."""

from __future__ import annotations

import jax
import pytest

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
