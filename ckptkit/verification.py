"""Whether a checkpoint is whole: every file and every chunk is read and compared with its checksum; no target, no device."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptkit import args as args_lib
from ckptkit import choosing, discovery, errors
from ckptkit.file_list import FILE_LIST, FileList, read_file_list, relying_on
from ckptkit.grid import ArraySpec, index_nbytes
from ckptkit.handlers._stored import StoredTree, args_for_files, item_folders
from ckptkit.index import INDEX_FILE
from ckptkit.location import Location
from ckptkit.metadata.step import STEP_FILE
from ckptkit.metadata.tree import TREE_FILE, Entry, is_empty_node
from ckptkit.pipeline.check import check_arrays, is_damage
from ckptkit.registry import Registry
from ckptkit.reports import Part, State, Tracker, VerifyReport
from ckptkit.tree import key_path

__all__ = ["verify"]


def verify(path: str | os.PathLike[str], *, registry: Registry | None = None, observers: Sequence[Any] = ()) -> VerifyReport:
    """Reads every byte of a checkpoint that a restore could need, and says what is whole and what is not.

    Checkpoints of Orbax have no checksums: that they can be read is all there is to say of them, and `state` is 'unchecked'.

    Args:
      path: a path or URL.
      registry: finds storage backends; None for the default one.
      observers: objects with `ckptkit.hookimpl` methods, told of progress.

    Raises:
      errors.NotFoundError, errors.IncompleteError, errors.FormatError: there is no checkpoint at `path`.
      errors.StorageError: files cannot be read now.
    """
    notify = discovery.notifier(registry, observers).progress
    registry = discovery.ready(registry)
    for attempt in choosing.attempts(registry, path):
        with attempt as location:
            tracker = Tracker("verify", location.url, notify)
            try:
                report = _verified(location, registry, tracker)
            finally:
                tracker.finish()
    return report


def _verified(location: Location, registry: Registry, tracker: Tracker) -> VerifyReport:
    start = time.monotonic()
    files: list[Part] = []
    try:
        listed = read_file_list(location)
    except errors.CorruptCheckpointError as error:
        files.append(Part(name=FILE_LIST, byte_count=0, state="corrupt", problem=str(error)))
        listed = None
    folders = _tree_folders(location, listed, registry)
    if listed is None and not (files or folders or location.exists(STEP_FILE)):
        raise errors.FormatError(f"{location.url} is no checkpoint: nothing in it was written by ckptkit or Orbax.")
    files += _listed_files(location, listed, tracker) if listed is not None else _unlisted_files(location, folders)
    understood = listed is not None and all(part.state == "whole" for part in files)
    leaves: list[Part] = []
    for folder in folders:
        tree = location.child(folder) if folder else location
        try:
            with relying_on(location, listed), StoredTree(tree, registry) as stored:
                files += _strays(stored, f"{folder}/" if folder else "")
                leaves += _leaves(stored, f"{folder}: " if folder else "", registry, tracker)
        except errors.CheckpointError as error:
            if not is_damage(error) or (understood and isinstance(error, errors.FormatError)):  # of a newer version
                raise
            files.append(Part(name=f"{folder}/" if folder else ".", byte_count=0, state="corrupt", problem=str(error)))
    secs = time.monotonic() - start
    return VerifyReport(path=location.url, files=files, leaves=leaves, listed=listed is not None, total_secs=secs)


def _tree_folders(location: Location, listed: FileList | None, registry: Registry) -> list[str]:
    """The folders that hold arrays, '' for the checkpoint's own: those with an index, and those that look like it."""
    files = listed.files if listed is not None else ()
    indexed = [path.removesuffix(INDEX_FILE).rstrip("/") for path in files if path.split("/")[-1] == INDEX_FILE]
    if location.exists(TREE_FILE) or args_for_files(location, registry) is args_lib.PyTreeRestore:
        return list(dict.fromkeys(["", *indexed]))
    items = item_folders(location, registry)
    trees = [name for name in items if args_for_files(location.child(name), registry) is args_lib.PyTreeRestore]
    return list(dict.fromkeys([*trees, *indexed]))


def _listed_files(location: Location, listed: FileList, tracker: Tracker) -> Iterator[Part]:
    tracker.expect(sum([each.size for each in listed.files.values()]), 0)
    problems = listed.problems(location, listed.files, tracker.advance)
    for path, (size, _, _) in listed.files.items():
        problem = problems.get(path)
        if problem is not None and not is_damage(problem):
            raise problem
        yield Part(name=path, byte_count=size, state="corrupt" if problem else "whole", problem=str(problem or ""))


def _unlisted_files(location: Location, folders: Sequence[str]) -> Iterator[Part]:
    """Files of a checkpoint without a list, which need only be readable; those of trees are read as leaves."""
    if "" in folders:
        return
    for path in location.files(set(folders)):
        try:
            yield Part(name=path, byte_count=sum(map(len, location.blocks(path))), state="unchecked")
        except errors.CheckpointError as error:
            if not is_damage(error):
                raise
            yield Part(name=path, byte_count=0, state="corrupt", problem=str(error))


def _strays(stored: StoredTree, prefix: str) -> Iterator[Part]:
    problem = "came later than the list of files, which lacks it: a restore of the checkpoint does not read it"
    return (Part(name=prefix + name, byte_count=0, state="unchecked", problem=problem) for name in stored.strays)


def _leaves(stored: StoredTree, prefix: str, registry: Registry, tracker: Tracker) -> Iterator[Part]:
    problems: dict[Entry, list[str]] = {entry: [] for entry in stored.document.entries if not is_empty_node(entry)}
    arrays = dict(_arrays(stored, problems))
    tracker.expect(sum([array.nbytes for array in arrays.values()]), len(arrays))
    entries, specs = list(arrays), list(arrays.values())
    for position, cell, error in check_arrays(specs, registry, stored.reader, stored.index):
        if error is not None:
            problems[entries[position]].append(f"chunk {cell}: {error}")
        tracker.advance(index_nbytes(specs[position], cell))
    for entry, found in problems.items():
        if found or entry in arrays:
            state: State = "corrupt" if found else "whole" if stored.index is not None else "unchecked"
            nbytes = arrays[entry].nbytes if entry in arrays else 0
            yield Part(name=f"{prefix}{key_path(entry.keys)}", byte_count=nbytes, state=state, problem="; ".join(found))


def _arrays(stored: StoredTree, problems: Mapping[Entry, list[str]]) -> Iterator[tuple[Entry, ArraySpec]]:
    """The leaves that are arrays; what is wrong with a leaf that is not there goes into `problems`."""
    for entry, found in problems.items():
        try:
            array = stored.leaf(entry)[1].array
        except errors.CheckpointError as error:
            if not is_damage(error):
                raise
            found.append(str(error))
        else:
            if array is not None:
                yield entry, array
