"""The public names as a type checker sees them. mypy reads this file; it is never run."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, assert_type

import attrs
import jax
from etils import epath

import ckptkit
from ckptkit import errors
from ckptkit.args import CheckpointArgs, Composite, JsonSave, StandardRestore, StandardSave, register_with_handler
from ckptkit.handlers import AsyncCheckpointHandler, CheckpointHandler, StandardCheckpointHandler
from ckptkit.hookspecs import hookimpl
from ckptkit.leaves import ArrayRestoreArgs, RestoreArgs, SaveArgs
from ckptkit.options import AsyncOptions, FileOptions, MultiprocessingOptions
from ckptkit.reports import CleanReport, Part, ProgressEvent, RestoreReport, SaveReport, VerifyReport


def everyday(path: pathlib.Path, tree: dict[str, jax.Array]) -> None:
    ckptkit.save(path, tree)
    ckptkit.save("relative/path", StandardSave(tree))
    ckptkit.save(epath.Path("path"), {"a": 1})
    assert_type(ckptkit.restore(path), Any)
    assert_type(ckptkit.restore(path, tree), Any)
    assert_type(ckptkit.restore(path, tree, on_corrupt="skip"), Any)
    assert_type(ckptkit.save_async(path, tree).done(), bool)
    assert_type(ckptkit.verify(path), VerifyReport)
    assert_type(ckptkit.verify(str(path)).corrupt, list[Part])
    assert_type(ckptkit.clean(path, dry_run=True), CleanReport)


def checkpointers(path: pathlib.Path, tree: Any) -> None:
    with ckptkit.Checkpointer() as checkpointer:
        assert_type(checkpointer, ckptkit.Checkpointer)
        checkpointer.save(path, StandardSave(tree), force=True)
        checkpointer.save(path, args=Composite(state=StandardSave(tree), note=JsonSave({"a": [1]})))
        assert_type(checkpointer.restore(path, args=StandardRestore(tree)), Any)
    with ckptkit.AsyncCheckpointer(
        StandardCheckpointHandler(),
        async_options=AsyncOptions(timeout_secs=60),
        multiprocessing_options=MultiprocessingOptions(primary_host=0),
        file_options=FileOptions(path_permission_mode=0o750),
    ) as in_background:
        assert_type(in_background, ckptkit.AsyncCheckpointer)
        in_background.save(path, args=StandardSave(tree))
        in_background.wait_until_finished()
        in_background.check_for_errors()
    with ckptkit.StandardCheckpointer() as standard:
        assert_type(standard, ckptkit.StandardCheckpointer)
        standard.save(path, tree, force=True)
        standard.restore(path, tree, strict=False)


def per_leaf() -> None:
    assert_type(SaveArgs(chunk_byte_size=1 << 20).chunk_byte_size, int | None)
    requests: Sequence[RestoreArgs] = [RestoreArgs(), ArrayRestoreArgs(global_shape=(4, 2))]
    assert_type(requests[0].dtype, Any)


class WordsHandler(CheckpointHandler):
    def save(self, directory: epath.Path, args: WordsArgs) -> None:
        (directory / "words").write_text("\n".join(args.words))

    def restore(self, directory: epath.Path, args: WordsArgs) -> list[str]:
        text: str = (directory / "words").read_text()
        return text.split("\n")


class SlowWordsHandler(AsyncCheckpointHandler):
    async def async_save(self, directory: epath.Path, args: WordsArgs) -> list[Future[Any]] | None:
        return None

    def restore(self, directory: epath.Path, args: WordsArgs) -> list[str]:
        return []


@register_with_handler(WordsHandler, for_save=True, for_restore=True)
@attrs.frozen
class WordsArgs(CheckpointArgs):
    words: tuple[str, ...] = ()


assert_type(WordsArgs(("to", "be")).words, tuple[str, ...])


@hookimpl
def ckptkit_register(registry: ckptkit.Registry) -> None:
    """Decorated functions keep their types, and so does the registry they are given."""
    assert_type(registry, ckptkit.Registry)


@hookimpl
def ckptkit_save_committed(report: SaveReport) -> None:
    assert_type(report.byte_count, int)


@hookimpl
def ckptkit_restored(report: RestoreReport) -> None:
    assert_type(report.verified, bool)


@hookimpl
def ckptkit_progress(event: ProgressEvent) -> None:
    assert_type(event.finished, bool)


def caught(path: str) -> None:
    try:
        ckptkit.restore(path)
    except errors.NotFoundError as error:
        as_builtin: FileNotFoundError = error
        assert_type(as_builtin.filename, Any)
    except errors.CheckpointError:
        raise
