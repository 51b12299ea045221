"""Arrays with a unit, as leaves of a tree."""

import numpy as np

from ckptkit.leaves import LeafSpec, TypeHandler
from ckptkit.storage import ArraySpec, chunk_indices, whole


class Quantity:
    """Values and their unit."""

    def __init__(self, values, unit):
        self.values = np.asarray(values)
        self.unit = unit


class QuantityHandler(TypeHandler):
    """Stores the values as an array of one chunk, and the unit beside it."""

    typestr = "acme.quantity"

    def describe(self, leaves):
        return [self._describe(leaf.name, leaf.value) for leaf in leaves]

    def _describe(self, name, quantity):
        shape = quantity.values.shape
        array = ArraySpec(name, shape, quantity.values.dtype, tuple(max(n, 1) for n in shape))
        return LeafSpec(self.typestr, array, extra={"unit": quantity.unit})

    def owned(self, leaves, specs, job):
        return [list(chunk_indices(spec.array)) if job.is_primary else [] for spec in specs]

    def stage(self, pieces):
        return [leaf.values.copy() for leaf, _, _ in pieces]

    def needs(self, specs, requests, job):
        return [[whole(spec.array.shape)] for spec in specs]

    def assemble(self, specs, requests, parts):
        return [Quantity(part[whole(spec.array.shape)], spec.extra["unit"]) for spec, part in zip(specs, parts, strict=True)]
