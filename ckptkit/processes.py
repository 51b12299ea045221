"""The other processes of the job: who this process is, and who is primary. One process so far."""

from __future__ import annotations

import attrs

from ckptkit import errors
from ckptkit.options import MultiprocessingOptions

__all__ = ["Job", "check_takes_part"]


@attrs.frozen
class Job:
    """This process among those that save or restore together.

    Attributes:
      process_index: this process.
      process_count: how many there are.
      primary: index of the one that writes metadata and commits.
    """

    process_index: int = 0
    process_count: int = 1
    primary: int = 0

    @property
    def is_primary(self) -> bool:
        return self.process_index == self.primary


def check_takes_part(options: MultiprocessingOptions) -> None:
    """Refuses a save whose options name processes that the job does not have, or not this one.

    Raises:
      errors.ArgsError: the save would never be committed, or other processes would wait for nothing.
    """
    active, primary = options.active_processes, options.primary_host
    if active is None and not primary:
        return  # all take part, and process 0 is always there: jax need not even be started
    import jax  # noqa: PLC0415 - see above

    named = {*(active or ()), *(() if primary is None else (primary,))}
    if absent := sorted(index for index in named if index >= jax.process_count()):
        raise errors.ArgsError(
            f"{options}: the job has {jax.process_count()} processes, and none of index {absent}; nobody would commit the save. "
            "Name processes below jax.process_count()."
        )
    if active is not None and jax.process_index() not in active:
        raise errors.ArgsError(f"{options}: this process, {jax.process_index()}, takes no part; only those named may save.")
