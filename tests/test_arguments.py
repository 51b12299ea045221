"""Arguments of any type at all: whatever is made with them is made, or refused by a typed error that says what was expected."""

from __future__ import annotations

import contextlib
import inspect
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import ckptkit
from ckptkit import args, errors, handlers, options

MADE = [
    *(getattr(args, name) for name in args.__all__ if name.endswith(("Save", "Restore"))),
    *(getattr(options, name) for name in options.__all__ if name[0].isupper()),
    *(getattr(handlers, name) for name in handlers.__all__ if name.endswith("Handler") and name[0] != "_"),
    ckptkit.SaveArgs,
    ckptkit.RestoreArgs,
    ckptkit.ArrayRestoreArgs,
    ckptkit.Checkpointer,
    ckptkit.AsyncCheckpointer,
    ckptkit.StandardCheckpointer,
]
MADE = [each for each in MADE if not inspect.isabstract(each)]


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class _NoTruth:
    """As an array of several elements: neither true nor false, and equal to nothing in particular."""

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")

    def __eq__(self, other: object) -> Any:
        return self

    __hash__ = None


_VALUES = st.one_of(
    st.sampled_from(
        [
            *(_Unprintable(), _NoTruth(), object(), object, int, len, ..., NotImplemented, Fraction(1, 2), 1j, range(3), {1, 2}),
            *(np.float32(2), np.int64(-1), np.bool_(True), np.arange(3), np.zeros(()), np.array(["a"]), np.dtype("f4"), "f4,"),
            *(float("nan"), float("inf"), -float("inf"), 10**400, -1, 0, 1, 0.5, True, False, None, "", "5", "a/b", "\0", b"x"),
            *((), [], {}, ("a",), (1, "a"), (-1,), (2, 3), (2.0,), [1], [[1]], {"a": 1}),
            *(jnp.ones(2), jax.ShapeDtypeStruct((2,), np.int8), jax.random.key(0).dtype, PartitionSpec("x")),
            *(SingleDeviceSharding(jax.devices()[0]), NamedSharding(jax.make_mesh((8,), ("x",)), PartitionSpec())),
            *(
                jax.make_mesh((8,), ("x",)),
                jax.devices()[0],
                ckptkit.SaveArgs(),
                ckptkit.RestoreArgs(),
                ckptkit.ArrayRestoreArgs(),
            ),
            *(options.AsyncOptions(), options.FileOptions(), options.MultiprocessingOptions(), options.PyTreeMetadataOptions()),
            *("no", "unsafe", "local", "numpy", "zstd", "ocdbt", "auto", Path("a"), args.JsonSave(1), ckptkit.Registry()),
        ]
    ),
    st.text(max_size=3),
    st.integers(),
    st.floats(),
    st.binary(max_size=2),
    st.lists(st.one_of(st.integers(), st.text(max_size=1)), max_size=2),
)


def _names(made: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in inspect.signature(made).parameters.values() if each.kind in kinds]


@pytest.mark.parametrize("made", [each for each in MADE if _names(each)], ids=lambda made: made.__name__)
@settings(max_examples=60)
@given(data=st.data())
def test_any_argument_is_taken_or_refused_by_a_typed_error(made: Any, data: st.DataObject) -> None:
    names = _names(made)
    given = {name: data.draw(_VALUES, label=name) for name in data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=2))}
    with contextlib.suppress(errors.ArgsError):  # which is a ValueError; anything else fails the test
        made(**({"item": 1} if "item" in names else {}) | given)


@settings(max_examples=60)
@given(names=st.lists(_VALUES, max_size=2), handler=_VALUES)
def test_any_item_of_a_composite_is_taken_or_refused_by_a_typed_error(names: list[Any], handler: Any) -> None:
    with contextlib.suppress(errors.ArgsError):
        handlers.CompositeCheckpointHandler(*names, state=handler)


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        (ckptkit.SaveArgs, {"shard_axes": ("a",)}, r"SaveArgs\(shard_axes=\('a',\)\): expected numbers of axes"),
        (ckptkit.SaveArgs, {"chunk_byte_size": "5"}, r"SaveArgs\(chunk_byte_size='5'\): expected bytes above 0"),
        (ckptkit.SaveArgs, {"aggregate": 1}, r"SaveArgs\(aggregate=1\): expected True or False"),
        (ckptkit.RestoreArgs, {"dtype": "float31"}, r"RestoreArgs\(dtype='float31'\): expected a dtype of numpy"),
        (ckptkit.RestoreArgs, {"restore_type": "int"}, r"RestoreArgs\(restore_type='int'\): expected a type such as np\.ndarray"),
        (ckptkit.ArrayRestoreArgs, {"sharding": "x"}, r"ArrayRestoreArgs\(sharding='x'\): expected a Sharding or a Format"),
        (ckptkit.ArrayRestoreArgs, {"mesh_axes": ("x",)}, r"mesh_axes=\('x',\)\): expected a jax.sharding.PartitionSpec"),
        (ckptkit.ArrayRestoreArgs, {"shape": 5}, r"ArrayRestoreArgs\(shape=5\): expected lengths"),
        (args.StandardRestore, {"fallback_sharding": "x"}, r"fallback_sharding='x'\): expected a jax\.sharding\.Sharding"),
        (args.ArraySave, {"item": 1, "save_args": {}}, r"ArraySave\(save_args={}\): expected a SaveArgs or None"),
        (args.ArrayRestore, {"restore_args": int}, r"expected a RestoreArgs, an ArrayRestoreArgs or None"),
        (ckptkit.AsyncOptions, {"timeout_secs": "5"}, r"AsyncOptions\(timeout_secs='5'\): expected a number above 0"),
        (ckptkit.StandardCheckpointHandler, {"save_concurrent_gb": "5"}, r"save_concurrent_gb='5'\): expected a number above 0"),
        (
            ckptkit.StandardCheckpointHandler,
            {"pytree_metadata_options": True},
            r"expected a ckptkit\.options\.PyTreeMetadataOptions",
        ),
        (ckptkit.Checkpointer, {"handler": ckptkit.StandardCheckpointHandler}, r"expected an instance of a CheckpointHandler"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named_with_what_was_expected(made: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message) as raised:
        made(**given)
    assert isinstance(raised.value, errors.ArgsTypeError)


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        (ckptkit.SaveArgs, {"chunk_byte_size": 0}, r"SaveArgs\(chunk_byte_size=0\): expected bytes above 0"),
        (ckptkit.ArrayRestoreArgs, {"shape": (2, -1)}, r"lengths that are not below 0"),
        (args.PyTreeSave, {"item": 1, "ocdbt_target_data_file_size": -1}, r"target_data_file_size=-1\): expected bytes above 0"),
        (ckptkit.AsyncOptions, {"timeout_secs": float("nan")}, r"timeout_secs=nan\): expected a number above 0"),
        (
            ckptkit.options.FileOptions,
            {"path_permission_mode": 0o10000},
            r"path_permission_mode=4096\): expected permission bits",
        ),
        (ckptkit.options.MultiprocessingOptions, {"primary_host": -1}, r"primary_host=-1\): expected the index of a process"),
        (ckptkit.options.MultiprocessingOptions, {"active_processes": set()}, r"at least one"),
        (ckptkit.options.MultiprocessingOptions, {"active_processes": {1, 2}}, r"the primary process must be one of those"),
    ],
)
def test_an_argument_out_of_range_is_named_with_what_was_expected(made: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        made(**given)
    assert type(raised.value) is errors.ArgsError


def test_a_bound_or_a_wait_may_be_endless(tmp_path: Path) -> None:
    with ckptkit.StandardCheckpointer(
        save_concurrent_gb=float("inf"), async_options=ckptkit.AsyncOptions(timeout_secs=float("inf"))
    ) as checkpointer:
        checkpointer.save(tmp_path / "c", {"a": 1})
        assert checkpointer.restore(tmp_path / "c") == {"a": 1}
