"""How processes tell each other of errors, and how messages tell of processes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ckptkit import errors

__all__ = ["by_value", "decoded", "encoded", "named"]


def named(processes: Sequence[int]) -> str:
    """The processes, as a message names them."""
    shown = ", ".join(map(str, processes[:20])) + (", ..." if len(processes) > 20 else "")
    return f"process {shown}" if len(processes) == 1 else f"processes {shown}"


def by_value(said: Mapping[int, Any]) -> str:
    """Who says what; what most say comes first."""
    groups: dict[str, list[int]] = {}
    for process, value in sorted(said.items()):
        groups.setdefault(json.dumps(value), []).append(process)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return "; ".join(f"{named(processes)}: {value:.300}" for value, processes in ordered)


def encoded(error: BaseException) -> bytes:
    """An error as it is told to other processes."""
    record: dict[str, Any] = {"kind": type(error).__name__, "text": str(error), "missing": getattr(error, "missing", ())}
    if isinstance(error, OSError) and error.errno is not None:
        record |= {"errno": error.errno, "text": f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)}
    return json.dumps(record).encode()


def decoded(process: int, data: bytes) -> errors.CheckpointError:
    """What another process says of its failure, as an error of the same class where that is one of ours."""
    record = json.loads(data)
    kind: Any = getattr(errors, record["kind"], None)
    ours = isinstance(kind, type) and issubclass(kind, errors.CheckpointError)
    text = f"process {process} failed: {record['text'] if ours else record['kind'] + ': ' + record['text']}"
    made: errors.CheckpointError
    if not ours:
        made = errors.ProcessError(text)
    elif "errno" in record and issubclass(kind, OSError):
        made = kind(record["errno"], text)
    else:
        made = kind(text)
    if isinstance(made, errors.TimeoutError):
        made.missing = tuple(record["missing"])
    return made
