"""Checkpoints on object stores: `s3://bucket/path` and `gs://bucket/path` wherever ckptkit takes a path.

`S3` and `GoogleStorage` are both the options and what makes a place of a URL. The plugin registers one of each with its
defaults; others are registered over them: `registry.add_scheme("s3", S3(endpoint="http://..."), override=True)`.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import attrs

import ckptkit
from ckptkit import errors

if TYPE_CHECKING:
    from ckptkit.storage import KvStoreLocation

__version__ = "0.1.0"
__all__ = ["S3", "GoogleStorage", "ckptkit_register"]

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_INITIAL_DELAY = "200ms"
_MAX_DELAY = "4s"

# TensorStore takes these from the environment alone; without them it waits for ever for a server that says nothing.
_PATIENCE = {
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "15",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}


def _not_negative(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise errors.ArgsError(f"{type(instance).__name__}({attribute.name}={value!r}): expected a whole number, 0 or more.")


def _http_url(instance: Any, attribute: attrs.Attribute[Any], value: str | None) -> None:
    if value is not None and not re.match(r"https?://[^/]", value):
        raise errors.ArgsError(f"{type(instance).__name__}({attribute.name}={value!r}): expected http://host or https://host.")


@attrs.frozen(kw_only=True)
class S3:
    """How to reach S3, or another store that speaks its protocol. Called with a URL, it gives the place.

    Attributes:
      endpoint: URL of the server; None for AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else Amazon's own.
      region: of the bucket; None for AWS_REGION or AWS_DEFAULT_REGION, else what the server says of the bucket.
      profile: of ~/.aws/credentials; None for what the environment says: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, else
        AWS_PROFILE, else the role of the machine.
      anonymous: send no credentials at all.
      max_retries: how often a request is tried again after an error that may pass, with growing delays of 0.2 to 4 s.
    """

    endpoint: str | None = attrs.field(default=None, validator=_http_url)
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    max_retries: int = attrs.field(default=5, validator=_not_negative)

    def __call__(self, url: str) -> KvStoreLocation:
        """The place that 's3://bucket/path' names.

        Raises:
          errors.ArgsError: another URL, one without a path, or one with a part that is empty, '.' or '..'.
        """
        environ = os.environ
        endpoint = self.endpoint or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
        region = self.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
        spec: dict[str, Any] = {"driver": "s3", "aws_credentials": self._credentials()}
        spec["s3_request_retries"] = _retries(self.max_retries)
        if endpoint:
            spec |= {"endpoint": endpoint.rstrip("/"), "aws_region": region or "us-east-1"}  # servers elsewhere have one region
        elif region:
            spec["aws_region"] = region
        return _place(url, "s3", spec)

    def _credentials(self) -> dict[str, str]:
        if self.anonymous:
            return {"type": "anonymous"}
        if self.profile is not None:
            return {"type": "profile", "profile": self.profile}
        return {"type": "environment" if os.environ.get("AWS_ACCESS_KEY_ID") else "default"}


@attrs.frozen(kw_only=True)
class GoogleStorage:
    """How to reach Google Cloud Storage. Called with a URL, it gives the place. Credentials are the application default ones.

    Attributes:
      user_project: the project that is billed for requests to buckets where the requester pays.
      max_retries: how often a request is tried again after an error that may pass, with growing delays of 0.2 to 4 s.
    """

    user_project: str | None = None
    max_retries: int = attrs.field(default=5, validator=_not_negative)

    def __call__(self, url: str) -> KvStoreLocation:
        """The place that 'gs://bucket/path' names.

        Raises:
          errors.ArgsError: another URL, one without a path, or one with a part that is empty, '.' or '..'.
        """
        spec: dict[str, Any] = {"driver": "gcs", "gcs_request_retries": _retries(self.max_retries)}
        if self.user_project is not None:
            spec["gcs_user_project"] = {"project_id": self.user_project}
        return _place(url, "gs", spec)


def _retries(count: int) -> dict[str, Any]:
    return {"max_retries": count, "initial_delay": _INITIAL_DELAY, "max_delay": _MAX_DELAY}


def _place(url: str, scheme: str, spec: dict[str, Any]) -> KvStoreLocation:
    from ckptkit.storage import KvStoreLocation  # noqa: PLC0415 - it imports TensorStore, which takes a while

    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    found, separator, rest = url.partition("://")
    bucket, _, path = rest.rstrip("/").partition("/")
    # Checked here, since TensorStore's client resolves '..' like a path, which would lead into another bucket.
    parts = path.split("/")
    if found.lower() != scheme or not separator or not _BUCKET.fullmatch(bucket) or any(p in ("", ".", "..") for p in parts):
        raise errors.ArgsError(
            f"{url!r}: expected {scheme}://bucket/path, with a path, and no part of it that is empty, '.' or '..'."
        )
    return KvStoreLocation(f"{scheme}://{bucket}/{path}", {**spec, "bucket": bucket, "path": f"{path}/"})


@ckptkit.hookimpl
def ckptkit_register(registry: ckptkit.Registry) -> None:
    """Registers the schemes s3 and gs."""
    registry.add_scheme("s3", S3())
    registry.add_scheme("gs", GoogleStorage())
