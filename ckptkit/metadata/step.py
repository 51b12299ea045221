"""`_CHECKPOINT_METADATA`: what is known of a checkpoint as a whole, whoever handles what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from ckptkit import errors
from ckptkit.metadata.json import checked_custom, dump_exact, expect, load_exact, unexpected

__all__ = ["STEP_FILE", "StepMetadata", "decode_step", "encode_step"]

STEP_FILE = "_CHECKPOINT_METADATA"


@attrs.frozen(kw_only=True)
class StepMetadata:
    """What is known of a checkpoint.

    Attributes:
      item_handlers: type string of the handler that wrote it, or of each item's handler by the item's name; None if unknown.
      item_metadata: what that handler, or each item's, says about its content; not part of the file.
      has_checksums: whether the checkpoint has a list of its files with their checksums; Orbax's have none; not part of the file.
      providers: who provides the handlers, by type string, as 'distribution version'; not part of the file.
      metrics: the user's numbers about the step.
      performance_metrics: how the save went, in numbers.
      init_timestamp_nsecs: when the save began, in nanoseconds since 1970.
      commit_timestamp_nsecs: when the checkpoint became visible, likewise.
      custom_metadata: the user's own, any JSON object.
    """

    item_handlers: str | dict[str, str] | None = None
    item_metadata: Any = None
    has_checksums: bool = False
    providers: Mapping[str, str] = attrs.field(factory=dict)
    metrics: dict[str, Any] = attrs.field(factory=dict)
    performance_metrics: dict[str, float] = attrs.field(factory=dict)
    init_timestamp_nsecs: int | None = None
    commit_timestamp_nsecs: int | None = None
    custom_metadata: dict[str, Any] = attrs.field(factory=dict)


_FIELDS = [
    field.name for field in attrs.fields(StepMetadata) if field.name not in ("item_metadata", "has_checksums", "providers")
]


def encode_step(meta: StepMetadata) -> bytes:
    """The file's bytes.

    Raises:
      errors.ArgsTypeError: metadata of the user's that JSON cannot hold, or `custom_metadata` that is not a dict.
    """
    if not isinstance(meta.custom_metadata, dict):
        raise errors.ArgsTypeError(f"custom_metadata is a {type(meta.custom_metadata).__qualname__}, expected a dict.")
    return dump_exact({name: checked_custom(getattr(meta, name), name) for name in _FIELDS})


def decode_step(data: bytes, where: str) -> StepMetadata:
    """The metadata that a file holds; absent fields have their defaults, unknown ones count as custom metadata.

    Raises:
      errors.FormatError: not a JSON object, or a field of the wrong type.
    """
    document = expect(load_exact(data, where), dict, "the document", where)
    unknown = {key: value for key, value in document.items() if key not in _FIELDS}
    return StepMetadata(
        item_handlers=_item_handlers(document.get("item_handlers"), where),
        metrics=_object(document, "metrics", where),
        performance_metrics={k: v for k, v in _object(document, "performance_metrics", where).items() if type(v) in (int, float)},
        init_timestamp_nsecs=_nsecs(document, "init_timestamp_nsecs", where),
        commit_timestamp_nsecs=_nsecs(document, "commit_timestamp_nsecs", where),
        custom_metadata=unknown | _object(document, "custom_metadata", where),
    )


def _item_handlers(value: Any, where: str) -> str | dict[str, str] | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {item: expect(name, str, "a type string", where) for item, name in value.items() if name is not None}
    raise unexpected(where, "item_handlers", value, "a string or an object of strings")


def _object(document: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    value = document.get(name)
    return {} if value is None else expect(value, dict, name, where)


def _nsecs(document: dict[str, Any], name: str, where: str) -> int | None:
    value = document.get(name)
    return None if value is None else expect(value, int, name, where)
