"""JSON in and out: what is refused, and that no bytes lead to any other error."""

from __future__ import annotations

import contextlib
import enum
import math
import sys

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptkit import errors
from ckptkit.metadata.json import checked_custom, dump, dump_exact, expect, load, load_exact, shape_of

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
json_values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(json_values)
def test_custom_metadata_comes_back_as_it_was(value):
    assert load_exact(dump_exact(checked_custom(value, "custom_metadata")), "file") == value


def test_nan_and_infinities_survive():
    back = load(dump_exact(checked_custom([math.nan, math.inf, -math.inf], "x")), "file")
    assert math.isnan(back[0])
    assert back[1:] == [math.inf, -math.inf]


def test_a_lone_surrogate_in_custom_metadata_survives():
    assert load(dump_exact(checked_custom({"\ud800": "\udfff"}, "x")), "file") == {"\ud800": "\udfff"}


def test_tuples_become_lists_and_subclasses_plain():
    class Color(enum.StrEnum):
        RED = "red"

    class Level(enum.IntEnum):
        LOW = 1

    value = checked_custom({"shape": (1, 2), "color": Color.RED, "level": Level.LOW, "loss": np.float64(0.5)}, "x")
    assert value == {"shape": [1, 2], "color": "red", "level": 1, "loss": 0.5}
    assert [type(item) for item in value.values()] == [list, str, int, float]


def test_custom_metadata_is_a_copy():
    value = {"steps": [1]}
    copy = checked_custom(value, "x")
    value["steps"].append(2)
    assert copy == {"steps": [1]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, {"b": np.zeros(2)}]}, r"custom_metadata\['a'\]\[1\]\['b'\] is a numpy.ndarray"),
        ({"a": {1: 2}}, r"custom_metadata\['a'\] has the key 1"),
        (object(), "custom_metadata is a builtins.object"),
        ({"a": {1, 2}}, r"\['a'\] is a builtins.set"),
        ({"n": 10**5000}, r"\['n'\] is an int of 16610 bits"),
        (b"bytes", "is a builtins.bytes"),
        ({"n": np.int64(3)}, "is a numpy.int64"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_place(value, message):
    with pytest.raises(errors.ArgsTypeError, match=message):
        checked_custom(value, "custom_metadata")


def test_a_value_inside_itself_is_refused():
    value: list = []
    value.append(value)
    with pytest.raises(TypeError, match="inside itself"):
        checked_custom(value, "custom_metadata")


@given(st.binary(max_size=40) | st.text(alphabet='[]{},:"\\u019eE+-.tfnNI ', max_size=40).map(str.encode))
def test_any_bytes_are_a_value_or_a_format_error(data):
    for read in (load, load_exact):
        with contextlib.suppress(errors.FormatError):
            read(data, "file")


@pytest.mark.parametrize("depth", [1_000, 1_020, 100_000])
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_no_nesting_is_deep_enough_for_a_recursion_error(opening, depth):
    for data in (opening * depth, opening * depth + b"1" + {b"[": b"]"}.get(opening, b"}") * depth):
        for read in (load, load_exact):
            with contextlib.suppress(errors.FormatError):
                read(data, "file")


@pytest.mark.parametrize(
    "data", [b"", b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b'"\xed\xa0\x80"', b"1" * 5_000, b"[1,]", b"{} {}"]
)
def test_what_only_looks_like_json_is_refused(data):
    with pytest.raises(errors.FormatError, match=r"^file: not valid JSON .*restore another checkpoint"):
        load(data, "file")


def test_integers_beyond_64_bits_are_exact():
    assert load_exact(b"[1180591620717411303424]", "file") == [2**70]


def test_a_string_that_utf8_cannot_hold_is_refused_by_name():
    with pytest.raises(errors.TreeError, match=r"'layer\\ud800'"):
        dump({"keys": [{"layer\ud800": 1}], "fragment": orjson.Fragment(b"1")})


@pytest.mark.parametrize(("value", "kind"), [(True, int), (1, bool), (1.0, int), (None, dict), ([], dict), ({}, list), (1, str)])
def test_a_value_of_another_type_is_refused(value, kind):
    with pytest.raises(errors.FormatError, match=r"^file: the field is .*, expected"):
        expect(value, kind, "the field", "file")


def test_a_deep_value_is_shown_cut_short():
    deep: list = []
    for _ in range(sys.getrecursionlimit()):
        deep = [deep]
    with pytest.raises(errors.FormatError, match=r"\[\[\[.*\.\.\..*expected an object"):
        expect(deep, dict, "the document", "file")


@pytest.mark.parametrize("value", [None, 3, "23", {"0": 1}, [1.0], [True], [-1], [[2]], ["2"]])
def test_a_shape_is_an_array_of_sizes(value):
    with pytest.raises(errors.FormatError, match="write_shape"):
        shape_of(value, "write_shape", "file")
    assert shape_of([2, 0, 2**63], "write_shape", "file") == (2, 0, 2**63)
