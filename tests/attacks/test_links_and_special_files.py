"""Links that lead out of the checkpoint, named pipes and devices where files belong: nothing is read there, nothing waits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from sandbox import NEEDS_LINUX, open_hostile, open_variants, read, unlisted, write

import ckptkit
from ckptkit import args, errors

pytestmark = NEEDS_LINUX

REFUSALS = (errors.FormatError, errors.CorruptCheckpointError)
SMALL = ["_METADATA", "_CHECKPOINT_METADATA", "_sharding", "_strings.json", "ckptkit_index.json", "array_metadatas/process_0"]


def moved(directory, name, outside):
    """Moves a file or directory out of the checkpoint and links to it from its old place."""
    shutil.move(os.path.join(directory, name), os.path.join(outside, "elsewhere"))
    os.symlink(os.path.join(outside, "elsewhere"), os.path.join(directory, name))


@pytest.mark.parametrize("name", [*SMALL, "manifest.ocdbt", "d", "array_metadatas"])
def test_a_link_out_of_a_database_is_not_followed(database, outside, name):
    moved(database, name, outside)
    with pytest.raises(REFUSALS, match=r"outside the directory|leads out of"):
        ckptkit.restore(database)


@pytest.mark.parametrize("name", ["_METADATA", "a", "a/.zarray", "a/0", "b.n/0"])
def test_a_link_out_of_a_directory_of_arrays_is_not_followed(files, outside, name):
    moved(files, name, outside)
    with pytest.raises(REFUSALS, match="leads out of"):
        ckptkit.restore(files)


@pytest.mark.parametrize("how", [{}, {"args": args.Composite(state=args.StandardRestore())}])
def test_a_link_out_of_a_composite_is_not_followed(tmp_path, outside, how):
    ckptkit.save(tmp_path / "c", args.Composite(state=args.StandardSave({"a": np.arange(3)})))
    moved(unlisted(tmp_path / "c"), "state", outside)
    with pytest.raises(errors.FormatError, match="leads out of"):
        ckptkit.Checkpointer().restore(tmp_path / "c", **how)


def test_a_link_to_the_checkpoint_itself_and_within_it_is_followed(database, tmp_path):
    os.rename(os.path.join(database, "_METADATA"), os.path.join(database, "elsewhere"))
    os.symlink("elsewhere", os.path.join(database, "_METADATA"))
    os.symlink(database, tmp_path / "latest")
    assert ckptkit.restore(tmp_path / "latest")["b"]["s"] == "text"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_very_many_links_to_one_chunk_are_refused(files, link):
    document = json.loads(read(files, "a/.zarray")) | {"shape": [400 << 18], "chunks": [1 << 18]}
    write(files, "a/.zarray", json.dumps(document).encode())
    write(files, "a/0", bytes(1 << 20))
    for i in range(1, 400):
        link("0" if link is os.symlink else os.path.join(files, "a/0"), os.path.join(files, f"a/{i}"))
    outcome = open_hostile(files)
    assert outcome.kind == "refused", outcome
    assert "links make" in outcome.detail


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_from_one_chunk_to_another_is_followed(files, link):
    os.unlink(os.path.join(files, "b.n/0"))
    write(files, "b.n/elsewhere", np.arange(4).tobytes())
    link("elsewhere" if link is os.symlink else os.path.join(files, "b.n/elsewhere"), os.path.join(files, "b.n/0"))
    assert ckptkit.restore(files)["b"]["n"].tolist() == [0, 1, 2, 3]


def pipe(directory, name):
    """Puts a named pipe in the place of a file."""
    for gone in {name, "_METADATA"} if name == "checkpoint" else {name}:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, gone))
    os.mkfifo(os.path.join(directory, name))


def test_a_named_pipe_is_never_waited_for(database):
    changes = {name: lambda path, name=name: pipe(path, name) for name in (*SMALL, "manifest.ocdbt", "checkpoint")}
    for outcome in open_variants(database, changes).values():
        assert outcome.kind == "refused", outcome
        assert "regular file" in outcome.detail


def test_named_pipes_beside_the_files_of_a_database_are_never_waited_for(database):
    for name in ("manifest.0000000000000001", "manifest.ocdbt.__lock", "extra", "commit_success.txt"):
        if not os.path.exists(os.path.join(database, name)):
            os.mkfifo(os.path.join(database, name))
    assert open_hostile(database).good


@pytest.mark.parametrize("name", ["_METADATA", "a/0"])
def test_a_device_that_never_ends_is_not_read(files, name):
    os.unlink(os.path.join(files, name))
    os.symlink("/dev/zero", os.path.join(files, name))
    outcome = open_hostile(files)
    assert outcome.kind == "refused", outcome
    assert "leads out of" in outcome.detail
