"""Places that are no directory of this machine: `memory://`, the paths that handlers get there, and commits by a last file."""

from __future__ import annotations

import uuid
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings

import ckptkit
from ckptkit import args, commit, errors, finding, saving
from ckptkit.location import LocationPath
from ckptkit.testing import assert_same, strategies

COMMIT = "commit_success.txt"
FORMATS = {
    "ocdbt": {"use_ocdbt": True},
    "ocdbt-zarr3": {"use_ocdbt": True, "use_zarr3": True},
    "zarr": {"use_ocdbt": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
    "compressed": {"use_ocdbt": False, "use_compression": True},
}


def location_of(url: str) -> Any:
    return ckptkit.default_registry().location(url)


@pytest.fixture
def url():
    name = f"memory://{uuid.uuid4().hex}"
    yield name
    location_of(name).delete()


def save(url, tree, **how):
    ckptkit.save(url, tree, **how)


# What is saved in memory is restored.


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_every_format_round_trips(url, options):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    tree = {
        "sharded": jax.device_put(jnp.arange(64.0).reshape(8, 8), sharding),
        "large": np.random.default_rng(0).random((700, 1000)),
        "key": jax.random.key(1),
        "n": 3,
        "text": "größe",
        "empty": {},
        "zero": np.zeros((0, 3)),
        "bf": jnp.ones(5, jnp.bfloat16),
    }
    with ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(url, tree)
    assert_same(ckptkit.restore(url), tree)


@hypothesis_settings(max_examples=20)
@given(tree=strategies.trees())
def test_trees_round_trip_with_a_target(tree):
    with ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save("memory://drawn", tree, force=True)
        assert_same(checkpointer.restore("memory://drawn", tree), tree)


def test_many_small_leaves_and_large_chunks_are_read_in_few_pieces(url):
    tree = {str(i): np.full(50, i) for i in range(3000)} | {"big": np.random.default_rng(1).random((5, 1 << 20))}
    save(url, tree)
    assert_same(ckptkit.restore(url), tree)


def test_every_handler_saves_and_restores(url):
    items = {
        "tree": args.StandardSave({"a": np.arange(3)}),
        "texts": args.PyTreeSave({"a": "text"}),
        "array": args.ArraySave(np.arange(4)),
        "json": args.JsonSave({"a": [1, None]}),
        "jax_key": args.JaxRandomKeySave(jax.random.key(3)),
        "np_key": args.NumpyRandomKeySave(np.random.default_rng(5)),
    }
    with ckptkit.Checkpointer() as checkpointer:
        checkpointer.save(url, args.Composite(**items), custom_metadata={"step": 7})
        restored = checkpointer.restore(url)
        metadata = checkpointer.metadata(url)
    assert_same(restored["tree"], {"a": np.arange(3)})
    assert restored["texts"] == {"a": "text"}
    assert_same(restored["array"], np.arange(4))
    assert restored["json"] == {"a": [1, None]}
    assert jax.random.key_data(restored["jax_key"]).tolist() == jax.random.key_data(jax.random.key(3)).tolist()
    assert restored["np_key"].random() == np.random.default_rng(5).random()
    assert metadata.custom_metadata == {"step": 7}
    assert metadata.item_metadata["tree"]["a"].shape == (3,)


def test_one_part_of_the_process_finds_what_another_left_until_it_is_deleted(url):
    save(f"{url}/step_1", {"a": 1})
    save(f"{url}/step_2", {"a": 2})
    assert sorted(location_of(url).names()) == ["step_1", "step_2"]
    location_of(f"{url}/step_1").delete()
    with pytest.raises(errors.NotFoundError):
        ckptkit.restore(f"{url}/step_1")
    assert ckptkit.restore(f"{url}/step_2") == {"a": 2}


def test_a_save_in_the_background_commits_there(url):
    handle = ckptkit.save_async(url, {"a": np.arange(3)})
    handle.result(60)
    assert_same(ckptkit.restore(url), {"a": np.arange(3)})


@pytest.mark.parametrize("bad", ["memory://", "memory:///", "memory://a/../b", "memory://./a", "memory://a//b"])
def test_a_url_without_a_name_is_refused(bad):
    with pytest.raises(errors.ArgsError, match="expected memory://name"):
        location_of(bad)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\0b", "", "a//b", "."])
def test_names_never_lead_outside_the_place(url, name):
    location = location_of(url)
    for use in (location.child, location.read_bytes, lambda n: location.write_bytes(n, b""), lambda n: location.path / n):
        with pytest.raises(errors.FormatError):
            use(name)


def test_orbax_opens_the_files_as_they_lie(url, tmp_path):
    tree = {"a": np.arange(6.0), "b": {"c": np.ones((2, 3))}}
    save(url, tree)
    _copy(location_of(url), tmp_path / "copy")
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, restored, tree)


def test_a_copy_on_disk_is_read_also_of_a_checkpoint_that_replaced_another(url, tmp_path):
    save(url, {"a": 1})
    save(url, {"a": 2}, force=True)
    _copy(location_of(url), tmp_path / "copy")
    assert ckptkit.restore(tmp_path / "copy") == {"a": 2}


def _copy(location, directory):
    directory.mkdir(parents=True)
    for name, is_directory in location.names().items():
        if is_directory:
            _copy(location.child(name), directory / name)
        else:
            (directory / name).write_bytes(location.read_bytes(name))


# The path that a handler is given.


def test_a_path_does_for_a_handler_what_an_epath_does(url):
    path = LocationPath(location_of(url))
    (path / "sub").mkdir()
    (path / "sub" / "text").write_text("größe")
    assert ((path / "sub").name, str(path / "sub/text"), (path / "sub" / "text").parent) == (
        "sub",
        f"{url}/sub/text",
        path / "sub",
    )
    assert (path / "sub" / "text").read_bytes() == "größe".encode()
    assert (path / "sub" / "text").read_text() == "größe"
    assert [p.name for p in path.iterdir()] == ["sub"]
    assert ((path / "sub").is_dir(), (path / "sub").is_file()) == (True, False)
    assert ((path / "sub/text").is_dir(), (path / "sub/text").is_file()) == (False, True)
    with pytest.raises(FileExistsError):
        (path / "sub").mkdir()
    (path / "sub").mkdir(exist_ok=True)
    (path / "sub" / "text").unlink()
    with pytest.raises(FileNotFoundError):
        (path / "sub" / "text").unlink()
    assert not path.joinpath("sub", "text").exists()


class NotesArgs(args.CheckpointArgs):
    def __init__(self, text=""):
        self.text = text


class NotesHandler(ckptkit.CheckpointHandler):
    """What a stranger writes who knows only paths."""

    def save(self, directory, *, args):
        (directory / "notes.txt").write_text(args.text)

    def restore(self, directory, *, args):
        return (directory / "notes.txt").read_text()


def test_a_handler_of_somebody_else_works_there(url, registry):
    registry.add_args(NotesArgs, NotesHandler, for_save=True, for_restore=True)
    with ckptkit.Checkpointer(registry=registry) as checkpointer:
        checkpointer.save(url, NotesArgs("hello"))
        assert checkpointer.restore(url) == "hello"


# Commits: one small file decides.


def _begin(url, *, force=False, text=b"text"):
    pending = commit.begin(location_of(url), force=force, mode=None)
    pending.temporary.write_bytes("sub/file", text)
    return pending


def _content(url):
    return finding.resolve(location_of(url)).read_bytes("sub/file")


def test_nothing_counts_before_the_commit_and_everything_after(url):
    pending = _begin(url)
    with pytest.raises(errors.IncompleteError, match="never finished, or is under way"):
        finding.resolve(location_of(url))
    pending.commit()
    assert _content(url) == b"text"
    assert sorted(location_of(url).names()) == [COMMIT, "sub"]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_replacing_leaves_nothing_of_the_old_one(url, rounds):
    _begin(url).commit()
    for i in range(rounds):
        _begin(url, force=True, text=bytes([i])).commit()
    assert _content(url) == bytes([rounds - 1])
    folder, marker = sorted(location_of(url).names())
    assert (folder[:8], marker) == ("ckptkit-", COMMIT)


def test_the_old_checkpoint_is_read_until_the_new_one_is_committed(url):
    _begin(url, text=b"old").commit()
    pending = _begin(url, force=True, text=b"new")
    assert _content(url) == b"old"
    pending.commit()
    assert _content(url) == b"new"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_an_abandoned_save_leaves_what_was_there(url, force, old):
    if old:
        _begin(url, text=b"old").commit()
    before = location_of(url).names()
    if old and not force:
        with pytest.raises(errors.ExistsError):
            _begin(url)
        return
    _begin(url, force=force).abandon()
    assert location_of(url).names() == before


def test_of_two_first_savers_one_wins_and_the_other_leaves_nothing(url):
    for first in (0, 1):
        savers = [_begin(url, text=b"0"), _begin(url, text=b"1")]
        winner, loser = savers[first], savers[1 - first]
        winner.commit()
        with pytest.raises(errors.ExistsError):
            loser.commit()
        loser.abandon()
        assert _content(url) == str(first).encode()
        assert len(location_of(url).names()) == 2
        location_of(url).delete()


def test_of_two_replacing_savers_one_wins_and_the_other_is_told(url):
    _begin(url).commit()
    winner, loser = _begin(url, force=True, text=b"winner"), _begin(url, force=True)
    winner.commit()
    with pytest.raises(errors.BusyError, match="was committed while"):
        loser.commit()
    loser.abandon()
    assert _content(url) == b"winner"
    assert len(location_of(url).names()) == 2


def test_a_saver_that_begins_after_a_commit_is_not_disturbed_by_its_tidying(url):
    first = _begin(url)
    first.commit()
    second, third = _begin(url, force=True), None
    delete = second._place.delete

    def begin_then_delete(name):
        nonlocal third
        third = third or _begin(url, force=True, text=b"third")
        delete(name)

    second._place.delete = begin_then_delete
    second.commit()
    third.commit()
    assert _content(url) == b"third"


def test_what_a_killed_saver_left_is_in_nobodys_way_and_gone_with_the_next(url):
    _begin(url, text=b"killed")
    _begin(url, text=b"killed too")
    _begin(url, text=b"whole").commit()
    assert _content(url) == b"whole"
    assert len(location_of(url).names()) == 2


def test_files_that_no_save_left_are_replaced_only_by_force(url):
    location_of(url).write_bytes("data.csv", b"1,2")
    with pytest.raises(errors.ExistsError):
        _begin(url)
    _begin(url, force=True).commit()
    assert len(location_of(url).names()) == 2


@pytest.mark.parametrize("name", ["data.csv", "100/data.csv"])
def test_force_never_deletes_what_is_no_checkpoint(url, name):
    save(f"{url}/100", {"a": 1})
    location_of(url).write_bytes(name, b"1,2")
    with pytest.raises(errors.ExistsError, match=r"checkpoints \(100\)"):
        save(url, {"a": 2}, force=True)
    assert ckptkit.restore(f"{url}/100") == {"a": 1}
    assert location_of(url).read_bytes(name) == b"1,2"


def test_an_error_of_the_store_at_the_last_file_never_takes_a_checkpoint_away(url):
    for taken_in in (True, False):
        pending = _begin(url, force=True)
        replace = pending._place.replace_bytes

        def fail(*args, replace=replace, taken_in=taken_in):
            if taken_in:
                replace(*args)
            raise errors.StorageError(None, "connection lost", url)

        pending._place.replace_bytes = fail
        if taken_in:
            pending.commit()
        else:
            with pytest.raises(errors.StorageError):
                pending.commit()
            pending.abandon()
        assert _content(url) == b"text"


def test_a_commit_file_of_another_program_marks_the_files_beside_it(url):
    location_of(url).write_bytes("sub/file", b"theirs")
    location_of(url).write_bytes(COMMIT, b"Checkpoint commit was successful to gs://bucket/name")
    assert _content(url) == b"theirs"


@pytest.mark.timeout(60)
def test_an_empty_commit_file_added_by_hand_makes_a_copied_checkpoint_readable(url):
    save(url, {"a": 1})
    location_of(url).delete(COMMIT)
    with pytest.raises(errors.IncompleteError, match="it may be empty"):
        ckptkit.restore(url)
    location_of(url).write_bytes(COMMIT, b"")
    assert ckptkit.restore(url) == {"a": 1}


@pytest.mark.parametrize("data", [b'{"data": "../x"}', b'{"data": "sub"}', b'{"data": 3}', b"[]", b"[" * 60000, b"\xff"])
def test_a_commit_file_leads_nowhere_else(url, data):
    location_of(url).write_bytes(COMMIT, data)
    assert finding.resolve(location_of(url)).url == url


def test_a_restore_starts_over_where_the_checkpoint_was_replaced_meanwhile(url, registry):
    registry.add_args(NotesArgs, NotesHandler, for_save=True, for_restore=True)
    replaced = []

    class Replacing(NotesHandler):
        def restore(self, directory, *, args):
            if not replaced:
                replaced.append(directory)
                ckptkit.Checkpointer(NotesHandler(), registry=registry).save(url, NotesArgs("new"), force=True)
            return super().restore(directory, args=args)

    with ckptkit.Checkpointer(NotesHandler(), registry=registry) as checkpointer:
        checkpointer.save(url, NotesArgs("old"))
    with ckptkit.Checkpointer(Replacing(), registry=registry) as checkpointer:
        assert checkpointer.restore(url, args=NotesArgs()) == "new"


class Failing(ckptkit.AsyncCheckpointHandler):
    async def async_save(self, directory, *, args):
        (directory / "half").write_bytes(b"")
        future: Future[None] = Future()
        future.set_exception(OSError("no"))
        return [future]

    def restore(self, directory, *, args):
        raise AssertionError


def test_a_failed_save_leaves_nothing(url, registry):
    registry.add_args(NotesArgs, Failing, for_save=True)
    with ckptkit.Checkpointer(registry=registry) as checkpointer, pytest.raises(OSError, match="no"):
        checkpointer.save(url, NotesArgs())
    assert not location_of(url).names()


# Damage.


def _files(location, prefix=""):
    for name, is_directory in location.names().items():
        yield from _files(location.child(name), f"{prefix}{name}/") if is_directory else [prefix + name]


@pytest.mark.parametrize("storage", ["ocdbt", "zarr"])
@pytest.mark.parametrize("damage", ["gone", "cut off", "flipped"])
def test_damaged_files_are_noticed(url, storage, damage):
    ckptkit.save(url, {"a": np.arange(100_000.0), "b": np.arange(5)}, storage=storage)
    location = location_of(url)
    data = [name for name in _files(location) if name.startswith("d/") or name == "a/0"]
    name = max(data, key=lambda name: len(location.read_bytes(name)))
    content = bytearray(location.read_bytes(name))
    content[1000] ^= 1
    location.delete(name)
    if damage != "gone":
        location.write_bytes(name, bytes(content if damage == "flipped" else content[:-1000]))
    with pytest.raises((errors.CorruptCheckpointError, errors.NotFoundError)):
        ckptkit.restore(url)


@pytest.mark.parametrize("name", ["manifest.ocdbt", "_METADATA"])
def test_a_missing_file_is_named(url, name):
    save(url, {"a": np.arange(5)})
    location_of(url).delete(name)
    with pytest.raises(errors.NotFoundError, match=name):
        ckptkit.restore(url)


def test_a_place_of_another_kind_is_refused(tmp_path):
    class ReadOnly(ckptkit.storage.FileLocation):
        local_path = None

    with pytest.raises(errors.ArgsError, match="MarkerLocation"):
        commit.begin(ReadOnly(tmp_path), force=False, mode=None)


@pytest.mark.parametrize("force", [False, True])
def test_who_finds_its_files_gone_since_another_save_was_committed_is_told_of_that(url, force, monkeypatch):
    listed = saving.write_file_list

    def overtaken(*what):
        monkeypatch.setattr(saving, "write_file_list", listed)
        save(url, {"a": 1}, force=force)
        raise errors.NotFoundError(2, "gone", url)  # as where the other one deletes between a look and the next

    monkeypatch.setattr(saving, "write_file_list", overtaken)
    with pytest.raises(errors.BusyError if force else errors.ExistsError):
        save(url, {"a": 2}, force=force)
    assert ckptkit.restore(url) == {"a": 1}
