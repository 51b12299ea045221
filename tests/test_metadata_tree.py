"""`_METADATA`: the same document as Orbax's, and the tree that it describes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.metadata.pytree_metadata_options import PyTreeMetadataOptions
from orbax.checkpoint._src.metadata.tree import InternalTreeMetadata

from ckptkit import errors
from ckptkit.metadata.tree import (
    DICT,
    SEQUENCE,
    TREE_FILE,
    Entry,
    Key,
    TreeDocument,
    decode_tree,
    encode_tree,
    is_empty_node,
    key_of,
    nest,
)

Pair = collections.namedtuple("Pair", ["first", "second"])  # noqa: PYI024 - as optax's states are to jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weights: object
    bias: object


class Unkeyed:
    """A node that tells jax its children without keys."""

    def __init__(self, *children):
        self.children = children


jax.tree_util.register_pytree_node(Unkeyed, lambda node: (node.children, None), lambda _, children: Unkeyed(*children))


def is_leaf(node):
    return node is None or not jax.tree.leaves(node, is_leaf=lambda inner: inner is not node)


def entries_of(tree):
    """Entries for the leaves and empty nodes of a tree of numpy arrays and numbers."""
    words = {type(None): "None", dict: "Dict", list: "List", tuple: "Tuple", np.ndarray: "np.ndarray", jax.Array: "jax.Array"}
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        word = "None" if isinstance(leaf, optax.MaskedNode) else words.get(type(leaf), "scalar")
        found.append(Entry(tuple(key_of(key) for key in path), word, skip=word in ("None", "Dict", "List", "Tuple")))
    return found


TREE = {
    "dict": {"b": np.ones(3), "a": 1},
    "list": [1, 2.5, True, *range(12)],
    "tuple": (np.ones(1), (2,)),
    "pair": Pair(np.zeros(2), None),
    "layer": Layer(np.ones(1), {}),
    "unkeyed": Unkeyed(np.ones(2), {"x": 3}),
    "empty": {"none": None, "dict": {}, "list": [], "tuple": (), "inner": {"z": ()}},
    "ints": {3: 1, 20: 2},
    "masked": optax.MaskedNode(),
    "a/b": {"ü'": 1, "": 2, "..": 3},
}


@pytest.fixture(scope="module")
def orbax_files(tmp_path_factory):
    """Checkpoints that Orbax wrote, by the name of their case."""
    root = tmp_path_factory.mktemp("orbax")
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharded = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, PartitionSpec("x", "y")))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(root / "tree", TREE)
        checkpointer.save(root / "arrays", {"one": jnp.ones((2, 3)), "many": sharded, "key": jax.random.key(0)})
        checkpointer.save(root / "list", [1, 2])
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(root / "leaf", np.ones(2))
        checkpointer.save(root / "strings", {"a": "x", "b": ["y"]})
    rich = PyTreeMetadataOptions(support_rich_types=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(pytree_metadata_options=rich)) as checkpointer:
        checkpointer.save(root / "rich", {"t": (1, ()), "p": Pair(1, 2)})
    return root


def read(root, case):
    return decode_tree((root / case / TREE_FILE).read_bytes(), TREE_FILE)


@pytest.mark.parametrize("case", ["tree", "arrays", "list", "leaf", "strings", "rich"])
def test_what_is_read_and_written_again_is_orbax_document(orbax_files, case):
    data = (orbax_files / case / TREE_FILE).read_bytes()
    assert json.loads(encode_tree(decode_tree(data, TREE_FILE))) == json.loads(data)


def test_the_document_of_a_tree_is_the_one_that_orbax_writes_in_its_order(orbax_files):
    data = (orbax_files / "tree" / TREE_FILE).read_bytes()
    ours = json.loads(encode_tree(TreeDocument(entries=entries_of(TREE))))
    assert ours == json.loads(data)
    assert list(ours["tree_metadata"]) == list(json.loads(data)["tree_metadata"])


def test_arrays_carry_their_write_shape(orbax_files):
    found = {entry.name: (entry.value_type, entry.write_shape) for entry in read(orbax_files, "arrays").entries}
    assert found == {"key": ("jax.Array", (2,)), "many": ("jax.Array", (2, 4)), "one": ("jax.Array", (2, 3))}


@pytest.mark.parametrize("case", ["tree", "list", "leaf", "strings", "rich"])
def test_the_tree_is_the_one_that_orbax_restores_without_a_target(orbax_files, case):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        expected = checkpointer.restore(orbax_files / case)
    entries = read(orbax_files, case).entries
    leaves = {
        tuple(key_of(key) for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(expected, is_leaf=is_leaf)[0]
    }
    tree = nest(entries, [leaves[entry.keys] for entry in entries])
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_orbax_restores_a_checkpoint_whose_document_is_ours(orbax_files, tmp_path):
    shutil.copytree(orbax_files / "tree", tmp_path / "c")
    with ocp.StandardCheckpointer() as checkpointer:
        expected = checkpointer.restore(tmp_path / "c")
        backwards = read(orbax_files, "tree").entries[::-1]
        (tmp_path / "c" / TREE_FILE).write_bytes(encode_tree(TreeDocument(entries=backwards)))
        jax.tree.map(np.testing.assert_array_equal, checkpointer.restore(tmp_path / "c"), expected)


def test_orbax_reads_every_field():
    document = TreeDocument(entries=entries_of(TREE), use_ocdbt=False, use_zarr3=True, custom_metadata={"n": 2**70})
    internal = InternalTreeMetadata.from_json(json.loads(encode_tree(document)))
    assert (internal.use_ocdbt, internal.use_zarr3, internal.custom_metadata) == (False, True, {"n": 2**70})


def test_names_are_keys_joined_with_a_dot(orbax_files):
    names = {entry.name for entry in read(orbax_files, "tree").entries}
    assert {"list.14", "ints.20", "a/b.ü'", "a/b.", "pair.first", "unkeyed.1.x"} <= names
    assert read(orbax_files, "leaf").entries[0].name == ""


def test_rich_types_are_kept_unread(orbax_files):
    assert json.loads(read(orbax_files, "rich").value_metadata_tree)["t"]["clazz"] == "tuple"


keys = st.builds(Key, st.text(max_size=4), st.sampled_from([DICT, SEQUENCE]))
entries = st.builds(
    Entry,
    st.lists(keys, max_size=4).map(tuple),
    st.sampled_from(["jax.Array", "np.ndarray", "scalar", "string", "Dict", "NamedTuple", "of tomorrow"]),
    st.booleans(),
    st.none() | st.lists(st.integers(0, 2**63), max_size=3).map(tuple),
)
documents = st.builds(
    TreeDocument,
    entries=st.lists(entries, unique_by=lambda entry: tuple(key.name for key in entry.keys)),
    use_ocdbt=st.none() | st.booleans(),
    use_zarr3=st.booleans(),
    store_array_data_equal_to_fill_value=st.booleans(),
    custom_metadata=st.none() | st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False)),
    value_metadata_tree=st.none() | st.text(),
)


@given(documents)
def test_a_round_trip(document):
    assert decode_tree(encode_tree(document), TREE_FILE) == document


def test_custom_metadata_of_numbers_that_json_lacks():
    for custom in ([math.inf], {"a": [{"b": -(2**64)}]}, [1e300, 2**64], 2**63, -(2**63) - 1):
        assert decode_tree(encode_tree(TreeDocument(entries=[], custom_metadata=custom)), TREE_FILE).custom_metadata == custom


def test_absent_fields_mean_what_older_writers_meant():
    document = decode_tree(b'{"tree_metadata": {}}', TREE_FILE)
    assert document == TreeDocument(entries=[], use_ocdbt=None, use_zarr3=False, store_array_data_equal_to_fill_value=False)


def test_leaves_of_the_same_keys_are_refused():
    with pytest.raises(errors.TreeError, match="1 leaves have the same keys"):
        encode_tree(TreeDocument(entries=[Entry((Key("1", DICT),), "scalar"), Entry((Key("1", SEQUENCE),), "scalar")]))


def test_a_key_that_utf8_cannot_hold_is_refused():
    with pytest.raises(errors.TreeError, match=r"\\ud800"):
        encode_tree(TreeDocument(entries=[Entry((Key("\ud800", DICT),), "scalar")]))


def test_an_unknown_kind_of_key_is_refused():
    with pytest.raises(errors.TreeError, match="a str; expected one of"):
        key_of("a")


def document_with(**changes):
    """A document of one entry, changed where said."""
    value = {"value_type": "scalar", "skip_deserialize": False} | changes.pop("value", {})
    entry = {"key_metadata": [{"key": "a", "key_type": 2}], "value_metadata": value} | changes.pop("entry", {})
    return json.dumps({"tree_metadata": {"('a',)": entry}} | changes).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"{}",
        b'{"tree_metadata": []}',
        b'{"tree_metadata": {"a": null}}',
        b'{"tree_metadata": {"a": [1]}}',
        document_with(entry={"key_metadata": None}),
        document_with(entry={"key_metadata": 3}),
        document_with(entry={"key_metadata": "keys"}),
        document_with(entry={"key_metadata": [1]}),
        document_with(entry={"key_metadata": [{"key": "a"}]}),
        document_with(entry={"key_metadata": [{"key": 1, "key_type": 2}]}),
        document_with(entry={"key_metadata": [{"key": ["a"], "key_type": 2}]}),
        document_with(entry={"key_metadata": [{"key": "a", "key_type": 3}]}),
        document_with(entry={"key_metadata": [{"key": "a", "key_type": True}]}),
        document_with(entry={"key_metadata": [{"key": "a", "key_type": "2"}]}),
        document_with(entry={"key_metadata": [{"key": "\ud800", "key_type": 2}]}),
        document_with(entry={"value_metadata": []}),
        document_with(entry={"value_metadata": {}}),
        document_with(value={"value_type": None}),
        document_with(value={"skip_deserialize": 0}),
        document_with(value={"write_shape": [2, "3"]}),
        document_with(value={"write_shape": -1}),
        document_with(use_ocdbt=1),
        document_with(use_zarr3="no"),
        document_with(store_array_data_equal_to_fill_value=None),
        document_with(value_metadata_tree={}),
        document_with()[:-1],
    ],
)
def test_a_malformed_document_is_a_format_error(data):
    with pytest.raises(errors.FormatError, match=r"^dir/_METADATA: .*restore another checkpoint"):
        decode_tree(data, "dir/_METADATA")


hostile = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.floats() | st.sampled_from(["a", "0", "Dict", "key", "jax.Array"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["key", "key_type", "value_type", "skip_deserialize", "write_shape"]), inner, max_size=4
        )
        | st.fixed_dictionaries({"key_metadata": inner, "value_metadata": inner})
        | st.fixed_dictionaries({"key": inner, "key_type": inner})
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["a", "b"]), hostile), hostile)
def test_any_document_is_valid_or_a_format_error(tree, other):
    data = json.dumps({"tree_metadata": tree, "use_ocdbt": other, "value_metadata_tree": other}).encode()
    try:
        document = decode_tree(data, TREE_FILE)
    except errors.FormatError:
        return
    assert all(isinstance(entry, Entry) for entry in document.entries)


def entry(*names, kind="scalar"):
    """An entry whose keys are positions where they are ints."""
    return Entry(tuple(Key(str(n), SEQUENCE if isinstance(n, int) else DICT) for n in names), kind)


def test_leaves_go_to_their_places_in_any_order():
    order = [entry("l", 2, "x"), entry("d"), entry("l", 0), entry("l", 1, 0)]
    assert nest(order, [1, 2, 3, 4]) == {"l": [3, [4], {"x": 1}], "d": 2}


def test_empty_nodes_are_themselves_whatever_their_value():
    kinds = ["None", "Dict", "List", "Tuple", "NamedTuple"]
    tree = nest([entry(kind, kind=kind) for kind in kinds], ["ignored"] * 5)
    assert tree == {"None": None, "Dict": {}, "List": [], "Tuple": (), "NamedTuple": None}
    assert [is_empty_node(entry(kind=kind)) for kind in [*kinds, "Unknown", "scalar"]] == [True] * 5 + [False] * 2


def test_empty_nodes_are_not_shared():
    tree = nest([entry("a", kind="Dict"), entry("b", kind="Dict")], [None, None])
    assert tree["a"] is not tree["b"]


@pytest.mark.parametrize("backwards", [False, True])
def test_an_empty_node_gives_way_to_leaves_below_it(backwards):
    found = [entry("a", kind="Dict"), entry("a", "b")]
    assert nest(found[::-1] if backwards else found, [1, 1]) == {"a": {"b": 1}}


def test_one_entry_without_keys_is_the_tree():
    leaf = object()
    assert nest([entry()], [leaf]) is leaf


@pytest.mark.parametrize(
    "found",
    [
        [],
        [entry(), entry("a")],
        [entry("a"), entry("a")],
        [entry("a", kind="Dict"), entry("a")],
        [entry("a"), entry("a", "b")],
        [entry("a", "b"), entry("a")],
        [entry("a", "b"), entry("a", 0)],
        [entry(1), entry(2)],
        [entry(0), entry(2)],
        [entry(-1)],
        [Entry((Key("00", SEQUENCE),), "scalar")],
        [Entry((Key("\u0660", SEQUENCE),), "scalar")],
        [Entry((Key("x", SEQUENCE),), "scalar")],
        [Entry((Key("9" * 5_000, SEQUENCE),), "scalar")],
        [entry(*["a"] * 901)],
    ],
)
def test_entries_that_describe_no_tree_are_a_format_error(found):
    with pytest.raises(errors.FormatError, match=r"^file: .*restore another checkpoint"):
        nest(found, [0] * len(found), "file")


def test_a_deep_tree_is_built_and_jax_can_flatten_it():
    assert jax.tree.leaves(nest([entry(*["a"] * 900)], [7])) == [7]


@given(st.lists(st.builds(Entry, st.lists(keys, max_size=3).map(tuple), st.sampled_from(["scalar", "Dict"])), max_size=5))
def test_any_entries_are_a_tree_or_a_format_error(found):
    with contextlib.suppress(errors.FormatError):
        nest(found, range(len(found)))


plain_trees = st.recursive(
    st.integers(0, 9) | st.sampled_from([None, {}, [], ()]),
    lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=3) | st.lists(inner, max_size=3),
)


@given(plain_trees)
def test_the_tree_comes_back_from_its_entries(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    found = decode_tree(encode_tree(TreeDocument(entries=entries_of(tree))), TREE_FILE).entries
    assert nest(found, [leaf for _, leaf in leaves]) == tree
