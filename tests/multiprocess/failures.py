"""Makes one process of a job fail at a chosen stage of a save: it raises, is killed, or is stopped, for real."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptkit.leaves.jax_array import JaxArrayHandler
from ckptkit.meeting import Meeting
from ckptkit.saving import Saving
from ckptkit.storage._ocdbt_merge import PartWriter
from ckptkit.storage.ocdbt import OcdbtBackend

STAGES: dict[str, tuple[type, str]] = {
    "stage": (JaxArrayHandler, "stage"),
    "write": (PartWriter, "write"),
    "barrier": (Meeting, "agree"),
    "part": (PartWriter, "commit"),
    "merge": (OcdbtBackend, "merge"),
    "commit": (Saving, "_commit"),
    "end": (Meeting, "hear"),
}


def fail_at(stage: str, action: str, directory: Path) -> Callable[[], None]:
    """Arms a fault, once; what is returned disarms it."""
    owner, name = STAGES[stage]
    original = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if stage == "end" and args[1] != "committed":
            return original(*args, **kwargs)
        setattr(owner, name, original)
        if action == "raise":
            raise OSError(errno.ENOSPC, "no space left, says the test")
        (directory / "struck").touch()
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        return original(*args, **kwargs)

    setattr(owner, name, faulty)
    return lambda: setattr(owner, name, original)
