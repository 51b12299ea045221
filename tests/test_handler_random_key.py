"""The random key handlers, on their own and against Orbax's: every kind of key goes on exactly where it was saved."""

from __future__ import annotations

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import ckptkit
from ckptkit import args, errors
from ckptkit.file_list import FILE_LIST
from ckptkit.testing import assert_same

JAX_KEYS = {
    **{impl: lambda impl=impl: jax.random.key(3, impl=impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")},
    "split": lambda: jax.random.split(jax.random.key(3), (2, 3)),
    "split rbg": lambda: jax.random.split(jax.random.key(3, impl="rbg"), 3),
    "raw": lambda: jax.random.PRNGKey(3),
    "raw split": lambda: jax.random.split(jax.random.PRNGKey(3), 4),
    "raw rbg": lambda: jax.random.key_data(jax.random.key(3, impl="rbg")),
}
GENERATORS = [np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64]


@pytest.fixture(params=JAX_KEYS)
def key(request):
    return JAX_KEYS[request.param]()


def save_jax(path, key, name=None):
    ckptkit.Checkpointer(ckptkit.JaxRandomKeyCheckpointHandler(name)).save(path, args.JaxRandomKeySave(key))


def save_numpy(path, item, name=None):
    ckptkit.Checkpointer(ckptkit.NumpyRandomKeyCheckpointHandler(name)).save(path, args.NumpyRandomKeySave(item))


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (file.parents[1] / FILE_LIST).unlink(missing_ok=True)


# JAX


def test_a_jax_key_round_trips(tmp_path, key):
    save_jax(tmp_path / "key", key)
    assert_same(ckptkit.restore(tmp_path / "key"), key)


def test_orbax_restores_a_jax_key_of_any_implementation(tmp_path, key):
    save_jax(tmp_path / "key", key)
    with ocp.Checkpointer(ocp.JaxRandomKeyCheckpointHandler()) as checkpointer:
        assert_same(checkpointer.restore(tmp_path / "key", args=ocp.args.JaxRandomKeyRestore()), key)


@pytest.mark.parametrize("kind", ["threefry2x32", "split", "raw", "raw split"])
def test_a_jax_key_of_orbaxs_is_restored(tmp_path, kind):
    key = JAX_KEYS[kind]()
    with ocp.Checkpointer(ocp.JaxRandomKeyCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "key", args=ocp.args.JaxRandomKeySave(key))
    assert_same(ckptkit.restore(tmp_path / "key"), key)


def test_a_jax_key_is_what_it_was_whatever_the_default_implementation_is(tmp_path):
    save_jax(tmp_path / "key", jax.random.key(3))
    with jax.default_prng_impl("rbg"):
        assert_same(ckptkit.restore(tmp_path / "key"), jax.random.key(3, impl="threefry2x32"))


def test_a_jax_key_goes_where_restore_args_say(tmp_path):
    save_jax(tmp_path / "key", jax.random.key(3))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[2])
    wanted = args.JaxRandomKeyRestore(restore_args=ckptkit.ArrayRestoreArgs(sharding=where))
    assert ckptkit.Checkpointer().restore(tmp_path / "key", wanted).sharding == where


@pytest.mark.parametrize("item", [None, 3, np.zeros(2, np.uint32), jax.numpy.zeros(2), jax.numpy.uint32(3)])
def test_what_is_no_jax_key_is_a_type_error(tmp_path, item):
    with pytest.raises(TypeError, match="Unsupported type"):
        save_jax(tmp_path / "key", item)
    assert not (tmp_path / "key").exists()


# NumPy


def legacy_state():
    state = np.random.RandomState(3)
    state.normal()  # so that a second normal waits in the state
    return state


@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_numpy_state_round_trips_in_either_form(tmp_path, legacy):
    state = legacy_state()
    save_numpy(tmp_path / "key", state.get_state(legacy=legacy))
    restored = ckptkit.restore(tmp_path / "key")
    assert_same(restored, state.get_state(legacy=legacy))
    again = np.random.RandomState()
    again.set_state(restored)
    assert (again.normal(size=700) == state.normal(size=700)).all()


@pytest.mark.parametrize("legacy", [True, False])
def test_orbax_and_ckptkit_restore_each_others_legacy_numpy_state(tmp_path, legacy):
    state = legacy_state().get_state(legacy=legacy)
    save_numpy(tmp_path / "ours", state)
    with ocp.Checkpointer(ocp.NumpyRandomKeyCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "theirs", args=ocp.args.NumpyRandomKeySave(state))
        assert_same(checkpointer.restore(tmp_path / "ours", args=ocp.args.NumpyRandomKeyRestore()), state)
    assert_same(ckptkit.restore(tmp_path / "theirs"), state)


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_goes_on_where_it_was(tmp_path, kind):
    generator = np.random.Generator(kind(3))
    generator.integers(2**31, size=5, dtype=np.int32)  # half of a 64-bit word waits in the state
    save_numpy(tmp_path / "key", generator)
    restored = ckptkit.restore(tmp_path / "key")
    assert type(restored.bit_generator) is kind
    assert (restored.integers(2**31, size=99, dtype=np.int32) == generator.integers(2**31, size=99, dtype=np.int32)).all()


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_bit_generator_and_its_state_round_trip(tmp_path, kind):
    bit_generator = kind(3)
    save_numpy(tmp_path / "key", bit_generator)
    save_numpy(tmp_path / "state", bit_generator.state)
    restored = ckptkit.restore(tmp_path / "key")
    assert type(restored) is kind
    assert_same(restored.state, bit_generator.state)
    assert_same(ckptkit.restore(tmp_path / "state"), bit_generator.state)


@pytest.mark.parametrize("seed", [3, [1, 2, 2**40], 2**127, None])
def test_a_restored_generator_spawns_the_same_children(tmp_path, seed):
    generator = np.random.default_rng(seed)
    generator.spawn(2)
    save_numpy(tmp_path / "key", generator)
    restored = ckptkit.restore(tmp_path / "key")
    assert [child.random() for child in restored.spawn(3)] == [child.random() for child in generator.spawn(3)]


def test_a_generator_without_numpys_seed_is_restored_without_one(tmp_path):
    bit_generator = np.random.MT19937()
    bit_generator._legacy_seeding(3)
    save_numpy(tmp_path / "key", np.random.RandomState(3)._bit_generator)
    restored = ckptkit.restore(tmp_path / "key")
    assert (restored.random_raw(9) == bit_generator.random_raw(9)).all()


def test_a_restored_generator_saves_again(tmp_path):
    save_numpy(tmp_path / "key", np.random.default_rng(3))
    save_numpy(tmp_path / "again", ckptkit.restore(tmp_path / "key"))
    assert ckptkit.restore(tmp_path / "again").random() == np.random.default_rng(3).random()


@pytest.mark.parametrize("item", [None, 3, "MT19937", [1], np.zeros(3), np.random.RandomState(3), np.random.SeedSequence(3)])
def test_what_is_no_numpy_state_is_a_type_error(tmp_path, item):
    with pytest.raises(TypeError, match="Unsupported type"):
        save_numpy(tmp_path / "key", item)
    assert not (tmp_path / "key").exists()


# Both


def test_the_type_strings_are_orbaxs():
    assert ckptkit.JaxRandomKeyCheckpointHandler.typestr() == ocp.JaxRandomKeyCheckpointHandler().typestr()
    assert ckptkit.NumpyRandomKeyCheckpointHandler.typestr() == ocp.NumpyRandomKeyCheckpointHandler().typestr()


def test_keys_are_items_of_a_composite(tmp_path):
    items = {"jax": args.JaxRandomKeySave(jax.random.key(3)), "numpy": args.NumpyRandomKeySave(np.random.PCG64(3))}
    ckptkit.Checkpointer().save(tmp_path / "step", args.Composite(**items))
    restored = ckptkit.restore(tmp_path / "step")
    assert_same(restored["jax"], jax.random.key(3))
    assert_same(restored["numpy"].state, np.random.PCG64(3).state)


@pytest.mark.parametrize(
    ("save", "handler", "item"),
    [
        (save_jax, ckptkit.JaxRandomKeyCheckpointHandler, jax.random.PRNGKey(3)),
        (save_numpy, ckptkit.NumpyRandomKeyCheckpointHandler, {"bit_generator": "none", "a": 1}),
    ],
)
def test_the_key_lies_under_its_name_and_another_name_is_told_of_it(tmp_path, save, handler, item):
    save(tmp_path / "key", item, "foo")
    assert sorted(path.name for path in (tmp_path / "key").iterdir() if path.is_dir()) == ["foo", "foo_metadata"]
    assert_same(ckptkit.Checkpointer(handler("foo")).restore(tmp_path / "key"), item)
    with pytest.raises(errors.NotFoundError, match=r"of the name '\w*_random_key', but foo"):
        ckptkit.restore(tmp_path / "key")


@pytest.mark.parametrize("name", ["a/b", "..", "__x", "a\0"])
def test_a_name_that_is_no_folders_is_refused(name):
    with pytest.raises(errors.ArgsError):
        ckptkit.JaxRandomKeyCheckpointHandler(name)


# Damage and strangers


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "os.system"},
        {"type": 3},
        {"legacy": True},
        {"integers": [["state", "pos"]]},
        {"integers": 7},
        {"seed_sequence": {}},
        {"seed_sequence": {"entropy": 3, "spawn_key": [], "pool_size": 10**9, "n_children_spawned": 0}},
        {"seed_sequence": {"entropy": "x", "spawn_key": [], "pool_size": 4, "n_children_spawned": 0}},
    ],
)
def test_a_description_that_makes_no_generator_is_an_error(tmp_path, changes):
    save_numpy(tmp_path / "key", np.random.Generator(np.random.MT19937(3)))
    edit_json(tmp_path / "key" / "np_random_key_metadata" / "metadata", **changes)
    with pytest.raises(errors.FormatError, match="makes no random key"):
        ckptkit.restore(tmp_path / "key")


@pytest.mark.parametrize(
    "state",
    [
        {"bit_generator": "MT19937", "state": {"key": np.zeros(624, np.uint32), "pos": 625}},
        {"bit_generator": "MT19937", "state": {"key": np.zeros(624, np.uint32), "pos": -1}},
        {"bit_generator": "MT19937", "state": {"key": np.zeros(3, np.uint32), "pos": 3}},
        {**np.random.Philox(3).state, "buffer_pos": -5},
        {"bit_generator": "os.system", "state": {"key": 3}},
        {"bit_generator": "PCG64", "state": {"state": "1" * 101, "inc": 3}, "has_uint32": 0, "uinteger": 0},
    ],
)
def test_a_state_that_no_generator_has_is_an_error_and_is_never_put_into_one(tmp_path, state):
    save_numpy(tmp_path / "key", state)
    edit_json(tmp_path / "key" / "np_random_key_metadata" / "metadata", type="Generator")
    with pytest.raises(errors.FormatError, match="makes no random key"):
        ckptkit.restore(tmp_path / "key")


def test_a_position_outside_of_the_buffer_is_an_error_in_a_tuple_too(tmp_path):
    save_numpy(tmp_path / "key", ("MT19937", np.zeros(624, np.uint32), 10**9, 0, 0.0))
    with pytest.raises(errors.FormatError, match="position in the generator's buffer is 1000000000"):
        ckptkit.restore(tmp_path / "key")


@pytest.mark.parametrize("changes", [{"typed": True, "impl": "none"}, {"typed": True, "impl": "rbg"}, {"typed": True, "impl": 3}])
def test_a_description_that_makes_no_jax_key_is_an_error(tmp_path, changes):
    save_jax(tmp_path / "key", jax.random.key(3))
    edit_json(tmp_path / "key" / "jax_random_key_metadata" / "metadata", **changes)
    with pytest.raises(errors.FormatError, match="makes no random key"):
        ckptkit.restore(tmp_path / "key")


@pytest.mark.parametrize("text", ["[]", "{}", "null"])
def test_a_description_of_another_kind_is_an_error(tmp_path, text):
    save_jax(tmp_path / "key", jax.random.key(3))
    (tmp_path / "key" / "jax_random_key_metadata" / "metadata").write_text(text)
    (tmp_path / "key" / FILE_LIST).unlink()
    with pytest.raises(errors.FormatError):
        ckptkit.restore(tmp_path / "key")


@pytest.mark.parametrize(
    ("handler", "item", "save_args"),
    [
        (ckptkit.JaxRandomKeyCheckpointHandler, jax.random.key(3), args.JaxRandomKeySave),
        (ckptkit.NumpyRandomKeyCheckpointHandler, np.random.RandomState(3).get_state(), args.NumpyRandomKeySave),
    ],
)
def test_an_item_without_args_is_taken_with_a_warning(tmp_path, handler, item, save_args):
    for name in ("item", "args", "positional"):
        (tmp_path / name).mkdir()
    with pytest.warns(DeprecationWarning, match=f"item .* deprecated; pass args={save_args.__name__}"):
        handler().save(epath.Path(tmp_path / "item"), item)
    handler().save(epath.Path(tmp_path / "args"), args=save_args(item))
    handler().save(epath.Path(tmp_path / "positional"), save_args(item))  # as Orbax takes it
    restored = [handler().restore(epath.Path(tmp_path / name)) for name in ("item", "args", "positional")]
    for each in restored:
        assert str(each) == str(item)
