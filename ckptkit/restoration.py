"""Where the processes of a job meet while they restore together: what a meeting of a restore has beside that of a save.

A checkpoint may be replaced while it is read, so a restore is made of attempts, each of which stands for all processes or none.
And devices compute together in it, which no process can leave: whoever waits for them must know who keeps them waiting.
Keys beside those of every meeting (`meeting`):

    <prefix>/<attempt>-<point>/...             the points of an attempt
    <prefix>/gave-up/<process>                 the newest attempt that the process gave up
    <prefix>/cut/<process>                     why it takes no part any more in what devices compute together
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextvars import ContextVar
from typing import Any, ClassVar, TypeVar

from ckptkit import errors
from ckptkit._telling import decoded, encoded, named
from ckptkit.meeting import Meeting, Watch, convened
from ckptkit.processes import Job

__all__ = ["Restoration", "current_restoration", "restoring"]

T = TypeVar("T")


class Restoration(Meeting):
    """One restore of several processes, in as many attempts as it takes; of a single one, where nothing is sent or awaited."""

    doing: ClassVar[str] = "restore"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `Meeting`."""
        self._attempt = 0
        self._given_up = False  # this attempt
        self._numbered = 0  # points of this attempt, so far
        super().__init__(*args, **kwargs)

    def numbered(self, point: str) -> str:
        """A point for what may come several times in an attempt: the n-th of one process is the n-th of the others."""
        self._numbered += 1
        return f"{point}-{self._numbered}"

    def stands(self, point: str, brought: bytes = b"") -> bool:
        """Whether all come to a point of an attempt, and bring the same; else it is given up, and `start_over` is next.

        Raises: what `gather` raises.
        """
        try:
            gathered = self.gather(point, brought)
            if gathered is None:
                self.hear(point)
            elif len(set(gathered.values())) > 1:
                self.give_up_attempt()
            else:
                self.tell(point)
        except errors.BusyError:
            if not self._given_up:
                raise
        return not self._given_up

    def give_up_attempt(self) -> bool:
        """Has every process leave what it waits for in this attempt, with `errors.BusyError`, so that all begin the next one.

        Returns:
          False where something has gone wrong for good, so that there is no next one.
        """
        if self._store is not None and not self._failed:
            self._given_up = True
            self._store.set(f"{self._prefix}/gave-up/{self.job.process_index}", str(self._attempt).encode())
        return not self._failed

    @property
    def given_up(self) -> bool:
        """Whether this attempt was given up, here or elsewhere."""
        return self._given_up

    def start_over(self) -> None:
        """The next attempt, in which no process meets one that is still at this one."""
        if self._store is not None:
            self._attempt += 1
            self._given_up = False
            self._numbered = 0

    def wait_for_devices(self, future: futures.Future[T], group: Callable[[], Sequence[int]]) -> T:
        """The result of what devices of several processes compute together.

        That something went wrong elsewhere is no reason to leave, since who fails takes part to the end, unless it says that it
        cannot (`cut_off`).

        Args:
          future: done when this process's devices are.
          group: tells whose devices must take part in what is being computed.

        Raises:
          errors.CheckpointError: what keeps a process of the group from taking part.
          errors.TimeoutError: names those of the group that give no sign of life.
        """
        watch = Watch(self._beats, self.timeout_secs)
        while not futures.wait([future], self._slice_secs).done:
            others = [process for process in group() if process != self.job.process_index]
            if gone := {process: record for process, record in self._listed("cut").items() if process in others}:
                raise decoded(*min(gone.items()))
            self._raise_lost(watch, others, "exchange")
        return future.result()

    def cut_off(self, error: BaseException) -> None:
        """Tells those who wait for devices of this process that they wait in vain; never raises, as `fail`."""
        if self._store is not None:
            with contextlib.suppress(errors.CheckpointError):
                self._store.set(f"{self._prefix}/cut/{self.job.process_index}", encoded(error))
        self.fail(error)

    def raise_failure(self) -> None:
        """As in the base class; `errors.BusyError` where another process gave up this attempt."""
        super().raise_failure()
        if self._store is None:
            return
        others = {p: int(attempt) for p, attempt in self._listed("gave-up").items() if p != self.job.process_index}
        if leaving := [process for process, attempt in others.items() if attempt >= self._attempt]:
            self._given_up = True
            raise errors.BusyError(f"{named(leaving)} must begin the {self.doing} again, and so must the others.")

    def _name(self, point: str) -> str:
        return f"{self._attempt}-{point}"


_alone = Restoration()
_current: ContextVar[Restoration] = ContextVar("ckptkit_restoration", default=_alone)


def current_restoration() -> Restoration:
    """The meeting of the restore that this call is part of; one of a single process where there is none."""
    return _current.get()


@contextlib.contextmanager
def restoring(job: Job, key_prefix: str | None, timeout_secs: float) -> Iterator[Restoration]:
    """A meeting of a restore, as `convene` makes it, from beginning to end."""
    with convened(Restoration, job, key_prefix, timeout_secs) as meeting:
        token = _current.set(meeting)
        try:
            yield meeting
        finally:
            _current.reset(token)
        meeting.end()
