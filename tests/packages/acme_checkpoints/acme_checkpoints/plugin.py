"""What the entry point names. Importing it registers the args of `notes`; the hook registers the leaf type."""

from acme_checkpoints import notes, quantity  # noqa: F401 - importing `notes` is its registration
from ckptkit import hookimpl


@hookimpl
def ckptkit_register(registry):
    registry.add_type_handler(quantity.QuantityHandler(), "acme_checkpoints.quantity.Quantity")


@hookimpl
def ckptkit_save_committed(report):
    print(f"acme saw a checkpoint at {report.path}")


@hookimpl
def ckptkit_restored(report):
    print(f"acme saw a restore from {report.path}")
