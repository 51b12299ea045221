"""The key-value store of JAX's coordination service, with our errors. Process 0 runs the service."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from ckptkit import errors
from ckptkit._gc import resumed_gc

__all__ = ["Store"]


class Store:
    """The coordination service's key-value store, with our errors."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def set(self, key: str, value: bytes) -> None:
        with _mapped():
            self._client.key_value_set_bytes(key, value, allow_overwrite=True)

    def claim(self, key: str) -> bool:
        """Makes a key; False where it is there already."""
        try:
            self._client.key_value_set_bytes(key, b"")
        except Exception as error:
            if "ALREADY_EXISTS" not in str(error):
                raise _service_error(error) from error
            return False
        return True

    def get(self, key: str) -> bytes | None:
        return self._found(functools.partial(self._client.key_value_try_get_bytes, key), "NOT_FOUND")

    @resumed_gc()
    def wait(self, key: str, timeout_secs: float) -> bytes | None:
        """The value once there is one; None where there is none in time."""
        milliseconds = max(1, int(timeout_secs * 1000))
        return self._found(functools.partial(self._client.blocking_key_value_get_bytes, key, milliseconds), "DEADLINE_EXCEEDED")

    def list(self, directory: str) -> Iterator[tuple[str, bytes]]:
        """Names and values below a directory, whose name ends in '/'."""
        with _mapped():
            found = self._client.key_value_dir_get_bytes(directory)
        return ((key[len(directory) :], value) for key, value in found)

    def delete(self, directory: str) -> None:
        with _mapped():
            self._client.key_value_delete(directory)

    def _found(self, ask: Callable[[], Any], nothing: str) -> bytes | None:
        try:
            return bytes(ask())
        except Exception as error:
            if nothing not in str(error):
                raise _service_error(error) from error
            return None


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _service_error(error) from error


def _service_error(error: Exception) -> errors.ProcessError:
    return errors.ProcessError(
        f"JAX's coordination service, which process 0 runs, does not answer: {error}. If process 0 has ended, start the job "
        "again."
    )
