"""The one module that talks to object stores and file systems.

A URI is a local path, `file:///path` or `s3://bucket/key`. Endpoint, region and credentials of S3 come from the standard
AWS_* variables and profiles. Reads and writes go through fsspec (s3fs for S3), because its reader survives cut and
stalled bodies; Ray Train is handed a pyarrow file system, Delta Lake an options dictionary, all made here.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.errors import InputRefused, Retryable, UsageError

# s3fs' default block of 50 MiB moves 100 MB for one clip of a long file; 1 MiB moves 2-4 MB in 4-7 requests.
READ_BLOCK_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
MAX_ATTEMPTS = 6


# The AWS libraries' newer default, checksums in trailers, is refused by older S3-compatible stores (Ceph 16: HTTP 411). Read by
# boto3, s3fs and Arrow alike; set here so that every process that touches storage has it.
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its URI, size in bytes, and a tag that changes when its bytes do."""

    uri: str
    size: int
    etag: str


def is_s3(uri: str) -> bool:
    """True when the URI names an object in an S3-compatible store."""
    return uri.startswith("s3://")


def normalize(uri: str) -> str:
    """Local paths become absolute without `file://`; s3 URIs lose a trailing slash. Raises UsageError for other schemes."""
    if is_s3(uri):
        if not uri[len("s3://") :].strip("/"):
            raise UsageError(f"{uri!r} names no bucket: write s3://bucket/prefix")
        return uri.rstrip("/")
    if uri.startswith("file://"):
        uri = uri[len("file://") :]
    if "://" in uri:
        raise UsageError(f"{uri!r}: only local paths, file:// and s3:// are supported")
    if not uri:
        raise UsageError("an empty string is not a URI: give a local path, file:// or s3://bucket/prefix")
    return os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    """`join("s3://b/x", "y", "z")` -> `s3://b/x/y/z`."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[ObjectInfo]:
    """Every file below `uri`, recursively, in order of URI; `suffixes` (lower case, with dot) keeps some.

    Raises InputRefused when the folder or bucket does not exist.
    """
    uri = normalize(uri)
    filesystem, path = _open_filesystem(uri)
    with _explained(uri):
        if not is_s3(uri) and not os.path.exists(path):
            raise InputRefused(f"{uri} does not exist: check the path")
        found = filesystem.find(path, detail=True)
    infos = [_object_info(key, entry, uri) for key, entry in found.items()]
    kept = [info for info in infos if not suffixes or info.uri.lower().endswith(tuple(suffixes))]
    return sorted(kept, key=lambda info: info.uri)


def open_file(uri: str) -> IO[bytes]:
    """A seekable binary reader; on S3 it fetches 1 MiB ranges ahead, never the whole object."""
    uri = normalize(uri)
    filesystem, path = _open_filesystem(uri)
    with _explained(uri):
        if is_s3(uri):
            return filesystem.open(path, "rb", block_size=READ_BLOCK_BYTES, cache_type="readahead")
        return open(path, "rb")


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises InputRefused when it does not exist."""
    uri = normalize(uri)
    filesystem, path = _open_filesystem(uri)
    with _explained(uri):
        return filesystem.cat_file(path)


def write_bytes(uri: str, data: bytes) -> None:
    """Write or replace one object; readers see the old bytes or the new ones, never a part."""
    uri = normalize(uri)
    filesystem, path = _open_filesystem(uri)
    with _explained(uri):
        if is_s3(uri):
            filesystem.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        partial = f"{path}.{os.getpid()}.part"
        Path(partial).write_bytes(data)
        os.replace(partial, path)


def upload(local_path: str | os.PathLike[str], uri: str) -> None:
    """Copy a local file to `uri`."""
    write_bytes(uri, Path(local_path).read_bytes())


def exists(uri: str) -> bool:
    """Whether an object or folder stands at `uri`."""
    uri = normalize(uri)
    filesystem, path = _open_filesystem(uri)
    with _explained(uri):
        return filesystem.exists(path)


def check_bucket(uri: str) -> None:
    """Fail in seconds, with one sentence, when the bucket of an s3 URI cannot be reached; local paths always pass."""
    uri = normalize(uri)
    if not is_s3(uri):
        return
    filesystem, path = _open_filesystem(uri)
    with _explained(uri):
        filesystem.call_s3("head_bucket", Bucket=path.split("/", 1)[0])


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """(pyarrow file system, path without scheme): the pair that Ray Train's RunConfig takes as storage."""
    import pyarrow.fs

    uri = normalize(uri)
    if not is_s3(uri):
        os.makedirs(uri, exist_ok=True)
        return pyarrow.fs.LocalFileSystem(), uri
    # Credentials stay out of the pickled object: every process resolves them by the standard AWS chain.
    return pyarrow.fs.S3FileSystem(
        endpoint_override=_endpoint(),
        region=_region(),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    ), uri[len("s3://") :]


def delta_options(uri: str) -> dict[str, str]:
    """Storage options for the deltalake package: commits are conditional puts, so writers never overwrite each other."""
    if not is_s3(uri):
        return {}
    import boto3

    options = {"aws_region": _region(), "aws_conditional_put": "etag", "timeout": f"{READ_TIMEOUT_S}s"}
    credentials = boto3.Session().get_credentials()
    if credentials:
        frozen = credentials.get_frozen_credentials()
        options |= {"aws_access_key_id": frozen.access_key, "aws_secret_access_key": frozen.secret_key}
        options |= {"aws_session_token": frozen.token} if frozen.token else {}
    endpoint = _endpoint()
    if endpoint:
        options |= {"aws_endpoint_url": endpoint, "aws_allow_http": str(endpoint.startswith("http://")).lower()}
    return options


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _open_filesystem(uri: str) -> tuple[Any, str]:
    if not is_s3(uri):
        from fsspec.implementations.local import LocalFileSystem

        return LocalFileSystem(auto_mkdir=True), uri
    import s3fs

    return (
        s3fs.S3FileSystem(
            endpoint_url=_endpoint(),
            client_kwargs={"region_name": _region()},
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "retries": {"mode": "standard", "max_attempts": MAX_ATTEMPTS},
            },
            use_listings_cache=False,  # another process may have written since
        ),
        uri[len("s3://") :],
    )


def _object_info(key: str, entry: dict[str, Any], root: str) -> ObjectInfo:
    if is_s3(root):
        return ObjectInfo(f"s3://{key}", int(entry["size"]), str(entry.get("ETag", "")).strip('"'))
    return ObjectInfo(key, int(entry["size"]), f"{os.stat(key).st_mtime_ns:x}-{int(entry['size']):x}")


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn the many errors of the storage libraries into ours: one sentence, retryable or not."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except FileNotFoundError as error:
        raise InputRefused(f"{uri} does not exist: check the path") from error
    except PermissionError as error:
        raise UsageError(f"{uri}: access denied ({error}): check the credentials and the bucket policy") from error
    except NoCredentialsError as error:
        raise UsageError(f"{uri}: no S3 credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (BotoCoreError, ClientError, TimeoutError, ConnectionError) as error:
        endpoint = _endpoint() or "the default AWS endpoint"
        raise Retryable(f"{uri}: the object store at {endpoint} did not answer ({error}): try again") from error
