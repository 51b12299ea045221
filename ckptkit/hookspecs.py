"""What a plugin may implement. Every hook is optional.

A plugin is a module or an object that an entry point in group `ckptkit` names; it marks its functions with `hookimpl`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from ckptkit.registry import Registry
    from ckptkit.reports import ProgressEvent, RestoreReport, SaveReport

__all__ = [
    "PROJECT",
    "ckptkit_progress",
    "ckptkit_register",
    "ckptkit_restored",
    "ckptkit_save_committed",
    "hookimpl",
    "hookspec",
]

PROJECT = "ckptkit"
"""pluggy's project name, and the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def ckptkit_register(registry: Registry) -> None:
    """Add args, handlers, type handlers, storage backends and schemes to the registry."""


@hookspec
def ckptkit_save_committed(report: SaveReport) -> None:
    """A checkpoint became visible; called once per save, in the thread that committed it."""


@hookspec
def ckptkit_restored(report: RestoreReport) -> None:
    """A restore finished; called in the caller's thread."""


@hookspec
def ckptkit_progress(event: ProgressEvent) -> None:
    """A save or restore went on; a few calls a second at most, never one per leaf."""
