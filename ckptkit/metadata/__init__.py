"""What is written about a checkpoint, to and from JSON: one module per file of the format.

Nothing here touches storage: bytes come in with the name of their file, and go out. Every decoder gives a valid result
or raises `errors.FormatError`, whatever the bytes are; nothing in them is executed and no size in them is allocated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptkit._lazy import lazy_names

if TYPE_CHECKING:
    from ckptkit.metadata.sharding import ShardingMetadata as ShardingMetadata
    from ckptkit.metadata.step import StepMetadata as StepMetadata
    from ckptkit.metadata.values import ArrayMetadata as ArrayMetadata
    from ckptkit.metadata.values import Metadata as Metadata
    from ckptkit.metadata.values import ScalarMetadata as ScalarMetadata
    from ckptkit.metadata.values import StorageMetadata as StorageMetadata
    from ckptkit.metadata.values import StringMetadata as StringMetadata
    from ckptkit.metadata.values import TreeMetadata as TreeMetadata
else:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "ArrayMetadata": "ckptkit.metadata.values",
            "Metadata": "ckptkit.metadata.values",
            "ScalarMetadata": "ckptkit.metadata.values",
            "ShardingMetadata": "ckptkit.metadata.sharding",
            "StepMetadata": "ckptkit.metadata.step",
            "StorageMetadata": "ckptkit.metadata.values",
            "StringMetadata": "ckptkit.metadata.values",
            "TreeMetadata": "ckptkit.metadata.values",
        },
    )
