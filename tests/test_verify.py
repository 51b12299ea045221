"""Checksums of everything: the list of files, damaged leaves, `ckptkit.verify`, and the command line."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xxhash

import ckptkit
from ckptkit import args, cli, commit, errors, file_list, inspection
from ckptkit.file_list import FILE_LIST, read_file_list, write_file_list
from ckptkit.location import FileLocation
from ckptkit.meeting import Meeting
from ckptkit.reports import ProgressEvent, RestoreReport
from ckptkit.saving import Beginning
from ckptkit.testing import abstract, assert_same

TREE = {
    "w": np.arange(400.0),
    "layer": {"b": jnp.arange(3, dtype=jnp.bfloat16), "none": np.zeros((0, 4))},
    "key": jax.random.key(5),
    "n": 7,
    "flag": True,
}


def save(path: Path, tree: Any = TREE, **options: Any) -> Path:
    with ckptkit.Checkpointer(ckptkit.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, tree)
    return path


def save_composite(path: Path) -> Path:
    items = args.Composite(
        state=args.StandardSave({"w": np.arange(3.0)}), note=args.JsonSave({"lr": 0.1}), one=args.ArraySave(np.arange(4))
    )
    with ckptkit.Checkpointer() as checkpointer:
        checkpointer.save(path, items)
    return path


def flip(file: Path, position: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def spoil(path: Path, needle: bytes) -> Path:
    """Flips a bit in the middle of the bytes `needle`, wherever they are stored."""
    for file in path.rglob("*"):
        if file.is_file() and (at := file.read_bytes().find(needle)) >= 0:
            flip(file, at + len(needle) // 2)
            return file
    raise AssertionError("stored nowhere")


def states(path: Path) -> dict[str, str]:
    report = ckptkit.verify(path)
    return {part.name: part.state for part in (*report.files, *report.leaves)}


# The list of files


def test_every_file_is_listed_except_those_that_the_index_covers(tmp_path: Path) -> None:
    path = save_composite(tmp_path / "c")
    listed = json.loads((path / FILE_LIST).read_text())["files"]
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    covered = {file for file in files if file.startswith(("state/d/", "one/checkpoint/"))}
    assert covered
    assert set(listed) == files - covered - {FILE_LIST}


def test_orbax_ignores_the_list(tmp_path: Path) -> None:
    ckptkit.save(tmp_path / "c", {"w": np.arange(4.0)})
    assert (tmp_path / "c" / FILE_LIST).exists()
    with ocp.StandardCheckpointer() as theirs:
        assert theirs.restore(tmp_path / "c")["w"].tolist() == [0, 1, 2, 3]


class Foreign(ckptkit.CheckpointHandler):
    """A third party's handler, with files in folders."""

    def __init__(self, name: str = "deep/er/data.bin") -> None:
        self._name = name

    def save(self, directory: Any, *, args: Any) -> None:
        (directory / self._name).parent.mkdir(parents=True, exist_ok=True)
        (directory / self._name).write_bytes(args.data)

    def restore(self, directory: Any, *, args: Any) -> bytes:
        return (directory / self._name).read_bytes()


class ForeignArgs(args.CheckpointArgs):
    def __init__(self, data: bytes = b"") -> None:
        self.data = data


def foreign(name: str = "deep/er/data.bin") -> ckptkit.Checkpointer:
    registry = ckptkit.Registry.with_builtins()
    registry.add_args(ForeignArgs, Foreign, for_save=True, for_restore=True)
    return ckptkit.Checkpointer(Foreign(name), registry=registry)


def test_files_of_any_handler_are_covered(tmp_path: Path) -> None:
    with foreign() as checkpointer:
        checkpointer.save(tmp_path / "c", ForeignArgs(bytes(3 << 20)))
        assert len(checkpointer.restore(tmp_path / "c")) == 3 << 20
        flip(tmp_path / "c" / "deep" / "er" / "data.bin", 2_000_000)
        with pytest.raises(errors.CorruptCheckpointError, match=r"1 of 2 files differ.*\n  deep/er/data\.bin: 3145728 bytes"):
            checkpointer.restore(tmp_path / "c")


def test_a_handler_may_not_write_a_file_of_the_lists_name(tmp_path: Path) -> None:
    with foreign(FILE_LIST) as checkpointer, pytest.raises(errors.ArgsError, match="list of files"):
        checkpointer.save(tmp_path / "c", ForeignArgs(b"x"))
    assert not list(tmp_path.iterdir())


def test_a_named_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    file = save_composite(tmp_path / "c") / "note" / "metadata"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(errors.CorruptCheckpointError, match="expected a regular file"):
        ckptkit.restore(tmp_path / "c")


def test_links_to_directories_are_not_followed(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / name).symlink_to(".")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    assert FileLocation(tmp_path).files() == ["folder/file"]
    assert FileLocation(tmp_path).files({"folder"}) == []


def test_a_name_in_the_list_never_leads_outside(tmp_path: Path) -> None:
    path = save(tmp_path / "c")
    from ckptkit import file_list

    (path / FILE_LIST).write_bytes(file_list._encode({"../outside": file_list.Listed(0, "0" * 16)}, {}))
    with pytest.raises(errors.CorruptCheckpointError, match="does not stay inside"):
        ckptkit.restore(path)


def test_absence_of_the_list_is_no_error_and_visible(tmp_path: Path) -> None:
    path = save(tmp_path / "ours")
    with ocp.StandardCheckpointer() as theirs:
        theirs.save(tmp_path / "theirs", {"w": np.arange(4.0)})
    with ckptkit.Checkpointer() as checkpointer:
        assert checkpointer.metadata(path).has_checksums
        assert not checkpointer.metadata(tmp_path / "theirs").has_checksums
        (path / FILE_LIST).unlink()
        assert not checkpointer.metadata(path).has_checksums
    assert_same(ckptkit.restore(path), TREE)


def test_a_damaged_item_does_not_hold_back_the_others(tmp_path: Path) -> None:
    path = save_composite(tmp_path / "c")
    flip(path / "note" / "metadata", 3)
    with ckptkit.Checkpointer() as checkpointer:
        with pytest.raises(errors.CorruptCheckpointError, match=r"note/metadata.*(.|\n)*can be restored by name"):
            checkpointer.restore(path)
        restored = checkpointer.restore(path, args.Composite(state=None, one=None))
    assert restored["state"]["w"].tolist() == [0, 1, 2]


def test_metadata_verifies_what_it_reads_and_nothing_else(tmp_path: Path) -> None:
    path = save_composite(tmp_path / "c")
    flip(path / "note" / "metadata", 3)
    with ckptkit.Checkpointer() as checkpointer:
        assert set(checkpointer.metadata(path).item_metadata) == {"note", "one", "state"}
        flip(path / "state" / "_METADATA", 30)
        with pytest.raises(errors.CorruptCheckpointError, match="state/_METADATA"):
            checkpointer.metadata(path)


def test_an_array_that_is_not_the_one_that_was_written_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "c", use_ocdbt=False)
    document = path / "layer.none" / ".zarray"
    document.write_text(document.read_text().replace('"shape":[0,4]', '"shape":[0,5]'))
    with pytest.raises(errors.CorruptCheckpointError, match=r"'none'.*stored as float64 of shape \(0, 5\).*written as.*\(0, 4\)"):
        ckptkit.restore(path)


# Damaged leaves


BYTES = np.arange(400.0).tobytes()


@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_the_error_tells_what_is_damaged_and_what_is_whole(tmp_path: Path, use_ocdbt: bool) -> None:
    path = save(tmp_path / "c", use_ocdbt=use_ocdbt)
    file = spoil(path, BYTES)
    with pytest.raises(errors.CorruptCheckpointError, match=r"1 of 6 leaves .*\n  \('w',\): chunk \(\(0, 400\),\)") as caught:
        ckptkit.restore(path)
    assert f"it lies in {file.relative_to(path)} from byte" in str(caught.value)
    assert "5 are whole" in str(caught.value)
    assert caught.value.corrupt == (("w",),)
    assert set(caught.value.whole) == {("layer", "b"), ("layer", "none"), ("key",), ("n",), ("flag",)}


def _with_target(path: Path) -> Any:
    return ckptkit.restore(path, abstract(TREE), on_corrupt="skip")


def _partial(path: Path) -> Any:
    return ckptkit.restore(path, args.PyTreeRestore(on_corrupt="skip"))


@pytest.mark.parametrize("restore", [lambda path: ckptkit.restore(path, on_corrupt="skip"), _with_target, _partial])
@pytest.mark.parametrize("options", [{}, {"use_ocdbt": False}, {"use_compression": True}], ids=["ocdbt", "zarr", "zstd"])
def test_skip_restores_the_healthy_rest(tmp_path: Path, options: dict[str, bool], restore: Callable[[Path], Any]) -> None:
    path = save(tmp_path / "c", **options)
    if options.get("use_compression"):
        data = max((path / "d").iterdir(), key=lambda file: file.stat().st_size)
        flip(data, data.read_bytes().find(b"\x28\xb5\x2f\xfd") + 30)  # in the frame of the largest chunk
    else:
        spoil(path, BYTES)
    with pytest.warns(UserWarning, match=r"1 of 6 leaves differ.*\n  \('w',\).*(.|\n)*`\.\.\.` in the restored tree"):
        restored = restore(path)
    assert_same(restored, {**TREE, "w": ckptkit.checkpoint_utils.PLACEHOLDER})


def test_skip_tells_observers_which_leaves_it_left_out(tmp_path: Path) -> None:
    seen: list[RestoreReport] = []

    class Observer:
        @ckptkit.hookimpl
        def ckptkit_restored(self, report: RestoreReport) -> None:
            seen.append(report)

    spoil(save(tmp_path / "c"), BYTES)
    with ckptkit.Checkpointer(observers=[Observer()]) as checkpointer, pytest.warns(UserWarning, match="differ"):
        checkpointer.restore(tmp_path / "c", args.StandardRestore(on_corrupt="skip"))
    assert [report.corrupt for report in seen] == [(("w",),)]


def test_skip_leaves_out_arrays_that_are_gone(tmp_path: Path) -> None:
    path = save(tmp_path / "c", use_ocdbt=False)
    (path / "w" / "0").unlink()
    shutil.rmtree(path / "n")
    with pytest.raises(errors.NotFoundError):
        ckptkit.restore(path)
    with pytest.warns(UserWarning, match="2 of 6 leaves"):
        assert_same(ckptkit.restore(path, on_corrupt="skip"), {**TREE, "w": ..., "n": ...})


def test_on_corrupt_is_one_of_two_words(tmp_path: Path) -> None:
    with pytest.raises(errors.ArgsError, match="one of raise, skip"):
        args.StandardRestore(on_corrupt="ignore")
    with pytest.raises(errors.ArgsError, match="goes with a tree"):
        ckptkit.restore(tmp_path, args.JsonRestore(), on_corrupt="skip")


def test_a_whole_checkpoint_restores_without_a_warning(tmp_path: Path) -> None:
    assert_same(ckptkit.restore(save(tmp_path / "c"), on_corrupt="skip"), TREE)


# One bit in many bytes


SMALL = args.Composite(
    state=args.PyTreeSave({"w": np.arange(40.0), "e": np.zeros((0, 3)), "k": jax.random.key(1), "s": "text", "n": 5}),
    note=args.JsonSave({"lr": 0.125}),
)

KINDS: dict[str, dict[str, Any]] = {
    "ocdbt": {},
    "ocdbt zstd": {"use_compression": True},
    "ocdbt zarr3": {"use_zarr3": True},
    "zarr": {"use_ocdbt": False},
    "zarr zstd": {"use_ocdbt": False, "use_compression": True},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
    "zarr3 crc32c": {"use_ocdbt": False, "use_zarr3": True, "zarr3_crc32c": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_restores_a_wrong_value(tmp_path: Path, kind: str) -> None:
    step = 13  # `faults/test_corruption.py` tries every byte
    handler = ckptkit.CompositeCheckpointHandler("note", state=ckptkit.PyTreeCheckpointHandler(**KINDS[kind]))
    wrong, noticed = [], 0
    with ckptkit.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "c", SMALL)
        expected = {name: item.item for name, item in SMALL.items()}
        for file in [file for file in (tmp_path / "c").rglob("*") if file.is_file()]:
            data = file.read_bytes()
            for at in range(len(data) % step, len(data), step):
                flip(file, at, at % 8)
                try:
                    assert_same(dict(checkpointer.restore(tmp_path / "c")), expected)
                except errors.CheckpointError:
                    noticed += 1
                except BaseException as error:
                    wrong.append((str(file), at, error))
                file.write_bytes(data)
    assert wrong == []
    assert noticed > 10


# verify


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_a_whole_checkpoint_whole(tmp_path: Path, kind: str) -> None:
    report = ckptkit.verify(save(tmp_path / "c", **KINDS[kind]))
    assert (report.state, report.corrupt, report.listed) == ("whole", [], True)
    assert {part.name for part in report.leaves} == {
        "('w',)",
        "('layer', 'b')",
        "('layer', 'none')",
        "('key',)",
        "('n',)",
        "('flag',)",
    }
    assert report.byte_count == sum(part.byte_count for part in report.files) + 3200 + 6 + 8 + 8 + 1


def test_verify_names_files_and_leaves_that_are_damaged(tmp_path: Path) -> None:
    path = save_composite(tmp_path / "c")
    flip(path / "note" / "metadata", 3)
    (path / "one" / "checkpoint" / "0").unlink()
    found = states(path)
    assert {name for name, state in found.items() if state != "whole"} == {"note/metadata", "one: ('checkpoint',)"}
    assert found["state: ('w',)"] == "whole"


def test_verify_finds_trees_wherever_a_handler_puts_them(tmp_path: Path) -> None:
    key = jax.random.key(12345)
    with ckptkit.Checkpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", args.Composite(rng=args.JaxRandomKeySave(key), note=args.JsonSave({})))
    assert ckptkit.verify(tmp_path / "c").state == "whole"
    spoil(tmp_path / "c", np.asarray(jax.random.key_data(key)).tobytes())
    assert [part.name.split(":")[0] for part in ckptkit.verify(tmp_path / "c").corrupt] == ["rng/jax_random_key"]


def test_verify_reports_a_tree_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    path = save_composite(tmp_path / "c")
    for name in ("manifest.ocdbt", "_METADATA"):
        flip(path / "state" / name, 20)
    found = states(path)
    assert (found["state/"], found["state/manifest.ocdbt"], found["one: ('checkpoint',)"]) == ("corrupt", "corrupt", "whole")


def test_verify_reports_a_damaged_list_and_what_it_can_tell_besides(tmp_path: Path) -> None:
    flip(save(tmp_path / "c") / FILE_LIST, 200)
    found = states(tmp_path / "c")
    assert {name: state for name, state in found.items() if state != "whole"} == {FILE_LIST: "corrupt"}
    assert found["('w',)"] == "whole"


@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_verify_says_that_orbax_has_no_checksums(tmp_path: Path, use_ocdbt: bool) -> None:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(use_ocdbt=use_ocdbt)) as theirs:
        theirs.save(tmp_path / "c", args=ocp.args.StandardSave({"a": {"w": np.arange(400.0)}}))
    report = ckptkit.verify(tmp_path / "c")
    assert (report.state, report.listed, [(part.name, part.state) for part in report.leaves]) == (
        *("unchecked", False),
        [("('a', 'w')", "unchecked")],
    )


def test_verify_of_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError):
        ckptkit.verify(tmp_path / "c")
    with pytest.raises(errors.FormatError, match="is no checkpoint"):
        ckptkit.verify(tmp_path)
    (tmp_path / "c.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(errors.IncompleteError):
        ckptkit.verify(tmp_path / "c.orbax-checkpoint-tmp")


def test_verify_tells_how_far_it_is(tmp_path: Path) -> None:
    seen: list[ProgressEvent] = []

    class Observer:
        @ckptkit.hookimpl
        def ckptkit_progress(self, event: ProgressEvent) -> None:
            seen.append(event)

    report = ckptkit.verify(save(tmp_path / "c"), observers=[Observer()])
    assert (seen[-1].operation, seen[-1].finished, seen[-1].done_byte_count) == ("verify", True, report.byte_count)


# The command line


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.main(arguments)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_verify_exits_with_0_for_what_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "c")
    status, out, err = run("verify", str(tmp_path / "c"), capsys=capsys)
    assert (status, out.count("\n"), err) == (0, 1, "")
    assert "whole: every byte is as it was written" in out
    assert "whole  ('w',)  3200 bytes\n" in run("verify", "-v", str(tmp_path / "c"), capsys=capsys)[1]


def test_verify_exits_with_1_for_what_is_corrupt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(save(tmp_path / "c"), BYTES)
    status, out, _ = run("verify", str(tmp_path / "c"), capsys=capsys)
    assert status == 1
    assert out.startswith("corrupt  ('w',)  3200 bytes: chunk ((0, 400),): 1 of 1 blocks differ")


def test_verify_exits_with_2_where_it_cannot_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (save(tmp_path / "c") / FILE_LIST).unlink()
    assert run("verify", str(tmp_path / "c"), capsys=capsys)[0] == 2
    status, out, err = run("verify", str(tmp_path / "nowhere"), capsys=capsys)
    assert (status, out) == (2, "")
    assert "no checkpoint here" in err


def test_json_has_the_whole_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "c")
    status, out, _ = run("verify", "--json", str(tmp_path / "c"), capsys=capsys)
    document = json.loads(out)
    assert (status, document["state"], {part["state"] for part in document["leaves"]}) == (0, "whole", {"whole"})


def test_the_command_line_runs_as_a_module_and_touches_no_device(tmp_path: Path) -> None:
    save(tmp_path / "c")
    code = (
        "import sys; from ckptkit.cli import main; status = main(['verify', sys.argv[1]]); import jax;"
        "print(jax._src.xla_bridge.backends_are_initialized()); sys.exit(status)"
    )
    done = fresh.run(code, tmp_path / "c")
    assert (done.returncode, done.stdout.splitlines()[-1], done.stderr) == (0, "False", "")
    command = [sys.executable, "-m", "ckptkit", "clean", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing to do\n", "")


def shell(command: str, **environment: str) -> tuple[int, str]:
    """Runs `$CKPTKIT` in a shell: its exit status, and what it wrote to stderr."""
    environment = {**os.environ, "CKPTKIT": f"{sys.executable} -m ckptkit", **environment}
    done = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, timeout=60, check=False)
    return done.returncode, done.stderr.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell")
@pytest.mark.parametrize("state", ["whole", "corrupt", "unchecked"])
def test_a_reader_that_leaves_early_changes_no_exit_status(tmp_path: Path, state: str) -> None:
    save(tmp_path / "c")
    if state == "corrupt":
        spoil(tmp_path / "c", BYTES)
    elif state == "unchecked":
        (tmp_path / "c" / FILE_LIST).unlink()
    expected = {"whole": 0, "corrupt": 1, "unchecked": 2}[state]
    # The reader has left before anything is written: it holds the pipe open no longer than `true` runs.
    command = f'{{ $CKPTKIT verify -v "{tmp_path / "c"}"; echo $? >&2; }} | true'
    assert shell(command) == (0, f"{expected}\n")
    assert shell(f'$CKPTKIT verify "{tmp_path / "c"}" >&-') == (expected, "")
    assert shell(f'$CKPTKIT verify "{tmp_path / "c"}" 2>&-') == (expected, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_what_cannot_be_printed_says_nothing_of_the_checkpoint(tmp_path: Path) -> None:
    spoil(save(tmp_path / "c"), BYTES)
    for command in (f'verify "{tmp_path / "c"}"', "plugins"):
        status, complaint = shell(f"$CKPTKIT {command} > /dev/full")
        assert (status, complaint.count("\n")) == (2, 1), complaint
        assert "what was found cannot be printed: [Errno 28]" in complaint


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such shell")
def test_what_an_encoding_lacks_is_printed_escaped(tmp_path: Path) -> None:
    save(tmp_path / "\u00e9")
    command = f'$CKPTKIT verify "{tmp_path / "*"}" >&2'.replace('*"', '"*')
    status, printed = shell(command, PYTHONIOENCODING="ascii")
    assert (status, r"/\xe9: whole: every byte" in printed) == (0, True), printed


def test_a_command_that_fails_says_nothing_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("somewhere deep")

    monkeypatch.setattr(cli, "verify", fails)
    status, out, err = run("verify", str(tmp_path), capsys=capsys)
    assert (status, out) == (2, "")
    assert "ZeroDivisionError: somewhere deep\nckptkit: failed; this says nothing" in err


def test_a_command_that_cannot_be_imported_says_nothing_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "jax.py").write_text("raise ImportError('cannot allocate memory')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "ckptkit", "verify", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot allocate memory" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("tqdm", ["tqdm", "nothing"])
def test_a_terminal_sees_progress(tmp_path: Path, tqdm: str) -> None:
    import termios

    save(tmp_path / "c")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 400))
    code = (
        "import sys; from ckptkit.cli import main\n"
        "if sys.argv[2] != 'tqdm': sys.modules['tqdm'] = sys.modules['tqdm.auto'] = None\n"
        "sys.exit(main(['verify', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, tmp_path / "c", tqdm]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=60, check=False)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert f"verify {tmp_path / 'c'}: " in shown


# clean


def _leftover(path: Path) -> Path:
    pending = commit.begin(FileLocation(path), force=True, mode=None)
    pending.temporary.write_bytes("d/half", b"half")
    pending._lock.close()  # what the death of the process does
    return path.with_name(f"{path.name}.orbax-checkpoint-tmp")


def test_clean_removes_what_killed_saves_left_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path / "whole")
    (tmp_path / "notes.orbax-checkpoint-tmp").write_text("a file")
    leftover = _leftover(tmp_path / "killed")
    before = sorted(os.listdir(tmp_path))
    assert ckptkit.clean(tmp_path, dry_run=True).removed == [str(leftover)]
    assert sorted(os.listdir(tmp_path)) == before
    assert ckptkit.clean(tmp_path).removed == [str(leftover)]
    assert sorted(os.listdir(tmp_path)) == ["notes.orbax-checkpoint-tmp", "whole"]


def test_clean_leaves_a_live_writer_alone(tmp_path: Path) -> None:
    pending = commit.begin(FileLocation(tmp_path / "c"), force=False, mode=None)
    report = ckptkit.clean(tmp_path)
    assert (report.removed, list(report.kept)) == ([], [pending.temporary.url])
    pending.commit()


def test_clean_leaves_saves_of_orbax_alone(tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as theirs:
        theirs.save(tmp_path / "c", {"w": np.arange(4.0)})
    os.rename(tmp_path / "c", tmp_path / "c.orbax-checkpoint-tmp")
    report = ckptkit.clean(tmp_path)
    assert (report.removed, list(report.kept.values())) == ([], ["another program wrote it"])


def test_clean_finishes_interrupted_overwrites(tmp_path: Path) -> None:
    aside = ".ckptkit-old.orbax-checkpoint-tmp"
    for name in ("a", "b"):
        save(tmp_path / name)
        shutil.copytree(tmp_path / name, tmp_path / f"{name}{aside}")
    shutil.rmtree(tmp_path / "a")
    shutil.copytree(tmp_path / "b", tmp_path / "b.orbax-checkpoint-tmp")  # what the exchange left where nobody deleted it
    report = ckptkit.clean(tmp_path)
    assert (report.restored, len(report.removed)) == ([str(tmp_path / "a")], 2)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert_same(ckptkit.restore(tmp_path / "a"), TREE)


def test_clean_prints_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leftover = _leftover(tmp_path / "killed")
    assert run("clean", "-n", str(tmp_path), capsys=capsys) == (0, f"would be removed: {leftover}\n", "")
    assert run("clean", str(tmp_path), capsys=capsys) == (0, f"removed: {leftover}\n", "")
    assert run("clean", str(tmp_path / "nowhere"), capsys=capsys)[0] == 2


def test_clean_refuses_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.ArgsError, match="s3://bucket: clean takes the path of a directory on this machine"):
        ckptkit.clean("s3://bucket")
    assert run("clean", "s3://bucket", capsys=capsys)[0] == 2


# zarr's own checksums


@pytest.mark.filterwarnings("ignore")  # Orbax warns of much, and awaits not all that it began
@pytest.mark.parametrize("use_ocdbt", [True, False])
def test_orbax_verifies_chunks_with_zarrs_own_checksum(tmp_path: Path, use_ocdbt: bool) -> None:
    tree = {"w": TREE["w"]}  # and nothing beside it, which Orbax would still be reading when its event loop is closed
    path = save(tmp_path / "c", tree, use_ocdbt=use_ocdbt, use_zarr3=True, zarr3_crc32c=True)
    assert_same(ckptkit.restore(path), tree)
    assert _read_by_orbax(path) == TREE["w"].tolist()
    spoil(path, BYTES)
    assert re.search("crc|checksum|digest", str(_read_by_orbax(path)), re.IGNORECASE)
    gc.collect()  # what Orbax leaves unawaited, here where its warnings are ignored


def _read_by_orbax(path: Path) -> Any:
    """One of the values, or what Orbax says is wrong."""
    with ocp.PyTreeCheckpointer() as theirs:
        try:
            return theirs.restore(path)["w"].tolist()
        except ValueError as error:
            return str(error)


def test_zarrs_checksums_need_its_version_3() -> None:
    with pytest.raises(errors.ArgsError, match="needs use_zarr3=True"):
        ckptkit.StandardCheckpointHandler(zarr3_crc32c=True)


def test_the_list_of_files_works_in_places_without_directories(request: pytest.FixtureRequest) -> None:
    place = ckptkit.default_registry().location("memory://test-verify/c")
    request.addfinalizer(place.delete)
    for force in (False, True):  # right in the place; in a folder of it
        ckptkit.save(place.url, TREE, force=force)
        report = ckptkit.verify(place.url)
        assert (report.state, report.listed) == ("whole", True)
        assert {"commit_success.txt", "ckptkit_writer.txt"}.isdisjoint(part.name for part in report.files)
    (folder,) = [name for name, is_directory in place.names().items() if is_directory]
    metadata = place.read_bytes(f"{folder}/_METADATA")
    place.write_bytes(f"{folder}/_METADATA", metadata.replace(b"w", b"v", 1))
    with pytest.raises(errors.CorruptCheckpointError, match="_METADATA"):
        ckptkit.restore(place.url)


def test_a_save_lists_no_file_of_another_one_in_the_same_place(request: pytest.FixtureRequest) -> None:
    place = ckptkit.default_registry().location("memory://test-verify/d")
    request.addfinalizer(place.delete)
    first = commit.begin(place, force=False, mode=None)
    first.temporary.write_bytes("a", b"1")
    second = commit.begin(place, force=True, mode=None)
    second.temporary.write_bytes("b", b"2")
    write_file_list(first.temporary, (), {}, {}, {})
    listed = read_file_list(first.temporary)
    assert listed is not None
    assert list(listed.files) == ["a"]


@pytest.mark.parametrize("place", ["alone", "item", "relative", "memory"])
def test_files_that_came_later_than_the_list_say_nothing_of_the_leaves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    target: Any = {"alone": tmp_path / "c", "item": tmp_path / "c", "relative": "c", "memory": "memory://test-verify/e"}[place]
    root = ckptkit.default_registry().location(target)
    request.addfinalizer(root.delete)
    tree = {"raw": jnp.arange(2, dtype=jnp.uint32)}
    ckptkit.save("keys", {"raw": jax.random.key(0)})
    ckptkit.save(target, args.Composite(state=args.StandardSave(tree)) if place == "item" else tree)
    prefix, of_item = ("state/", (lambda item: item["state"])) if place == "item" else ("", lambda tree: tree)
    root.write_bytes(f"{prefix}array_metadatas/process_1", Path("keys/array_metadatas/process_0").read_bytes())
    assert_same(of_item(ckptkit.restore(target)), tree)
    with ckptkit.Checkpointer() as checkpointer:
        assert of_item(checkpointer.metadata(target).item_metadata)["raw"].dtype == np.uint32
    assert inspection.info(target).items[0].leaf_typestrs == {"jax.Array": 1}
    status, out, _ = run("verify", str(target), capsys=capsys)
    assert status == 0
    assert f"unchecked  {prefix}array_metadatas/process_1  0 bytes: came later than the list of files" in out


def test_an_item_that_no_list_has_is_restored_with_all_of_its_files(tmp_path: Path) -> None:
    save_composite(tmp_path / "c")
    tree = {"key": jax.random.key(0), "w": jnp.arange(8.0)}
    ckptkit.save(tmp_path / "other", args.Composite(late=args.StandardSave(tree)))
    shutil.copytree(tmp_path / "other" / "late", tmp_path / "c" / "late")
    assert_same(ckptkit.restore(tmp_path / "c", args.Composite(late=args.StandardRestore()))["late"], tree)


@pytest.mark.parametrize("mark", [1, 1.0, False, "true", [True]])
def test_a_listed_file_is_a_head_where_true_says_so_and_nothing_else(tmp_path: Path, mark: Any) -> None:
    body = json.dumps({"version": 1, "algorithm": "xxh3_64", "files": {"a": [1, "0" * 16, mark]}})[1:]
    (tmp_path / FILE_LIST).write_text(f'{{"checksum": "{xxhash.xxh3_64_hexdigest(body.encode())}", {body}')
    with pytest.raises(errors.FormatError, match="the entry of 'a'"):
        read_file_list(FileLocation(tmp_path))


def test_no_thread_is_started_for_the_head_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 64 << 20)
    monkeypatch.setattr(file_list, "Workers", lambda *arguments: pytest.fail("threads were started"))
    location = FileLocation(tmp_path)
    write_file_list(location, (), {f"{location.url}/large": 10}, {}, {})
    listed = read_file_list(location)
    assert listed is not None
    assert (listed.files["large"].size, listed.files["large"].is_head) == (10, True)
    listed.check(location, lambda path: True)


def test_a_save_that_was_given_up_begins_nothing(tmp_path: Path) -> None:
    location = FileLocation(tmp_path / "c")
    begin = Beginning(Meeting(), ckptkit.default_registry(), location, force=False, mode=None, facts={})
    later = begin.later()
    begin.abandon(KeyboardInterrupt())
    with pytest.raises(errors.CheckpointError, match="given up"):
        os.fspath(later)
    assert os.listdir(tmp_path) == []
