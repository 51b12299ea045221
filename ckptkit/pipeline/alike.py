"""Whether the processes of a job have the same leaves, and where two of them differ first.

A digest of all leaves tells whether they do. Where it differs, the primary asks the first process that says otherwise for
digests of ever shorter beginnings of its list, a few kilobytes a round, and three rounds for a quarter of a million leaves.
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
_TOLD_CHARACTERS: Final = 1 << 14
"""A sharding over thousands of devices is long, and differs late."""


class Facts(NamedTuple):
    """What must be the same of one leaf on every process.

    Attributes:
      path: its key path.
      told: words for what it is, each under the name that a message gives to it.
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
    encoded = [repr((leaf.path, *leaf.told.values())).encode() for leaf in leaves]
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
        position = _first_difference(ask, encoded, said["leaves"])
        mine = leaves[position] if position < len(leaves) else None
        answer = ask({"position": position, "path": mine and mine.path})
        theirs = None if answer["leaf"] is None else Facts(tuple(answer["leaf"][0]), answer["leaf"][1])
        unknown_here = theirs is not None and all(leaf.path != theirs.path for leaf in leaves)
        return _told(meeting.job.process_index, process, mine, theirs, unknown=(unknown_here, not answer["known"]))

    meeting.agree(point, facts, explain)
    if meeting.job.is_primary:
        meeting.tell(f"{point}-{next(asked)}")
        return
    while word := meeting.hear(f"{point}-{(number := next(asked))}"):
        question = json.loads(word)
        if question["process"] == meeting.job.process_index:
            meeting.gather(f"{point}-{number}", json.dumps(_answer(question, leaves, encoded)).encode())


def _digests(encoded: Sequence[bytes], cuts: Sequence[int]) -> list[str]:
    """The digests of the first leaves, as many as each of the ascending `cuts` says, or as there are."""
    digest = hashlib.blake2b(digest_size=8)
    found = []
    for start, stop in itertools.pairwise([0, *cuts]):
        digest.update(b"".join(encoded[start:stop]))
        found.append(digest.copy().hexdigest())
    return found


def _first_difference(ask: Callable[[Mapping[str, Any]], Any], encoded: Sequence[bytes], their_count: int) -> int:
    """The position of the first leaf that differs; one past the last where the other process has more."""
    same, differing = 0, max(len(encoded), their_count)  # of leaves at the beginning: so many are the same, so many are not
    while differing - same > 1:
        cuts = sorted({same + (differing - same) * k // _CUTS for k in range(1, _CUTS)} - {same})
        alike = [a == b for a, b in zip(_digests(encoded, cuts), ask({"cuts": cuts}), strict=True)]
        number = alike.index(False) if False in alike else len(cuts)
        same, differing = [same, *cuts, differing][number : number + 2]
    return same


def _answer(question: Mapping[str, Any], leaves: Sequence[Facts], encoded: Sequence[bytes]) -> Any:
    if "cuts" in question:
        return _digests(encoded, question["cuts"])
    path = question["path"] and tuple(question["path"])
    leaf = leaves[question["position"]] if question["position"] < len(leaves) else None
    told = leaf and [leaf.path, {name: str(word)[:_TOLD_CHARACTERS] for name, word in leaf.told.items()}]
    return {"leaf": told, "known": path is None or any(leaf.path == path for leaf in leaves)}


def _told(here: int, there: int, mine: Facts | None, theirs: Facts | None, unknown: tuple[bool, bool]) -> str:
    """The sentence for the first difference; `unknown` tells whether this process, or the other, lacks the other's leaf."""
    if mine is not None and unknown[1]:
        return f"first difference: process {there} has no leaf {mine.path}, which process {here} has ({_words(mine)})"
    if theirs is not None and unknown[0]:
        return f"first difference: process {here} has no leaf {theirs.path}, which process {there} has ({_words(theirs)})"
    assert mine is not None
    assert theirs is not None
    if mine.path != theirs.path:
        return f"first difference: process {here} has {mine.path} where process {there} has {theirs.path}, in another order"
    words = {name: [str(leaf.told.get(name))[:_TOLD_CHARACTERS] for leaf in (mine, theirs)] for name in mine.told | theirs.told}
    lines = [
        f"{name} {_near(a, b)} on process {here}, {_near(b, a)} on process {there}" for name, (a, b) in words.items() if a != b
    ]
    return f"first difference: leaf {mine.path}, {'; '.join(lines)}"


def _words(leaf: Facts) -> str:
    return ", ".join(f"{name} {str(word)[:_SHOWN_CHARACTERS]}" for name, word in leaf.told.items() if word is not None)


def _near(text: str, other: str) -> str:
    """A text, or if it is long the part where it begins to differ from the other."""
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    common = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, common - _SHOWN_CHARACTERS // 2)
    return f"...{text[start : start + _SHOWN_CHARACTERS]}..."
