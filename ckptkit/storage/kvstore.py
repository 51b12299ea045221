"""A place in any of TensorStore's key-value stores: memory, S3, Google's. A scheme needs nothing but its JSON."""

from __future__ import annotations

import errno
import functools
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from ckptkit import errors
from ckptkit.location import MarkerLocation, checked_parts
from ckptkit.storage._tensorstore import SHARED_CONTEXT, store_error

__all__ = ["KvStoreLocation", "memory_location"]

_MEMORY = "memory://"


class KvStoreLocation(MarkerLocation):
    """The keys of a key-value store that begin with a prefix, as a directory.

    Args:
      url: names the place; the factory of its scheme makes this location of it.
      spec: TensorStore's JSON for the store. Its 'path' ends in '/', or is empty: then the place is the whole store.
    """

    def __init__(self, url: str, spec: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        self._spec = dict(spec)

    def child(self, name: str) -> KvStoreLocation:
        inside = self._key(name)
        return KvStoreLocation(f"{self.url}/{inside}", {**self._spec, "path": f"{self._spec['path']}{inside}/"})

    def kvstore(self) -> dict[str, Any]:
        return dict(self._spec)

    def read_bytes(self, name: str, limit: int = 1 << 30) -> bytes:
        found = self._done(self._store.read(self._key(name)), "read", name)
        if found.state == "missing":
            raise errors.NotFoundError(errno.ENOENT, "cannot read: no such file", f"{self.url}/{name}")
        if len(found.value) > limit:
            raise errors.FormatError(f"{self.url}/{name}: larger than {limit} bytes, more than a file of this kind ever is.")
        return bytes(found.value)

    def write_bytes(self, name: str, data: bytes) -> None:
        self._done(self._store.write(self._key(name), data), "write", name)

    def replace_bytes(self, name: str, expected: bytes | None, data: bytes) -> bool:
        key = self._key(name)
        found = self._done(self._store.read(key), "read", name)
        if (found.value if found.state == "value" else None) != expected:
            return False
        self._done(self._store.write(key, data, if_equal=found.stamp.generation), "write", name)
        # Not what the write says: one that was tried again finds its own first attempt, and some stores ignore the condition.
        return bytes(self._done(self._store.read(key), "read", name).value) == data

    def exists(self, name: str = "") -> bool:
        if not name:
            return bool(self._keys(""))
        key = self._key(name)
        return bool(self._listed(ts.KvStore.KeyRange(key, f"{key}\0")) or self._keys(f"{key}/"))

    def names(self) -> Mapping[str, bool]:
        found: dict[str, bool] = {}
        for key in self._keys(""):
            name, slash, _ = key.decode("utf-8", "surrogateescape").partition("/")
            if name:
                found[name] = found.get(name, False) or bool(slash)
        return found

    def delete(self, name: str = "") -> None:
        if name:
            self._done(self._store.write(self._key(name), None), "delete", name)
        self._done(self._store.delete_range(_below(f"{self._key(name)}/" if name else "")), "delete", name)

    def _keys(self, prefix: str) -> list[bytes]:
        return self._listed(_below(prefix))

    def _listed(self, keys: ts.KvStore.KeyRange) -> list[bytes]:
        return list(self._done(self._store.list(keys), "list", ""))

    @functools.cached_property
    def _store(self) -> ts.KvStore:
        store: ts.KvStore = self._done(ts.KvStore.open(self._spec, context=SHARED_CONTEXT), "open", "")
        return store

    def _key(self, name: str) -> str:
        return "/".join(checked_parts(name, self.url))

    def _done(self, future: Any, doing: str, name: str) -> Any:
        """The result of one of TensorStore's futures."""
        try:
            return future.result()
        except Exception as error:
            raise store_error(error, f"{self.url}/{name}".rstrip("/"), doing) from error


def _below(prefix: str) -> ts.KvStore.KeyRange:
    """The keys that begin with a prefix, which ends in '/' or is empty."""
    return ts.KvStore.KeyRange(prefix, prefix[:-1] + "0") if prefix else ts.KvStore.KeyRange()  # '0' follows '/'


def memory_location(url: str) -> KvStoreLocation:
    """A named place in the memory of this process, from 'memory://name' or 'memory://name/below'.

    What is saved there stays until the process ends, or until `Location.delete` removes it.

    Raises:
      errors.ArgsError: no name, or a part of it that is '.' or '..'.
    """
    name = url[len(_MEMORY) :].rstrip("/")
    try:
        inside = "/".join(checked_parts(name, url))
    except errors.FormatError as error:
        raise errors.ArgsError(
            f"{url!r}: expected memory://name, or memory://name/below, with no part '', '.' or '..'."
        ) from error
    return KvStoreLocation(_MEMORY + inside, {"driver": "memory", "path": f"{inside}/"})
