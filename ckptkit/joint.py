"""Beginning a save of several processes: the primary makes the temporary directory, the others find it."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any, Final

from ckptkit import commit, errors
from ckptkit.location import Location
from ckptkit.meeting import Meeting
from ckptkit.registry import Registry

__all__ = ["Following", "begin"]

_MARK_FILE: Final = "_ckptkit_mark"
_LOOK_SECS: Final = 10.0
"""How long a process looks for the primary's directory: clients of NFS keep what they know of directories for seconds."""


def begin(
    meeting: Meeting, registry: Registry, location: Location, *, force: bool, mode: int | None, facts: dict[str, Any]
) -> commit.AnyPending | Following:
    """As `commit.begin`, for all processes of the meeting.

    Args:
      meeting: of the save.
      registry: makes a location of what the primary says.
      location: where the checkpoint will be.
      force: an existing checkpoint will be replaced.
      mode: permission bits of the checkpoint's directories.
      facts: what must be the same on every process, beside location and `force`.

    Raises:
      errors.ProcessError: the processes do not save the same.
      errors.StorageError: this process does not see the directory that the primary made.
      errors.CheckpointError: what `commit.begin` raised on the primary.
    """
    meeting.agree("begin", {"path": location.url, "force": force, **facts})
    if not meeting.job.is_primary:
        return _follow(meeting, registry, location)
    pending = commit.begin(location, force=force, mode=mode)
    if meeting.job.others:
        token = secrets.token_hex(16)
        try:
            pending.temporary.write_bytes(_MARK_FILE, token.encode())
            meeting.tell("begin", json.dumps({"temporary": pending.temporary.url, "token": token}).encode())
        except BaseException:
            pending.abandon()
            raise
    return pending


def end(meeting: Meeting, temporary: Location) -> None:
    """Removes what `begin` left in the directory; for the primary, once everyone has written."""
    if meeting.job.others:
        temporary.delete(_MARK_FILE)


class Following:
    """A save that another process, the primary, commits or abandons."""

    def __init__(self, path: str, temporary: Location) -> None:
        self.path = path
        self.temporary = temporary

    def commit(self) -> None:
        """Nothing: the primary does it."""

    def overtaken(self) -> None:
        """Nothing: the primary tells."""

    def abandon(self) -> None:
        """Nothing: the primary removes what was written."""


def _follow(meeting: Meeting, registry: Registry, location: Location) -> Following:
    word = json.loads(meeting.hear("begin"))
    temporary = registry.location(word["temporary"])
    give_up = time.monotonic() + min(_LOOK_SECS, meeting.timeout_secs / 2)
    while True:
        temporary.names()  # to list a directory makes a network file system look again
        if temporary.exists(_MARK_FILE) and temporary.read_bytes(_MARK_FILE, 64).decode() == word["token"]:
            return Following(location.url, temporary)
        if time.monotonic() > give_up:
            raise errors.StorageError(
                f"{temporary.url}: process {meeting.job.process_index} does not see the directory that process "
                f"{meeting.job.primary} made: the processes share no storage here. Save to a file system that all mount at "
                "this path, or let each save its own: MultiprocessingOptions(primary_host=None)."
            )
        time.sleep(0.1)
