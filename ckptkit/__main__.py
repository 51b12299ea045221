"""The command line, as an installed script and as `python -m ckptkit`."""

from __future__ import annotations

import sys
import traceback

__all__ = ["run"]


def run() -> int:
    """Runs the command line; 2, and never the 1 of a corrupt checkpoint, where it cannot even be imported."""
    try:
        from ckptkit.cli import main  # noqa: PLC0415 - what it imports may fail
    except Exception:  # noqa: BLE001 - for want of memory, say
        traceback.print_exc()
        return 2
    return main()


if __name__ == "__main__":
    sys.exit(run())
