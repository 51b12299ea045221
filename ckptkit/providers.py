"""Who provides what a checkpoint needs, as the checkpoint records it, and how to get that."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Final

__all__ = ["way_out"]

_DISTRIBUTION: Final = re.compile(r"(?!module )([A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?) ([0-9A-Za-z.!+_-]{1,100})")
_OWN_NAME: Final = "ckptkit"
"""No command names it: on PyPI it is another project's."""
_MODULE: Final = re.compile(r"module ([\w.]{1,200})")


def way_out(provider: str | None) -> str:
    """How to get what is not registered here, in a sentence.

    Args:
      provider: what the checkpoint records, such as 'acme-checkpoints 1.2.0' or 'module train'; a stranger may have written it.
    """
    if provider is not None and (found := _DISTRIBUTION.fullmatch(provider)):
        name = found[1]
        version = _installed(name)
        if version == found[2]:
            return f"{provider} provides it and is installed, but has not registered it here; `ckptkit plugins` shows why"
        here = "" if version is None else f", {version} is installed here"
        provided = f"{provider} provided it when the checkpoint was written{here}"
        if name.lower() == _OWN_NAME:
            return f"{provided}; install that version, from where this one came"
        command = "pip install" if version is None else "pip install --upgrade"
        return f"{provided}; install it, if you trust whoever made the checkpoint: {command} {name}"
    if provider is not None and (found := _MODULE.fullmatch(provider)):
        return f"module {found[1]} provided it when the checkpoint was written; import that module, which registers it"
    return "install the package that provides it, or import the module that registers it"


def _installed(name: str) -> str | None:
    """The version of a distribution that is installed here."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
