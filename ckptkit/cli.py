"""The command line. A command is one function: its name, its docstring as help, its arguments, and what runs it.

Exit status: 0, all is well (verify: the checkpoint is whole); 1, something is wrong with a checkpoint (verify: bytes differ
from what was written, or are missing), or, of `plugins`, one failed to load; 2, it cannot be told (verify: no checksums to
compare with; no checkpoint; files that cannot be read; wrong arguments), or what was found could not be printed, or the command
itself failed. A script may delete a checkpoint for a 1, so nothing else may end with it: a command finds out everything before a
line of it is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import attrs

from ckptkit import commit, errors, inspection, progress
from ckptkit.hookspecs import hookimpl
from ckptkit.reports import ProgressEvent
from ckptkit.verification import verify

__all__ = ["main"]

Run = Callable[[argparse.Namespace], tuple[int, str]]
"""Gives the exit status, and what to print."""

_STATUS: Final = {"whole": 0, "corrupt": 1, "unchecked": 2}
_VERDICT: Final = {
    "whole": "whole: every byte is as it was written",
    "corrupt": "corrupt",
    "unchecked": "readable, but without a list of checksums: whether the bytes are as they were written cannot be told",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is returned."""
    parser = argparse.ArgumentParser(prog="ckptkit", description="Looks after checkpoints of ckptkit and Orbax.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for declare in _COMMANDS:
        text = inspect.getdoc(declare) or ""
        command = commands.add_parser(declare.__name__.strip("_"), help=text.partition("\n")[0], description=text)
        command.set_defaults(run=declare(command))
    options = parser.parse_args(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints while it is imported is no part of the answer
            status, text = options.run(options)
        _print(text)
    except errors.CheckpointError as error:
        _complain(f"ckptkit: {error}")
        return 1 if isinstance(error, errors.CorruptCheckpointError) else 2
    except Exception:  # noqa: BLE001 - whatever it is, it is no damage of a checkpoint
        _complain(f"{traceback.format_exc()}ckptkit: failed; this says nothing about any checkpoint.")
        return 2
    return int(status)


def _verify(command: argparse.ArgumentParser) -> Run:
    """Reads every byte of a checkpoint and compares it with its checksum.

    Exit status: 0 whole, 1 corrupt, 2 cannot be told (no checksums, as in Orbax's checkpoints; no checkpoint; not readable).
    """
    command.add_argument("path", help="a checkpoint")
    command.add_argument("--json", action="store_true", help="print the whole report as JSON")
    command.add_argument("--verbose", "-v", action="store_true", help="print what is whole, too")

    def run(options: argparse.Namespace) -> tuple[int, str]:
        report = verify(options.path, observers=_observers())
        status = _STATUS[report.state]
        if options.json:
            return status, _json({"state": report.state, **attrs.asdict(report)})
        shown = [part for part in (*report.files, *report.leaves) if options.verbose or part.problem]
        lines = [f"{part.state}  {part.name}  {part.byte_count} bytes{part.problem and ': '}{part.problem}" for part in shown]
        speed = f"{report.byte_count / 1e6:.1f} MB in {report.total_secs:.2f} s"
        counts = f"{len(report.files)} files, {len(report.leaves)} leaves, {len(report.corrupt)} corrupt"
        return status, _lines([*lines, f"{report.path}: {_VERDICT[report.state]} ({counts}; {speed})"])

    return run


def _clean(command: argparse.ArgumentParser) -> Run:
    """Removes what killed saves left in a directory of checkpoints.

    What a live writer holds, and what another program wrote, is left alone.
    """
    command.add_argument("root", help="the directory that holds checkpoints")
    command.add_argument("--dry-run", "-n", action="store_true", help="only print what would be done")
    command.add_argument("--json", action="store_true", help="print the report as JSON")

    def run(options: argparse.Namespace) -> tuple[int, str]:
        report = commit.clean(options.root, dry_run=options.dry_run)
        if options.json:
            return 0, _json(attrs.asdict(report))
        would = "would be " if options.dry_run else ""
        lines = [f"{would}removed: {path}" for path in report.removed]
        lines += [f"{would}restored: {path}" for path in report.restored]
        lines += [f"kept: {path} ({reason})" for path, reason in report.kept.items()]
        return 0, _lines(lines or ["nothing to do"])

    return run


def _plugins(command: argparse.ArgumentParser) -> Run:
    """Lists every plugin: who brought it, what it registered, and in full what kept it from loading.

    Exit status: 0 where all are loaded, 1 where one failed to load.
    """
    command.add_argument("--json", action="store_true", help="print the list as JSON")

    def run(options: argparse.Namespace) -> tuple[int, str]:
        found = inspection.plugins()
        status = 1 if any(plugin.error for plugin in found) else 0
        if options.json:
            return status, _json([attrs.asdict(plugin) for plugin in found])
        return status, _lines(line for plugin in found for line in _plugin_lines(plugin))

    return run


def _plugin_lines(plugin: inspection.PluginInfo) -> Iterator[str]:
    entry_point = "built in" if plugin.entry_point is None else f"entry point {plugin.entry_point} = {plugin.module}"
    yield f"{plugin.distribution} {plugin.version} ({entry_point}){': failed to load' if plugin.error else ''}"
    for kind, names in plugin.registered.items():
        yield f"  {kind}:"
        yield from (f"    {name}  ({made_by})" for name, made_by in names.items())
    if plugin.hooks:
        yield f"  hooks: {', '.join(plugin.hooks)}"
    yield from (f"  {line}" for line in (plugin.error or "").splitlines())


def _info(command: argparse.ArgumentParser) -> Run:
    """Says what a checkpoint holds, and which packages it takes to restore it. Reads no array and needs no device.

    Exit status: 0 where everything that it needs is here, 2 where something is missing, or there is no checkpoint; 1 where what
    describes it is damaged.
    """
    command.add_argument("path", help="a checkpoint")
    command.add_argument("--json", action="store_true", help="print everything as JSON")

    def run(options: argparse.Namespace) -> tuple[int, str]:
        found = inspection.info(options.path)
        status = 2 if found.missing else 0
        if options.json:
            return status, _json({**attrs.asdict(found), "missing": [need.name for need in found.missing]})
        return status, _lines(_info_lines(found))

    return run


def _info_lines(found: inspection.CheckpointInfo) -> Iterator[str]:
    yield f"{found.path} ({'with' if found.has_checksums else 'without'} a list of checksums)"
    for item in found.items:
        indent = "  "
        if item.name:
            yield f"  item {item.name!r}"
            indent = "    "
        yield f"{indent}handler: {item.handler}{'' if item.recorded else ' (not recorded; its files tell)'}"
        if item.storage is not None:
            yield f"{indent}storage: {item.storage}"
        if item.leaf_typestrs:
            size = "unknown size" if item.byte_count is None else f"{item.byte_count} bytes"
            counts = ", ".join(f"{count} {typestr}" for typestr, count in item.leaf_typestrs.items())
            yield f"{indent}leaves: {counts} ({size})"
    for need in found.needs:
        written = f", written by {need.written_by}" if need.written_by else ""
        state = f"here: {need.here}" if need.here else f"MISSING: {need.way_out}"
        yield f"  needs {need.kind} {need.name!r}{written}; {state}"


_COMMANDS: Final[Sequence[Callable[[argparse.ArgumentParser], Run]]] = (_verify, _clean, _plugins, _info)


class _Lines:
    """A line on stderr for each event."""

    @hookimpl
    def ckptkit_progress(self, event: ProgressEvent) -> None:
        """Writes how many bytes are done, and of how many."""
        done, total = event.done_byte_count / 1e6, event.total_byte_count / 1e6
        _complain(f"{event.operation} {event.path}: {done:.1f} of {total:.1f} MB")


def _observers() -> list[Any]:
    """Whoever shows progress: a bar where tqdm is installed, else lines; nobody where stderr is no terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return []
    try:
        return [progress.TqdmProgress()]
    except errors.ArgsError:
        return [_Lines()]


def _lines(lines: Iterable[str]) -> str:
    """Lines as a text, with what is not printable escaped: names in checkpoints may be a stranger's."""
    escaped = ["".join([c if c.isprintable() else c.encode("unicode_escape").decode() for c in line]) for line in lines]
    return "".join(f"{line}\n" for line in escaped)


def _json(document: Any) -> str:
    return f"{json.dumps(document, indent=2)}\n"


def _print(text: str) -> None:
    """Writes to stdout, with what its encoding lacks escaped. That nobody reads on, as after `| head -1`, is no failure.

    Raises:
      errors.StorageError: it cannot be written.
    """
    if sys.stdout is None:  # the program was started with it closed
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # else the interpreter writes again what is left of it when it exits, and fails
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise errors.StorageError(f"what was found cannot be printed: {error}") from error


def _complain(text: str) -> None:
    """Writes to stderr where that can be: what is wrong with it changes no exit status."""
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: there is none
        sys.stderr.write(_lines(text.split("\n")))
        sys.stderr.flush()
