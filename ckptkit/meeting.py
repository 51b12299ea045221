"""Where the processes of a job meet while they save together, on the key-value store of JAX's coordination service.

No device takes part, so that a save in the background disturbs no training step. At each point of a save every process brings
something (`gather`), and the primary tells what came of it (`tell`, `hear`). What restores have beside that is in `restoration`.
Keys lie below one prefix for each save, which `_numbering` makes:

    <prefix>/<point>/<process>, .../word       what each brought, and the primary's answer
    <prefix>/failed/<process>                  what went wrong there
    <prefix>/alive/<process>                   the primary, as the process has it, and a number that grows while it is at it
    <prefix>/ended/<process>                   the process writes no more, nor reads these keys

Whoever waits looks for failures of others, and for processes that give no sign of life for `timeout_secs`; no clock is
compared with another machine's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent import futures
from contextvars import ContextVar
from typing import Any, ClassVar, Final, TypeVar

from ckptkit import _numbering, errors
from ckptkit._coordination import Store
from ckptkit._telling import by_value, decoded, encoded, named
from ckptkit.processes import Job, coordination_client

__all__ = ["COMMITTED", "Meeting", "Watch", "attending", "convene", "convened", "current_meeting", "on_primary"]

M = TypeVar("M", bound="Meeting")

COMMITTED: Final = "committed"
"""The point of a save at which the primary tells that it has committed; who does not hear it cannot know whether."""

_FIRST_PAUSE_SECS: Final = 0.001
_LAST_PAUSE_SECS: Final = 0.1
_PATIENCE: Final = 20
"""A process that lives, but does not come within so many times `timeout_secs`, is given up too: nothing waits for ever."""

_ENDING_SECS: Final = 10.0
"""How long the primary waits, after a failure, for others to stop writing before it removes what they wrote."""


class Meeting:
    """One save of several processes; of a single one, where nothing is sent or awaited.

    Attributes:
      doing: what it is, for messages.
    """

    doing: ClassVar[str] = "save"

    def __init__(self, job: Job | None = None, prefix: str = "", timeout_secs: float = 60) -> None:
        """Begins to give signs of life, until `end`.

        Args:
          job: who takes part; None for one process.
          prefix: of this save's keys.
          timeout_secs: after so long without a sign of life a process counts as lost.
        """
        self.job = job or Job()
        self.timeout_secs = timeout_secs
        self._prefix = prefix
        self._store = Store(coordination_client()) if self.job.others else None
        self._failed = False  # it was told to others, or heard from them
        self._missed_primary = False
        self._over = threading.Event()
        if self._store is not None:
            threading.Thread(target=self._live, name="ckptkit-alive", daemon=True).start()

    def gather(self, point: str, brought: bytes = b"", of: Sequence[int] | None = None) -> Mapping[int, bytes] | None:
        """What every process brought, by its index, on the primary, once all have come; None on others, which do not wait.

        Args:
          point: names what they meet for.
          brought: by this process.
          of: the only ones, beside the primary, that come to this point; None for all.

        Raises:
          errors.TimeoutError: names those that did not come, nor gave a sign of life.
          errors.CheckpointError: what went wrong on another process.
        """
        if self._store is not None and not self.job.is_primary:
            self._store.set(f"{self._at(point)}/{self.job.process_index}", brought)
            return None
        return dict(self.arrivals(point, brought, of))

    def arrivals(self, point: str, brought: bytes = b"", of: Sequence[int] | None = None) -> Iterator[tuple[int, bytes]]:
        """On the primary, every process with what it brought, as they come; what `gather` returns, and raises, one by one."""
        yield self.job.process_index, brought
        if self._store is None:
            return
        came = {self.job.process_index}
        watch = Watch(self._beats, self.timeout_secs)
        while True:
            found = self._listed(self._name(point))
            missing = [process for process in of or self.job.processes if process not in found and process not in came]
            if not missing:
                self.raise_failure()  # some may have left again
            for process in found.keys() - came:
                yield process, found[process]
            came |= found.keys()
            if not missing:
                return
            self._raise_lost(watch, missing, point)
            # When the middle one comes, half of the others have come too, so that there are few listings, whatever the order.
            if self._store.wait(f"{self._at(point)}/{missing[len(missing) // 2]}", self._slice_secs) is None:
                self.raise_failure()

    def tell(self, point: str, word: bytes = b"") -> None:
        """The primary's answer to all others."""
        if self._store is not None:
            self._store.set(f"{self._at(point)}/word", word)

    def hear(self, point: str) -> bytes:
        """The primary's answer, once there is one; raises what `gather` raises."""
        assert self._store is not None
        watch = Watch(self._beats, self.timeout_secs)
        while True:
            if (word := self._store.wait(f"{self._at(point)}/word", self._slice_secs)) is not None:
                return word
            self.raise_failure()
            self._raise_lost(watch, [self.job.primary], point)

    def agree(
        self, point: str, facts: Mapping[str, Any], explain: Callable[[int, Mapping[str, Any]], str | None] | None = None
    ) -> None:
        """Compares what each process says, by name; the primary raises, and others hear of it at their next `hear`.

        Args:
          point: names what they meet for.
          facts: what this process says.
          explain: called on the primary with a process that says something else, and with what it says; may add a line to the
            message.

        Raises:
          errors.ProcessError: names what differs, and on which processes.
        """
        # By the timeout that it has, each tells others that it lives, and judges them.
        facts = {**facts, "timeout_secs": self.timeout_secs, "primary_host": self.job.primary}
        gathered = self.gather(point, json.dumps(facts).encode())
        if gathered is None or len(gathered) == 1:
            return
        said = {process: json.loads(brought) for process, brought in gathered.items()}
        differing = [name for name in facts if any(each.get(name) != facts[name] for each in said.values())]
        if differing:
            lines = [f"{name}: {by_value({p: each.get(name) for p, each in said.items()})}" for name in differing]
            other = min(process for process, each in said.items() if each != facts)
            if explain is not None and (line := explain(other, said[other])) is not None:
                lines.append(line)
            raise self._differ(lines)

    def _differ(self, lines: Sequence[str]) -> errors.ProcessError:
        return errors.ProcessError(
            f"the processes of the job do not {self.doing} the same, so nothing was {self.doing}d:{errors.listing(lines)}\n"
            f"Every process must call {self.doing} with the same path and options, and a tree of the same kind."
        )

    def wait(self, writing: Sequence[futures.Future[Any]]) -> None:
        """Waits until everything is done; raises what went wrong with it, or elsewhere."""
        pending = set(writing) if self._store is not None else set()
        while pending:
            done, pending = futures.wait(pending, self._slice_secs, futures.FIRST_EXCEPTION)
            for future in done:
                future.result()
            if pending:
                self.raise_failure()
        for future in writing:
            future.result()

    def fail(self, error: BaseException) -> None:
        """Tells the others, if they do not know yet; never raises, since it runs where something else went wrong."""
        self._missed_primary = self.job.primary in getattr(error, "missing", ())
        if self._store is not None and not self._failed:
            self._failed = True
            with contextlib.suppress(errors.CheckpointError):
                self._store.set(f"{self._prefix}/failed/{self.job.process_index}", encoded(error))

    def raise_failure(self) -> None:
        """Raises what went wrong on another process, if anything did."""
        if self._store is None:
            return
        if failures := [each for each in self._listed("failed").items() if each[0] != self.job.process_index]:
            self._failed = True
            raise decoded(*min(failures))

    def await_ends(self, known: BaseException) -> None:
        """On the primary, after a failure, waits a while until no other process writes any more.

        Args:
          known: what went wrong; processes that it says are lost are not waited for.
        """
        if self._store is None or not self.job.is_primary:
            return
        awaited = set(self.job.others) - set(getattr(known, "missing", ()))
        end = time.monotonic() + min(_ENDING_SECS, self.timeout_secs)
        with contextlib.suppress(errors.CheckpointError):
            for pause in _pauses():
                if awaited <= self._listed("ended").keys() or time.monotonic() > end:
                    return
                time.sleep(pause)

    def end(self) -> None:
        """This process has nothing to do with the save any more, and gives no more signs of life."""
        if self._store is None or self._over.is_set():
            return
        self._over.set()
        with contextlib.suppress(errors.CheckpointError):
            if self._missed_primary and not _numbering.is_reached(self._store, self._prefix):
                self._withdraw(self._store)
                return
            self._store.set(f"{self._prefix}/ended/{self.job.process_index}", b"")
            if self.job.is_primary:
                _numbering.over(self._store, self._prefix)

    def _withdraw(self, store: Store) -> None:
        """Takes back that this process came where the primary never did: its next call is that of this number."""
        mine = [name for name, _ in store.list(f"{self._prefix}/") if name.endswith(f"/{self.job.process_index}")]
        for name in mine:
            store.delete(f"{self._prefix}/{name}")
        _numbering.take_back(self._prefix)

    @property
    def _slice_secs(self) -> float:
        """How long to wait before looking for failures; of many processes each looks less often, to spare the service."""
        return min(max(0.25, self.job.process_count / 1000), self.timeout_secs / 5)

    def _name(self, point: str) -> str:
        """What a point is called among the keys."""
        return point

    def _at(self, point: str) -> str:
        return f"{self._prefix}/{self._name(point)}"

    def _listed(self, name: str) -> dict[int, bytes]:
        """What lies below a name, by process."""
        assert self._store is not None
        return {int(key): value for key, value in self._store.list(f"{self._prefix}/{name}/") if key.isdecimal()}

    def _beats(self, processes: Collection[int]) -> Mapping[int, bytes | None]:
        """The newest signs of life.

        Raises:
          errors.ProcessError: one of them has another primary, so that the two would wait for each other.
        """
        assert self._store is not None
        beats: Mapping[int, bytes | None]
        if len(processes) > 4:
            beats = self._listed("alive")
        else:
            beats = {process: self._store.get(f"{self._prefix}/alive/{process}") for process in processes}
        primaries = {process: int(beat.split()[0]) for process, beat in beats.items() if beat is not None}
        primaries[self.job.process_index] = self.job.primary
        if len(set(primaries.values())) > 1:
            raise self._differ([f"primary_host: {by_value(primaries)}"])
        return beats

    def _live(self) -> None:
        """The thread that gives signs of life; on the primary it tidies first, for which nobody need wait."""
        assert self._store is not None
        if self.job.is_primary:
            with contextlib.suppress(errors.CheckpointError):
                _numbering.tidy(self._store, self._prefix, self.job.process_count)
        for number in itertools.count():
            if self._over.wait(self.timeout_secs / 5):
                return
            with contextlib.suppress(errors.CheckpointError):
                self._store.set(f"{self._prefix}/alive/{self.job.process_index}", f"{self.job.primary} {number}".encode())

    def _raise_lost(self, watch: Watch, processes: Sequence[int], point: str) -> None:
        """Raises where some of the processes are given up, which should come to a point."""
        if not (lost := watch.lost(processes)):
            return
        why = f", and gave no sign of life for {self.timeout_secs:g} s: killed, stopped, or not calling {self.doing}"
        if watch.is_over:
            why = f" within {_PATIENCE * self.timeout_secs:g} s, {_PATIENCE} times timeout_secs, though alive: held up elsewhere"
        outcome = f"nothing was {self.doing}d"
        if point == COMMITTED:
            outcome = "does not know whether the checkpoint was committed: look whether it is there"
        error = errors.TimeoutError(
            f"{named(lost)} of {self.job.process_count} did not come to the point {point.partition('-')[0]!r} of the "
            f"{self.doing}{why}. Process {self.job.process_index} gave up, and {outcome}. "
            "MultiprocessingOptions(timeout_secs=...) waits longer."
        )
        error.missing = tuple(lost)
        raise error


class Watch:
    """Notices, by this process's clock alone, who gives no sign of life any more.

    Attributes:
      is_over: those who were lost last did give signs, but patience with them is over.
    """

    def __init__(self, beats: Callable[[Collection[int]], Mapping[int, bytes | None]], timeout_secs: float) -> None:
        self._beats = beats
        self._timeout_secs = timeout_secs
        self._start = time.monotonic()
        self._looked = self._start
        self._seen: dict[int, tuple[bytes | None, float]] = {}
        self.is_over = False

    def lost(self, processes: Sequence[int]) -> list[int]:
        """Those of the processes that gave none for too long; looks for signs a few times in that while."""
        now = time.monotonic()
        if now - self._looked < self._timeout_secs / 10:
            return []
        self._looked = now
        beats = self._beats(processes)
        for process in processes:
            beat = beats.get(process)
            if beat != self._seen.get(process, (None, 0))[0]:
                self._seen[process] = beat, now
        silent = [p for p in processes if now - self._seen.get(p, (None, self._start))[1] >= self._timeout_secs]
        self.is_over = not silent and now - self._start >= _PATIENCE * self._timeout_secs
        return list(processes) if self.is_over else silent


def _pauses() -> Iterator[float]:
    """Lengths of pauses between looks, in seconds: short ones first, since most waits are."""
    pause = _FIRST_PAUSE_SECS
    while True:
        yield pause
        pause = min(pause * 1.5, _LAST_PAUSE_SECS)


@contextlib.contextmanager
def convened(kind: type[M], job: Job, key_prefix: str | None, timeout_secs: float) -> Iterator[M]:
    """As `convene`; where the body raises, the others are told."""
    meeting = convene(kind, job, key_prefix, timeout_secs)
    try:
        yield meeting
    except BaseException as error:
        meeting.fail(error)
        meeting.end()
        raise


def convene(kind: type[M], job: Job, key_prefix: str | None, timeout_secs: float) -> M:
    """The meeting for this process's next save or restore.

    Args:
      kind: what to make.
      job: who takes part.
      key_prefix: tells apart what several threads save at once.
      timeout_secs: as for `Meeting`.
    """
    if not job.others:
        return kind(job)
    return kind(job, _numbering.next_prefix(Store(coordination_client()), job, key_prefix), timeout_secs)


_alone = Meeting()
_current: ContextVar[Meeting] = ContextVar("ckptkit_meeting", default=_alone)


def current_meeting() -> Meeting:
    """The meeting of the save that this call is part of; one of a single process where there is none.

    It travels in a context variable, as the tracker of `reports` does.
    """
    return _current.get()


@contextlib.contextmanager
def attending(meeting: Meeting) -> Iterator[None]:
    """Makes `meeting` the current one."""
    token = _current.set(meeting)
    try:
        yield
    finally:
        _current.reset(token)


def on_primary(call: Callable[[], Any]) -> None:
    """Makes a call that knows nothing of other processes: on the primary, as if it were alone."""
    if current_meeting().job.is_primary:
        with attending(_alone):
            call()
