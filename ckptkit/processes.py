"""The processes of the job: who this one is, who takes part, who is primary, and whether all are about to be stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from ckptkit import errors

if TYPE_CHECKING:
    from ckptkit.options import MultiprocessingOptions

__all__ = ["Job", "coordination_client", "job_of", "reached_preemption"]


@attrs.frozen
class Job:
    """This process among those that save or restore together.

    Attributes:
      process_index: this process.
      processes: all that take part, in ascending order.
      primary: the one that writes metadata and commits.
    """

    process_index: int = 0
    processes: tuple[int, ...] = (0,)
    primary: int = 0

    @property
    def process_count(self) -> int:
        return len(self.processes)

    @property
    def is_primary(self) -> bool:
        return self.process_index == self.primary

    @property
    def others(self) -> tuple[int, ...]:
        """All but this process."""
        return tuple([process for process in self.processes if process != self.process_index])


def coordination_client() -> Any:
    """The client of JAX's coordination service; None in a job of one process, which need not have started jax."""
    from jax._src import distributed  # noqa: PLC0415 - jax has no public name for it, and tells of no plan to give it one

    state = distributed.global_state
    return state.client if (state.num_processes or 1) > 1 else None


def job_of(options: MultiprocessingOptions) -> Job:
    """The job that a save with these options belongs to; `primary_host=None` makes each process one of its own.

    Raises:
      errors.ArgsError: the options name processes that the job does not have, or not this one.
    """
    index, count = 0, 1
    if coordination_client() is not None:
        import jax  # noqa: PLC0415 - a process that is alone need not start jax for this

        index, count = jax.process_index(), jax.process_count()
    active, primary = options.active_processes, options.primary_host
    named = {*(active or ()), *(() if primary is None else (primary,))}
    if absent := sorted(process for process in named if process not in range(count)):
        raise errors.ArgsError(
            f"{options}: the job has {count} processes, and none of index {absent}; nobody would commit the save. Name processes "
            "below jax.process_count()."
        )
    if active is not None and index not in active:
        raise errors.ArgsError(f"{options}: this process, {index}, takes no part; only those named may save.")
    if primary is None:
        return Job(index, (index,), index)
    processes = tuple(range(count)) if active is None else tuple(sorted(active))
    if primary not in processes:
        raise errors.ArgsError(f"{options}: the primary process must be one of those that take part; pass primary_host too.")
    return Job(index, processes, primary)


def reached_preemption(step: int) -> bool:
    """Whether the job is about to be stopped and this is the step to save at: the same step on every process.

    To be called once a step by every process, with the same numbers. One process that is told to end (SIGTERM) is enough for all
    to get True, at the first step that none of them has passed. Always False where there is one process, or where
    `jax_enable_preemption_service` is off.
    """
    from jax._src import distributed  # noqa: PLC0415 - as above

    if distributed.global_state.preemption_sync_manager is None:
        return False
    from jax.experimental import multihost_utils  # noqa: PLC0415 - only where it is used

    return bool(multihost_utils.reached_preemption_sync_point(step))
