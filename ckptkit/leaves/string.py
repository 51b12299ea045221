"""str leaves: kept in the checkpoint's metadata, not on the storage backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptkit.grid import Array, Index
from ckptkit.leaves.base import Kinds, Leaf, LeafSpec, Problem, RestoreArgs, TypeHandler
from ckptkit.metadata.values import StringMetadata
from ckptkit.options import RestoreDefaults

if TYPE_CHECKING:
    from ckptkit.processes import Job

__all__ = ["StringHandler"]


class StringHandler(TypeHandler[str]):
    """Text of any length."""

    typestr = "string"
    orbax_typestr = "string"

    def describe(self, leaves: Sequence[Leaf]) -> Sequence[LeafSpec | Problem]:
        return [self._describe(leaf) for leaf in leaves]

    def kinds(self, leaves: Sequence[str]) -> Kinds | None:
        if StringMetadata in set(map(type, leaves)):
            return None
        return Kinds.of(map(str, leaves))  # the text itself is in the spec; a subclass may be equal to another text

    def _describe(self, leaf: Leaf) -> LeafSpec | Problem:
        if isinstance(leaf.value, StringMetadata):
            return Problem("a StringMetadata describes a str but holds none; it is a target for restore.")
        try:
            leaf.value.encode()
        except UnicodeEncodeError as error:
            return Problem(
                f"the str cannot be written as UTF-8 ({error.reason} at position {error.start}); save its bytes as np.uint8."
            )
        return LeafSpec(self.typestr, None, inline=str(leaf.value))

    def owned(self, leaves: Sequence[Leaf], specs: Sequence[LeafSpec], job: Job) -> Sequence[Sequence[Index]]:
        return [()] * len(specs)

    def stage(self, pieces: Sequence[tuple[str, LeafSpec, Index]]) -> Sequence[Array]:
        return []

    def request(self, target: Any, spec: LeafSpec, defaults: RestoreDefaults) -> RestoreArgs:
        return RestoreArgs(restore_type=str, target=target, defaults=defaults)

    def needs(self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], job: Job) -> Sequence[Sequence[Index] | Problem]:
        return [
            () if isinstance(spec.inline, str) else Problem("a str was requested, but no str is stored here.") for spec in specs
        ]

    def assemble(
        self, specs: Sequence[LeafSpec], requests: Sequence[RestoreArgs], parts: Sequence[Mapping[Index, Array]]
    ) -> Sequence[str]:
        return [spec.inline for spec in specs]
