"""fractions.Fraction as a leaf: two integers of 64 bits, numerator and denominator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ckptkit.leaves import Leaf, LeafSpec, Problem, RestoreArgs, TypeHandler
from ckptkit.storage import ArraySpec, Index, Job, whole

PAIR = whole((2,))


class FractionHandler(TypeHandler[Fraction]):
    """Sees batches of leaves and arrays, never a file."""

    typestr = "ckptkit_example.Fraction"

    def describe(self, leaves: Sequence[Leaf]) -> Sequence[LeafSpec | Problem]:
        return [self._describe(leaf) for leaf in leaves]

    def _describe(self, leaf: Leaf) -> LeafSpec | Problem:
        if max(map(abs, leaf.value.as_integer_ratio())) >= 2**63:
            return Problem("the fraction does not fit into two integers of 64 bits; save it as a str.")
        return LeafSpec(self.typestr, ArraySpec(leaf.name, (2,), np.dtype(np.int64), (2,)))

    def owned(self, leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job) -> Sequence[Sequence[Index]]:
        return [(PAIR,) if job.is_primary else () for _ in leaves]

    def stage(self, pieces: Sequence[tuple[Fraction, LeafSpec, Index]]) -> Sequence[np.ndarray]:
        return [np.array(leaf.as_integer_ratio(), np.int64) for leaf, _, _ in pieces]

    def needs(self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job) -> Sequence[Sequence[Index] | Problem]:
        return [(PAIR,) if _is_pair(spec) else Problem("a Fraction was asked for, but none is stored.") for spec in specs]

    def assemble(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], parts: Sequence[Mapping[Index, Any]]
    ) -> Sequence[Fraction]:
        return [Fraction(*part[PAIR].tolist()) for part in parts]


def _is_pair(spec: LeafSpec) -> bool:
    return spec.array is not None and (spec.array.shape, spec.array.dtype) == ((2,), np.int64)
