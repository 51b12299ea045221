"""Chunks into an OCDBT database: as key-value writes collected in transactions, large ones from the caller's memory.

Arrays with small chunks are never opened: that is what makes thousands of small leaves slow elsewhere.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
import tensorstore as ts

from ckptkit.location import Location
from ckptkit.options import StorageOptions
from ckptkit.storage._futures import done
from ckptkit.storage._tensorstore import writing_error
from ckptkit.storage._values import key_prefix
from ckptkit.storage._zarr_cells import DRIVERS, encoded_cell
from ckptkit.storage.base import ArraySpec, Chunk, Writer
from ckptkit.storage.zarr_documents import DOCUMENT_NAMES, Document, documented, emit

__all__ = ["OcdbtWriter"]

# A transaction keeps what was copied into it until it commits, and about this much for every key. Two are in memory at a time:
# one fills while the other commits. Larger ones are no faster (16 and 32 MiB measured), and cost memory.
_TRANSACTION_NBYTES: Final = 10 << 20
_KEY_NBYTES: Final = 1 << 10

# What is referenced takes no memory of a transaction's; it is bounded all the same, so that writing starts early.
_REFERENCED_PER_COPIED: Final = 6

# Chunks of this size and above are written from the caller's memory; below, opening the array costs more than a copy.
_REFERENCE_NBYTES: Final = 1 << 20


class OcdbtWriter(Writer):
    """Fills one transaction while the one before it commits.

    A commit that fails raises `errors.StorageError` from the call that starts the next one, at the latest `commit`.
    """

    def __init__(
        self, location: Location, store: ts.KvStore, context: ts.Context, arrays: Sequence[ArraySpec], options: StorageOptions
    ) -> None:
        self._location = location
        self._store = store
        self._context = context
        self._begin_transaction()
        self._committing = done()
        self._opened: dict[str, ts.TensorStore] = {}
        self._documents: dict[str, Document] = {}
        self._describe(arrays, options)

    def write(self, chunks: Sequence[Chunk]) -> Future[None]:
        referenced = False
        for chunk in chunks:
            document = self._documents[chunk.array.name]
            if document.raw and document.cell_nbytes >= _REFERENCE_NBYTES:
                self._refer(chunk, document)
                self._fill(document.cell_nbytes // _REFERENCED_PER_COPIED)
                referenced = True
            else:
                self._copy(chunk, document)
        if not referenced:
            return done()
        if self._filled_nbytes:
            self._start_commit()  # else the caller would wait for memory that nothing releases
        return self._committing

    def commit(self) -> None:
        if not self._documents:
            self._mapped(self._store.delete_range(ts.KvStore.KeyRange()))  # makes the manifest, which readers require
        self._start_commit()
        self._committing.result()

    def abort(self) -> None:
        self._transaction.abort()
        self._committing.exception()
        self._opened.clear()

    def _describe(self, arrays: Sequence[ArraySpec], options: StorageOptions) -> None:
        """Writes every array's document, also of those that have no chunk."""
        for array, document, data in documented(arrays, options):
            self._documents[array.name] = document
            self._pending.write(key_prefix(array.name) + DOCUMENT_NAMES[document.version], data)
            self._fill(len(data))

    def _copy(self, chunk: Chunk, document: Document) -> None:
        key = key_prefix(chunk.array.name) + document.chunk_key(chunk.index)
        data = encoded_cell(chunk.data, document).tobytes()
        self._pending.write(key, data)
        self._fill(len(data))

    def _refer(self, chunk: Chunk, document: Document) -> None:
        array = self._open(chunk.array, document).with_transaction(self._transaction)
        domain = tuple(slice(start, stop) for start, stop in chunk.index)
        data = np.asarray(chunk.data, document.dtype)
        self._mapped(array[domain].write(data, can_reference_source_data_indefinitely=True).copy)

    def _open(self, array: ArraySpec, document: Document) -> ts.TensorStore:
        """The array as TensorStore's; its document, which the database need not hold yet, is neither read nor written."""
        if array.name not in self._opened:
            spec = {
                "driver": DRIVERS[document.version],
                "metadata": json.loads(emit(array, document.version)),
                "store_data_equal_to_fill_value": True,
            }
            opening = ts.open(
                spec, kvstore=self._store + key_prefix(array.name), context=self._context, open=True, assume_metadata=True
            )
            self._opened[array.name] = self._mapped(opening)
        return self._opened[array.name]

    def _fill(self, nbytes: int) -> None:
        self._filled_nbytes += nbytes + _KEY_NBYTES
        if self._filled_nbytes >= _TRANSACTION_NBYTES:
            self._start_commit()

    def _start_commit(self) -> None:
        self._committing.result()
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # it cannot be cancelled: TensorStore goes on using the caller's memory
        self._transaction.commit_async().add_done_callback(functools.partial(_settle, done, self._location.url))
        self._committing = done
        self._begin_transaction()

    def _begin_transaction(self) -> None:
        self._transaction = ts.Transaction()
        self._pending = self._store.with_transaction(self._transaction)
        self._filled_nbytes = 0

    def _mapped(self, future: Any) -> Any:
        try:
            return future.result()
        except Exception as error:
            raise writing_error(error, self._location.url) from error


def _settle(done: Future[None], path: str, committed: Any) -> None:
    error = committed.exception()
    if error is None:
        done.set_result(None)
    else:
        mapped = writing_error(error, path)
        mapped.__cause__ = error
        done.set_exception(mapped)
