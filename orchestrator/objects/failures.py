"""From what a file system or an object store says to a sentence with a next step."""

from __future__ import annotations

import errno

from ..errors import StorageError


class NotFound(StorageError):
    """The file or object is not there."""

    may_pass = False


_Advice = tuple[str, str | None]
"""What the matter is, and what to do."""

_BY_ERRNO: dict[int, _Advice] = {
    errno.EROFS: ("the file system is read-only.", "Mount it writable, or name another folder."),
    errno.ENOSPC: ("the disk is full.", "Free some space, or name a folder on another disk."),
    errno.EDQUOT: ("the disk quota is used up.", "Free some space, or name a folder on another disk."),
    errno.EACCES: ("no permission.", "Change the folder's owner or mode, or name another folder."),
    errno.EPERM: ("no permission.", "Change the folder's owner or mode, or name another folder."),
    errno.ENOTDIR: ("a part of this path is a file, not a folder.", "Name another folder."),
    errno.EISDIR: ("this is a folder, not a file.", None),
    errno.EEXIST: ("something is there already.", "Nothing was written."),
    errno.ENOTEMPTY: ("something is there already.", "Nothing was written."),
    errno.ENAMETOOLONG: ("the name is too long.", "Choose a shorter name."),
    errno.ESTALE: ("the network file system has lost this folder.", "Mount it again."),
    errno.EIO: ("the disk reports an input/output error.", "Check the disk."),
}

_NO_PERMISSION = "Give these credentials the right to read, write, list and delete there, or use others."
_BY_CODE: dict[str, _Advice] = {
    "NoSuchBucket": ("the bucket '{bucket}' does not exist.", "Create it, or name another one."),
    "AccessDenied": ("the store denies access to the bucket '{bucket}'.", _NO_PERMISSION),
    "403": ("the store denies access to the bucket '{bucket}'.", _NO_PERMISSION),
    "InvalidAccessKeyId": ("the store does not know this access key.", "Check AWS_ACCESS_KEY_ID."),
    "SignatureDoesNotMatch": ("the store refuses the signature.", "Check AWS_SECRET_ACCESS_KEY."),
    "ExpiredToken": ("the credentials have expired.", "Log in again."),
    "InvalidBucketName": ("'{bucket}' is not a bucket's name.", "Write s3://BUCKET/FOLDER."),
    "QuotaExceeded": ("the bucket '{bucket}' is full.", "Free some space, or name another bucket."),
    "InsufficientStorage": ("the store is full.", "Free some space, or name another store."),
    "XMinioStorageFull": ("the store is full.", "Free some space, or name another store."),
    "507": ("the store is full.", "Free some space, or name another store."),
    "NotImplemented": (
        "this store has no conditional writes (If-None-Match, If-Match), which keep two writers apart.",
        "Use a store that has them (AWS S3, MinIO, Ceph, Cloudflare R2), or a local folder.",
    ),
    "501": (
        "this store has no conditional writes (If-None-Match, If-Match), which keep two writers apart.",
        "Use a store that has them (AWS S3, MinIO, Ceph, Cloudflare R2), or a local folder.",
    ),
}
_BY_CLASS: dict[str, _Advice] = {
    "NoCredentialsError": (
        "no S3 credentials were found.",
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
    ),
    "PartialCredentialsError": (
        "the S3 credentials are incomplete.",
        "Set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    ),
    "ProfileNotFound": ("AWS_PROFILE names a profile that does not exist.", "List them: aws configure list."),
    "EndpointConnectionError": ("the store does not answer.", "Check AWS_ENDPOINT_URL and the network."),
    "ConnectTimeoutError": ("the store does not answer.", "Check AWS_ENDPOINT_URL and the network."),
    "ConnectionError": ("the store does not answer.", "Check AWS_ENDPOINT_URL and the network."),
    "HTTPClientError": ("the store does not answer.", "Check AWS_ENDPOINT_URL and the network."),
}


_FULL_OR_EXPIRED = ("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507", "ExpiredToken")
_MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


def error_code(error: BaseException) -> str:
    """The S3 error code behind `error` (`PreconditionFailed`, `NoSuchKey`, ...); "" where it has none."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def explained(error: Exception, url: str, bucket: str = "") -> StorageError:
    """`error`, met at `url`, as a StorageError that says which and what to do."""
    if isinstance(error, StorageError):
        return error
    code = error_code(error)
    found: _Advice | None = _BY_CODE.get(code)
    may_pass = found is None or code in _FULL_OR_EXPIRED
    if found is None:
        names = [cls.__name__ for cls in type(error).__mro__]
        found = next((_BY_CLASS[name] for name in names if name in _BY_CLASS), None)
    if found is None and not code and isinstance(error, OSError) and error.errno is not None:
        found = _BY_ERRNO.get(error.errno)
        may_pass = found is None or error.errno in _MAY_PASS
    if found is None:
        if code in ("NoSuchKey", "404") or isinstance(error, FileNotFoundError):
            return NotFound("there is no such file.", where=url)
        if isinstance(error, PermissionError):
            may_pass = False
            found = _BY_CODE["403"] if bucket else _BY_ERRNO[errno.EACCES]
        else:
            found = (f"the storage failed: {error}.", None)
    problem, hint = found
    said = StorageError(problem.format(bucket=bucket), where=url, hint=hint)
    said.may_pass = may_pass
    return said
