"""How the saves of a group of processes are numbered: the n-th call of one process meets the n-th of the others.

A process that was given up, or started again, joins the save that the primary is at. A call to which the primary did not come
does not count. Restores that are made together are numbered among the saves. The keys of a save lie below a prefix of its own:

    <root>/seen/<process>        the process was here; one that finds its own was started again
    <root>/now                   the number of the primary's newest save, and 'open' or 'over'
    <root>/<number>/...          what `meeting` has there; the primary deletes it at a later save, once all have ended it
"""

from __future__ import annotations

import json
import threading
from urllib.parse import quote

import attrs

from ckptkit._coordination import Store
from ckptkit.processes import Job

__all__ = ["is_reached", "next_prefix", "over", "take_back", "tidy"]


@attrs.define
class _Line:
    """The saves of one group of processes, one after the other.

    Attributes:
      number: of this process's newest.
      kept: numbers whose keys the primary has not deleted yet.
    """

    number: int = 0
    kept: list[int] = attrs.field(factory=list)


_lines: dict[str, _Line] = {}
_lock = threading.Lock()


def next_prefix(store: Store, job: Job, key_prefix: str | None) -> str:
    """The prefix of this process's next save.

    Args:
      store: of the keys.
      job: who takes part.
      key_prefix: tells apart what several threads save at once.
    """
    root = f"ckptkit/{quote(key_prefix or '-', safe='')}/{_group(job.processes)}"
    with _lock:
        first = root not in _lines
        line = _lines.setdefault(root, _Line())
        if first and not store.claim(f"{root}/seen/{job.process_index}"):
            number, is_open = _now(store, root)
            line.number = number - is_open
        line.number += 1
        if job.is_primary:
            store.set(f"{root}/now", f"{line.number} open".encode())
            line.kept.append(line.number)
        else:
            line.number = _joined(store, root, line.number, job.process_index)
        return f"{root}/{line.number}"


def is_reached(store: Store, prefix: str) -> bool:
    """Whether the primary came to a save."""
    root, number = _parts(prefix)
    return _now(store, root)[0] >= number


def over(store: Store, prefix: str) -> None:
    """On the primary: nobody is to join a save any more."""
    root, number = _parts(prefix)
    if root in _lines and _lines[root].number == number:
        store.set(f"{root}/now", f"{number} over".encode())


def take_back(prefix: str) -> None:
    """This process's next save has the number of this one."""
    root, number = _parts(prefix)
    with _lock:
        _lines[root].number = min(_lines[root].number, number - 1)


def tidy(store: Store, prefix: str, process_count: int) -> None:
    """On the primary: deletes the keys of saves before this one that as many processes have ended."""
    root, number = _parts(prefix)
    with _lock:
        kept = _lines[root].kept if root in _lines else []
        for old in [each for each in kept if each < number]:
            if len(list(store.list(f"{root}/{old}/ended/"))) == process_count:
                store.delete(f"{root}/{old}")
                kept.remove(old)


def _group(processes: tuple[int, ...]) -> str:
    """A name that no other group of processes has; a short one for all of a job, of which there may be thousands."""
    first = len(processes)
    return f"first-{first}" if processes == tuple(range(first)) else "-".join(map(str, processes))


def _parts(prefix: str) -> tuple[str, int]:
    root, _, number = prefix.rpartition("/")
    return root, int(number)


def _now(store: Store, root: str) -> tuple[int, bool]:
    """The number of the primary's newest save, and whether it goes on."""
    number, state = (store.get(f"{root}/now") or b"0 over").decode().split()
    return int(number), state == "open"


def _joined(store: Store, root: str, number: int, process: int) -> int:
    """The save to join instead of `number`, where the others gave up on this process there and are at a later one."""
    newest, is_open = _now(store, root)
    if newest <= number or not is_open:
        return number
    records = [json.loads(record) for _, record in store.list(f"{root}/{number}/failed/")]
    return newest if any(process in record.get("missing", ()) for record in records) else number
