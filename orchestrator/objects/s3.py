"""S3 and what speaks its protocol: conditional requests (If-None-Match, If-Match) keep two writers apart.

Goes through s3fs, so that credentials, profiles and endpoints are found here as they are for data and bases
(`AWS_ENDPOINT_URL`, `AWS_PROFILE`, instance roles, fsspec's own configuration).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from .failures import NotFound, error_code, explained

_TAKEN = {"PreconditionFailed", "412"}
_BUSY = {"ConditionalRequestConflict", "OperationAborted", "409"}
_ABSENT = {"NoSuchKey", "404"}
_MAX_TRIES = 20
_DELETED_AT_ONCE = 1000
"""Keys that one DeleteObjects request may name, by the protocol."""


class S3Objects:
    """The operations of `objects.py` on `s3://BUCKET/KEY`."""

    def create(self, path: str, data: bytes) -> bool:
        return self._put_if(path, data, {"IfNoneMatch": "*"}) is not None

    def replace(self, path: str, etag: str | None, data: bytes) -> str | None:
        return self._put_if(path, data, {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag})

    def write(self, path: str, data: bytes) -> None:
        bucket, key = _split(path)
        with _explaining(path, bucket):
            _store().call_s3("put_object", Bucket=bucket, Key=key, Body=data)

    def read(self, path: str) -> tuple[bytes, str]:
        bucket, key = _split(path)
        store = _store()

        async def get() -> tuple[bytes, str]:
            response = await store._call_s3("get_object", Bucket=bucket, Key=key)
            async with response["Body"] as body:
                return await body.read(), response["ETag"]

        with _explaining(path, bucket):
            return sync(store.loop, get)

    def exists(self, path: str) -> bool:
        bucket, key = _split(path)
        try:
            with _explaining(path, bucket):
                _store().call_s3("head_object", Bucket=bucket, Key=key)
        except NotFound:
            return any(self._pages(path, key.rstrip("/") + "/", limit=1))
        return True

    def list_(self, path: str) -> list[str]:
        _, key = _split(path)
        prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
        names: set[str] = set()
        for page in self._pages(path, prefix, delimiter="/"):
            names.update(item["Key"][len(prefix) :] for item in page.get("Contents", ()))
            names.update(item["Prefix"][len(prefix) :].rstrip("/") for item in page.get("CommonPrefixes", ()))
        return sorted(name for name in names if name and not name.startswith("."))

    def find(self, path: str) -> list[str]:
        prefix = _split(path)[1].rstrip("/") + "/"
        names = sorted(
            item["Key"][len(prefix) :]
            for page in self._pages(path, prefix)
            for item in page.get("Contents", ())
            if not item["Key"].endswith("/")
        )
        return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]

    def delete(self, path: str) -> None:
        bucket, key = _split(path)
        with _explaining(path, bucket):
            _store().call_s3("delete_object", Bucket=bucket, Key=key)

    def put_tree(self, source: Path, path: str, manifest: str | None) -> None:
        bucket, _ = _split(path)
        files = sorted(file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file())
        written: list[str] = []
        try:
            with _explaining(path, bucket):
                for name in sorted(files, key=lambda name: name == manifest):  # the manifest comes last
                    written.append(name)
                    _store().put_file(str(source / name), f"{path.rstrip('/')}/{name}")
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._delete_keys(path, [f"{_split(path)[1].rstrip('/')}/{name}" for name in written])
            raise

    def get_tree(self, path: str, target: Path) -> None:
        bucket, key = _split(path)
        prefix = key.rstrip("/") + "/"
        names = [
            item["Key"][len(prefix) :]
            for page in self._pages(path, prefix)
            for item in page.get("Contents", ())
            if not item["Key"].endswith("/")
        ]
        if not names:
            raise NotFound("there is no such folder.", where=path)
        for name in names:
            local = target / name
            with _explaining(str(target), bucket):
                local.parent.mkdir(parents=True, exist_ok=True)
            with _explaining(f"{path.rstrip('/')}/{name}", bucket):
                _store().get_file(f"{path.rstrip('/')}/{name}", str(local))

    def delete_tree(self, path: str) -> None:
        _, key = _split(path)
        keys = [
            item["Key"]
            for page in self._pages(path, key.rstrip("/") + "/")
            for item in page.get("Contents", ())
        ]
        self._delete_keys(path, keys)

    def check_writable(self, path: str) -> None:
        probe = f"{path.rstrip('/')}/.probe-{secrets.token_hex(8)}"
        self.write(probe, b"probe")
        self.delete(probe)

    def clean(self, path: str) -> None:
        """Nothing to do: an object is there whole or not at all."""

    def _put_if(self, path: str, data: bytes, condition: dict[str, str]) -> str | None:
        """The new object's ETag; None where the condition did not hold."""
        bucket, key = _split(path)
        nonce = secrets.token_hex(16)
        for attempt in range(_MAX_TRIES):
            try:
                return _store().call_s3(
                    "put_object", Bucket=bucket, Key=key, Body=data, Metadata={"writer": nonce}, **condition
                )["ETag"]
            except Exception as error:
                code = error_code(error)
                if code in _TAKEN:
                    # a request that was repeated because its answer got lost meets its own first copy
                    return self._etag_if_mine(path, nonce)
                if code in _ABSENT and "IfMatch" in condition:
                    return None
                if code not in _BUSY or attempt == _MAX_TRIES - 1:
                    raise explained(error, path, bucket) from error
                time.sleep(0.05 * (attempt + 1))
        raise AssertionError("the last attempt returns or raises")

    def _etag_if_mine(self, path: str, nonce: str) -> str | None:
        bucket, key = _split(path)
        try:
            with _explaining(path, bucket):
                head = _store().call_s3("head_object", Bucket=bucket, Key=key)
        except NotFound:
            return None
        return head["ETag"] if head.get("Metadata", {}).get("writer") == nonce else None

    def _pages(
        self, path: str, prefix: str, delimiter: str = "", limit: int = 1000
    ) -> Iterator[dict[str, Any]]:
        bucket, _ = _split(path)
        request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": limit}
        if delimiter:
            request["Delimiter"] = delimiter
        while True:
            with _explaining(path, bucket):
                page = _store().call_s3("list_objects_v2", **request)
            if page.get("KeyCount", 0):
                yield page
            if not page.get("IsTruncated") or limit < 1000:
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    def _delete_keys(self, path: str, keys: list[str]) -> None:
        bucket, _ = _split(path)
        for first in range(0, len(keys), _DELETED_AT_ONCE):
            batch = [{"Key": key} for key in keys[first : first + _DELETED_AT_ONCE]]
            with _explaining(path, bucket):
                _store().call_s3("delete_objects", Bucket=bucket, Delete={"Objects": batch, "Quiet": True})


def _store() -> Any:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    chosen = {"endpoint_url": endpoint} if endpoint else {}
    return fsspec.filesystem("s3", use_listings_cache=False, **chosen)


def _split(path: str) -> tuple[str, str]:
    bucket, _, key = path.partition("://")[2].partition("/")
    return bucket, key


@contextlib.contextmanager
def _explaining(where: str, bucket: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise explained(error, where, bucket) from error
