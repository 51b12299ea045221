"""What the entry point names. Importing `notes` registers its args; the hooks are for everything else."""

from __future__ import annotations

import logging

from ckptkit import Registry, hookimpl
from ckptkit.reports import SaveReport
from ckptkit_example import notes  # noqa: F401 - importing it is its registration
from ckptkit_example.fractions import FractionHandler

_logger = logging.getLogger(__name__)


@hookimpl
def ckptkit_register(registry: Registry) -> None:
    """Adds the leaf type."""
    registry.add_type_handler(FractionHandler(), "fractions.Fraction")


@hookimpl
def ckptkit_save_committed(report: SaveReport) -> None:
    """Logs each checkpoint."""
    _logger.info("%s: %d leaves, %d bytes in %.1f s", report.path, report.leaf_count, report.byte_count, report.total_secs)
