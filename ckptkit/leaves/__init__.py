"""Type handlers: what an author of one needs, and the per-leaf arguments of save and restore."""

from ckptkit.leaves.base import ArrayRestoreArgs, Kinds, Leaf, LeafSpec, Problem, RestoreArgs, SaveArgs, TypeHandler

__all__ = ["ArrayRestoreArgs", "Kinds", "Leaf", "LeafSpec", "Problem", "RestoreArgs", "SaveArgs", "TypeHandler"]
