"""The other processes of the job: who this process is, and who is primary. One process so far."""

from __future__ import annotations

import attrs

__all__ = ["Job"]


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
