"""Whether the processes of a job have the same leaves, and where two of them differ first.

A digest of all leaves tells whether they do. Where it differs, the primary asks the first process that says otherwise for
digests of ever shorter beginnings of its list, a few kilobytes a round, and three rounds for a quarter of a million leaves. Where
the words for that leaf are long, as of a sharding over thousands of devices, it finds the place in them in the same way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ckptkit.meeting import Meeting

__all__ = ["Facts", "agree"]

_CUTS: Final = 64
"""So many beginnings are compared in a round."""

_SHOWN_CHARACTERS: Final = 200
_SLICE_CHARACTERS: Final = _SHOWN_CHARACTERS // 2


_Ask = Callable[[Mapping[str, Any]], Any]
"""Puts a question to the process that differs."""


class Facts(NamedTuple):
    """What must be the same of one leaf on every process.

    Attributes:
      path: its key path.
      told: words for what it is, each under the name that a message gives to it; compared as text. Leaves may share it.
    """

    path: tuple[str, ...]
    told: dict[str, Any]


def agree(meeting: Meeting, point: str, leaves: Sequence[Facts], others: Mapping[str, Any]) -> None:
    """Returns where every process has these leaves, in this order.

    Args:
      meeting: of the processes.
      point: names this comparison in the meeting.
      leaves: those of this process.
      others: what else must be the same.

    Raises:
      errors.ProcessError: says which processes differ, and in which leaf first.
    """
    encoded = _encoded(leaves)
    facts = {"leaves": len(leaves), "digest of the leaves": _digests(encoded, [len(encoded)])[0], **others}
    asked = itertools.count()

    def explain(process: int, said: Mapping[str, Any]) -> str | None:
        def ask(question: Mapping[str, Any]) -> Any:
            number = next(asked)
            meeting.tell(f"{point}-{number}", json.dumps({"process": process, **question}).encode())
            answers = meeting.gather(f"{point}-{number}", of=[process])
            assert answers is not None  # this is the primary
            return json.loads(answers[process])

        if said["digest of the leaves"] == facts["digest of the leaves"]:
            return None
        position = _first_difference(ask, {}, encoded, said["leaves"])
        mine = leaves[position] if position < len(leaves) else None
        answer = ask({"position": position, "path": mine and mine.path})
        theirs = None if answer["leaf"] is None else Facts(tuple(answer["leaf"][0]), answer["leaf"][1])
        unknown_here = theirs is not None and all(leaf.path != theirs.path for leaf in leaves)
        here = meeting.job.process_index
        if mine is None or theirs is None or mine.path != theirs.path:
            return _other_path(here, process, mine, theirs, unknown=(unknown_here, not answer["known"]))
        return f"first difference: leaf {mine.path}, {_other_words(ask, position, mine, answer['sums'], here, process)}"

    meeting.agree(point, facts, explain)
    if meeting.job.is_primary:
        meeting.tell(f"{point}-{next(asked)}")
        return
    while word := meeting.hear(f"{point}-{(number := next(asked))}"):
        question = json.loads(word)
        if question["process"] == meeting.job.process_index:
            meeting.gather(f"{point}-{number}", json.dumps(_answer(question, leaves, encoded)).encode())


def _encoded(leaves: Sequence[Facts]) -> list[bytes]:
    """Of each leaf what must be the same; the words that leaves share are put together once."""
    texts: dict[int, str] = {}
    for leaf in leaves:
        if id(leaf.told) not in texts:
            texts[id(leaf.told)] = repr([str(word) for word in leaf.told.values()])
    return [f"{leaf.path!r}{texts[id(leaf.told)]}".encode() for leaf in leaves]


def _digests(encoded: Sequence[bytes], cuts: Sequence[int]) -> list[str]:
    """The digests of the first things, as many as each of the ascending `cuts` says, or as there are."""
    digest = hashlib.blake2b(digest_size=8)
    found = []
    for start, stop in itertools.pairwise([0, *cuts]):
        digest.update(b"".join(encoded[start:stop]))
        found.append(digest.copy().hexdigest())
    return found


def _first_difference(ask: _Ask, what: Mapping[str, Any], encoded: Sequence[bytes], their_count: int) -> int:
    """The position of the first thing that differs; one past the last where the other process has more; `what`: see `_answer`."""
    same, differing = 0, max(len(encoded), their_count)  # things at the beginning: so many are the same, so many are not
    while differing - same > 1:
        cuts = sorted({same + (differing - same) * k // _CUTS for k in range(1, _CUTS)} - {same})
        alike = [a == b for a, b in zip(_digests(encoded, cuts), ask({**what, "cuts": cuts}), strict=True)]
        number = alike.index(False) if False in alike else len(cuts)
        same, differing = [same, *cuts, differing][number : number + 2]
    return same


def _answer(question: Mapping[str, Any], leaves: Sequence[Facts], encoded: Sequence[bytes]) -> Any:
    """What a process says of its leaves, or, where the question has a name, of the words of one leaf under that name."""
    leaf = leaves[question["position"]] if question.get("position", len(leaves)) < len(leaves) else None
    text = str(leaf.told.get(question["name"])) if leaf is not None and "name" in question else ""
    if "cuts" in question:
        return _digests(_slices(text) if "name" in question else encoded, question["cuts"])
    if "name" in question:
        return _part(text, question["start"])
    path = question["path"] and tuple(question["path"])
    return {
        "leaf": leaf and [leaf.path, {name: str(word)[:_SHOWN_CHARACTERS] for name, word in leaf.told.items()}],
        "sums": leaf and {name: _summary(str(word)) for name, word in leaf.told.items()},
        "known": path is None or any(leaf.path == path for leaf in leaves),
    }


def _other_path(here: int, there: int, mine: Facts | None, theirs: Facts | None, unknown: tuple[bool, bool]) -> str:
    """The sentence where two paths are at one place; `unknown`: whether this process, or the other, lacks the leaf."""
    if mine is not None and (theirs is None or unknown[1]):
        lacks = "no leaf" if unknown[1] else "one less of"
        return f"first difference: process {there} has {lacks} {mine.path}, which process {here} has ({_words(mine)})"
    if theirs is not None and (mine is None or unknown[0]):
        lacks = "no leaf" if unknown[0] else "one less of"
        return f"first difference: process {here} has {lacks} {theirs.path}, which process {there} has ({_words(theirs)})"
    paths = [leaf and leaf.path for leaf in (mine, theirs)]
    return f"first difference: process {here} has {paths[0]} where process {there} has {paths[1]}, in another order"


def _other_words(ask: _Ask, position: int, mine: Facts, sums: dict[str, Any], here: int, there: int) -> str:
    """What differs of one leaf, with the part of each text where it begins to."""
    lines = []
    for name in mine.told | sums:
        text = str(mine.told.get(name))
        length, digest = sums.get(name, _summary(str(None)))
        if [length, digest] != _summary(text):
            what = {"position": position, "name": name}
            first = _first_difference(ask, what, _slices(text), -(-length // _SLICE_CHARACTERS))
            start = max(0, first - 1) * _SLICE_CHARACTERS
            lines.append(f"{name} {_part(text, start)} on process {here}, {ask({**what, 'start': start})} on process {there}")
    return "; ".join(lines)


def _words(leaf: Facts) -> str:
    return ", ".join(f"{name} {str(word)[:_SHOWN_CHARACTERS]}" for name, word in leaf.told.items() if word is not None)


def _slices(text: str) -> list[bytes]:
    return [repr(text[i : i + _SLICE_CHARACTERS]).encode() for i in range(0, len(text), _SLICE_CHARACTERS)]


def _summary(text: str) -> list[Any]:
    slices = _slices(text)
    return [len(text), _digests(slices, [len(slices)])[0]]


def _part(text: str, start: int) -> str:
    """A text, or where it is long so much of it from `start` on as a message shows."""
    return text if len(text) <= _SHOWN_CHARACTERS else f"...{text[start : start + _SHOWN_CHARACTERS]}..."
