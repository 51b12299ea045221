"""Raises in its hook."""

from ckptkit import hookimpl


@hookimpl
def ckptkit_register(registry):
    raise LookupError("not today")
