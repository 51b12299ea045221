"""What several processes that write one tree must do together: compare their trees, and make one index of their checksums.

A process hands on its checksums in a file beside the data, since those of many processes would fill the coordination service.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

import orjson

from ckptkit._threads import Workers
from ckptkit.index import Checksums
from ckptkit.leaves.base import LeafSpec
from ckptkit.location import Location
from ckptkit.meeting import Meeting
from ckptkit.metadata import json
from ckptkit.pipeline import alike, answers
from ckptkit.pipeline.plan import SavePlan
from ckptkit.reports import Tracker
from ckptkit.storage.base import ManyWriters

__all__ = ["compare", "joined"]

_REMOTE_READERS: Final = 16
"""Files of a store are read one beside the other, for each takes round trips; local ones are read as fast one by one."""


def compare(meeting: Meeting, plan: SavePlan, location: Location) -> None:
    """Returns where every process saves the same kind of tree to `location`.

    Raises:
      errors.ProcessError: says which processes save another.
    """
    if not meeting.job.others:
        return
    storage = f"{plan.backend.name}, {plan.options}"
    alike.agree(meeting, f"tree-{_short(location.url)}", _facts(plan), {"storage": storage})


def joined(
    meeting: Meeting, plan: SavePlan, location: Location, checksums: Checksums, tracker: Tracker
) -> dict[str, list[str]] | None:
    """The checksums of every array once all processes have written; None on processes that are not primary.

    Raises:
      errors.StorageError: a chunk was written by nobody, or by two processes.
    """
    if meeting.job.others:
        point = f"chunks-{_short(location.url)}"
        if not meeting.job.is_primary:
            known = {name: {str(i): text for i, text in sums.items()} for name, sums in checksums.known().items()}
            location.write_bytes(_part_file(meeting.job.process_index), orjson.dumps(known))
            meeting.gather(point)
            return None
        with Workers(_REMOTE_READERS if location.local_path is None else 0, "ckptkit-checksums") as readers:
            parts: deque[Future[dict[str, Any]]] = deque()

            def learn(*, all_of_them: bool) -> None:
                while parts and (all_of_them or parts[0].done()):  # and forget, since they are as large as the index
                    _learn(parts.popleft().result(), checksums, location.url)

            def written() -> Iterator[int]:
                for process, _ in meeting.arrivals(point):
                    if process != meeting.job.process_index:
                        parts.append(readers.submit(_taken, location, _part_file(process)))
                        learn(all_of_them=False)
                    yield process

            covered = _merged(plan, location, written())
            learn(all_of_them=True)
        tracker.covered.update(f"{location.url}/{path}" for path in covered)
    return checksums.texts()


def _merged(plan: SavePlan, location: Location, processes: Iterator[int]) -> Sequence[str]:
    """What `ManyWriters.merge` returned, once all the processes have come."""
    assert isinstance(plan.backend, ManyWriters)
    with answers.calling(plan.registry, plan.backend, "merge") as asked:
        covered = answers.directories(asked, plan.backend.merge(location, processes))
    for _ in processes:  # for those that the backend did not wait
        pass
    return covered


def _part_file(process: int) -> str:
    return f"ckptkit_index.process_{process}"


def _taken(location: Location, file: str) -> dict[str, Any]:
    """What a process has handed on, which is gone then."""
    where = f"{location.url}/{file}"
    part = json.expect(json.load(location.read_bytes(file), where), dict, "the document", where)
    location.delete(file)
    return part


def _learn(part: Mapping[str, Any], checksums: Checksums, where: str) -> None:
    for name, known in part.items():
        checksums.learn(name, {int(position): text for position, text in known.items()}, where)


def _facts(plan: SavePlan) -> list[alike.Facts]:
    """What must be the same on every process; values kept on hosts may differ, and are the primary's."""
    known: dict[Any, dict[str, Any]] = {}  # leaves are of a few kinds, and a sharding's words are as long as there are devices

    def told(node: Any) -> dict[str, Any]:
        if not isinstance(node, LeafSpec):
            return {"kind": type(node).__name__}
        if node.array is None:
            return {"kind": node.typestr}
        kind = (node.typestr, *node.array[1:], id(node.sharding))
        if kind not in known:
            _, shape, dtype, chunk_shape = node.array
            words = {"kind": node.typestr, "shape": shape, "dtype": str(dtype), "chunks of": chunk_shape}
            known[kind] = {**words, "sharding": repr(node.sharding)}
        return known[kind]

    return [alike.Facts(path, told(node)) for path, node in zip(plan.structure.paths, plan.nodes, strict=True)]


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
