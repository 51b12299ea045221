"""Type handlers and checkpoint handlers that break one promise each."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np

from ckptkit import reports
from ckptkit.args import CheckpointArgs
from ckptkit.handlers import AsyncCheckpointHandler, CheckpointHandler
from ckptkit.leaves import Kinds, LeafSpec, TypeHandler
from ckptkit.storage import ArraySpec, chunk_indices, whole


class Box:
    """A leaf: two lengths of an array, and its values."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __eq__(self, other):
        return isinstance(other, Box) and self.values.tobytes() == other.values.tobytes()

    __hash__ = None


class BoxHandler(TypeHandler):
    typestr = "tests.Box"

    def describe(self, leaves):
        return [self.spec(leaf) for leaf in leaves]

    def spec(self, leaf):
        shape = leaf.value.values.shape
        return LeafSpec(self.typestr, ArraySpec(leaf.name, shape, leaf.value.values.dtype, tuple(max(1, n) for n in shape)))

    def owned(self, leaves, specs, job):
        return [list(chunk_indices(spec.array)) if job.is_primary else [] for spec in specs]

    def stage(self, pieces):
        return [leaf.values.copy() for leaf, _, _ in pieces]

    def needs(self, specs, requests, job):
        return [[whole(spec.array.shape)] for spec in specs]

    def assemble(self, specs, requests, parts):
        return [Box(part[whole(spec.array.shape)]) for spec, part in zip(specs, parts, strict=True)]


def make_box(seed):
    return Box(np.arange(seed, seed + 1 + seed % 3))


def leaf(make=make_box, **methods):
    """A handler of boxes with some methods replaced, its leaf type, and how a leaf is made."""
    return type("Broken", (BoxHandler,), methods)(), Box, make


def reversed_values(self, specs, requests, parts):
    return [Box(part[whole(spec.array.shape)][::-1]) for spec, part in zip(specs, parts, strict=True)]


def shared_first(self, specs, requests, parts):
    first = self.__dict__.setdefault("first", Box(next(iter(parts[0].values()))))
    return [first for _ in specs]


def halves(self, specs, requests, job):
    return [[((0, max(1, spec.array.shape[0] // 2)),)] for spec in specs]


def stage_slowly(self, pieces):
    for _ in pieces:
        sum(range(100 * len(pieces)))
    return BoxHandler.stage(self, pieces)


class Wrong(BoxHandler):
    typestr = "tests.Other"


LEAVES = {
    "test_is_registered_for_its_leaves": (Wrong(), int, make_box),
    "test_describes_each_leaf": leaf(spec=lambda self, leaf: BoxHandler.spec(self, leaf)._replace(extra={"a": (1, 2)})),
    "test_leaves_of_a_batch_do_not_mix": leaf(
        describe=lambda self, leaves: [self.spec(leaf._replace(value=leaves[0].value)) for leaf in leaves]
    ),
    "test_leaves_of_one_kind_have_equal_specs": leaf(kinds=lambda self, leaves: Kinds.of([0] * len(leaves))),
    "test_every_cell_is_owned_once": leaf(owned=lambda self, leaves, specs, job: [[] for _ in specs]),
    "test_processes_share_the_cells": leaf(owned=lambda self, leaves, specs, job: [[*chunk_indices(s.array)] for s in specs]),
    "test_stages_what_it_described": leaf(stage=lambda self, pieces: [leaf.values.astype(float) for leaf, _, _ in pieces]),
    "test_assembles_what_it_staged": leaf(assemble=reversed_values),
    "test_trees_come_back": leaf(assemble=shared_first),
    "test_targets_are_honoured": leaf(assemble=reversed_values),
    "test_small_chunks_come_back": leaf(
        describe=lambda self, leaves: [self.spec(leaf)._replace(inline=None) for leaf in leaves], assemble=reversed_values
    ),
    "test_partial_restore": leaf(assemble=shared_first, needs=halves),
    "test_staged_data_is_safe": leaf(stage=lambda self, pieces: [leaf.values for leaf, _, _ in pieces]),
    "test_damage_is_an_error": leaf(assemble=lambda self, specs, requests, parts: [Box([]) for _ in specs]),
    "test_a_cancelled_save": leaf(assemble=shared_first),
    "test_concurrent_saves": leaf(assemble=shared_first),
    "test_a_fresh_process_restores": leaf(),  # nothing installs it
    "test_many_leaves_in_proportion": leaf(stage=stage_slowly),
}


class LinesHandler(CheckpointHandler):
    """Lines of text, with how many there are."""

    def save(self, directory, *, args):
        (directory / "lines").write_text("\n".join([str(len(args.lines)), *args.lines]))

    def restore(self, directory, *, args):
        count, *lines = (directory / "lines").read_text().split("\n")
        assert int(count) == len(lines)
        return lines


def lines(base=LinesHandler, **methods):
    """A function that makes a new args class and its handler, with some methods replaced."""

    def make():
        class Lines(CheckpointArgs):
            def __init__(self, lines=()):
                self.lines = lines

        return Lines, type("Broken", (base,), methods)

    return make


def save_elsewhere(self, directory, *, args):
    LinesHandler.save(self, directory, args=args)
    Path(directory).parent.joinpath("scratch").write_text("")


def save_later(self, directory, *, args):
    def write():
        time.sleep(0.02)
        Path(directory, "lines").write_text("0")

    Path(directory, "first").write_text("")
    threading.Thread(target=write).start()


def save_silently(self, directory, *, args):
    with contextlib.suppress(OSError):
        LinesHandler.save(self, directory, args=args)


def save_to_database(self, directory, *, args):
    with contextlib.closing(sqlite3.connect(directory / "lines.db")) as database:
        database.execute("create table lines (line)")
        database.executemany("insert into lines values (?)", [(line,) for line in args.lines])
        database.commit()


class Unpicklable(list):
    def __reduce_ex__(self, protocol):
        raise TypeError("a list of locks")


def save_unlisted(self, directory, *, args):
    """Claims that an index has the checksums of what it writes."""
    (directory / "data").mkdir()
    LinesHandler.save(self, directory / "data", args=args)
    reports.current_tracker("save").covered.add(f"{directory}/data")


def restore_unlisted(self, directory, *, args):
    return (directory / "data" / "lines").read_text().split("\n")[1:]


def restore_touching(self, directory, *, args):
    (directory / "read").write_text("")
    return LinesHandler.restore(self, directory, args=args)


def remembered(self, directory, *, args):
    return LAST[-1]


LAST = [["line", "0"]]


class Late(AsyncCheckpointHandler):
    """Reads the lines after the call."""

    async def async_save(self, directory, *, args):
        from concurrent.futures import ThreadPoolExecutor

        def write():
            time.sleep(0.02)
            LinesHandler.save(self, directory, args=args)

        pool = ThreadPoolExecutor(1)
        future = pool.submit(write)
        pool.shutdown(wait=False)
        return [future]

    restore = LinesHandler.restore


class NoFutures(Late):
    async def async_save(self, directory, *, args):
        return [threading.Thread()]


HANDLERS = {
    "test_is_found_by_its_type_string": lines(typestr=classmethod(lambda cls: f"lines {time.monotonic_ns()}")),
    "test_is_made_by_the_registry": lines(),  # never registered
    "test_comes_back": lines(restore=remembered),
    "test_restore_changes_nothing": lines(restore=restore_touching),
    "test_save_stays_inside": lines(save=save_elsewhere),
    "test_nothing_is_written_later": lines(save=save_later),
    "test_is_an_item_of_a_composite": lines(restore=remembered),
    "test_the_item_may_change_after_the_call": lines(Late),
    "test_a_cancelled_save": lines(NoFutures),
    "test_concurrent_saves": lines(restore=remembered),
    "test_a_failed_save_leaves_nothing": lines(save=save_silently),
    "test_lost_bytes_are_noticed": lines(save=save_unlisted, restore=restore_unlisted),
    "test_damage_is_an_error": lines(save=save_unlisted, restore=restore_unlisted),
    "test_a_fresh_process_restores": lines(),  # nothing installs it
}
