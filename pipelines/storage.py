"""The one module that talks to object stores and file systems, with storage_s3 for the requests to S3.

A URI is a local path, `file:///path` or `s3://bucket/key`. Endpoint, region and credentials of S3 come from the standard
AWS_* variables and profiles. Transient failures are tried again until a deadline, and then raised as Retryable; bytes are
verified (see storage_s3). Ray Train is handed a pyarrow file system, Delta Lake an options dictionary, all made here.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import IO, Any

from pipelines import storage_s3
from pipelines.block_reader import BlockReader
from pipelines.errors import InputRefused, Retryable, UsageError
from pipelines.storage_s3 import COUNTERS, ObjectChanged, ObjectInfo, Operation
from pipelines.storage_s3 import retrying as retrying

LOCAL_PAGE = 10_000
CHECK_DEADLINE_S = 15.0
PARTIAL = ".part"
"""Suffix of local files that are being written; never listed."""


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


def counters() -> dict[str, int]:
    """What this process did since `reset_counters`: requests (S3) or range reads (local), bytes_read, retries."""
    return dict(COUNTERS.values)


def reset_counters() -> None:
    """Set all counters to 0."""
    COUNTERS.reset()


def age_hours(info: ObjectInfo) -> float:
    """Hours since the object was written, by this machine's clock."""
    return (time.time() - info.modified) / 3600


def list_files(uri: str, suffixes: Sequence[str] = (), *, missing_ok: bool = False) -> list[ObjectInfo]:
    """Every file below `uri`, recursively, in order of URI; `suffixes` (lower case, with dot) keeps some.

    Raises InputRefused when the folder or bucket does not exist, unless `missing_ok`.
    """
    try:
        return sorted((info for page in list_pages(uri, suffixes) for info in page), key=lambda info: info.uri)
    except InputRefused:
        if missing_ok:
            return []
        raise


def list_pages(uri: str, suffixes: Sequence[str] = ()) -> Iterator[list[ObjectInfo]]:
    """The files of `list_files` in pages, as they arrive and in no promised order; `uri` may also name one file.

    Raises InputRefused, UsageError, Retryable, at the first page or a later one.
    """
    uri = normalize(uri)
    endings = tuple(suffixes) or ("",)
    for page in _s3_pages(uri) if is_s3(uri) else _local_pages(uri):
        kept = [info for info in page if info.uri.lower().endswith(endings)]
        _check_names(kept)
        if kept:
            yield kept


def stat_many(uris: Iterable[str]) -> dict[str, ObjectInfo | None]:
    """{uri as given: its object, None where none is}, asked in parallel. Raises UsageError, Retryable."""
    names = list(dict.fromkeys(uris))
    with storage_s3.threads(2 * storage_s3.THREADS) as pool:
        return dict(zip(names, pool.map(_stat, names), strict=True))


def read_range(uri: str, start: int, stop: int, etag: str | None = None, *, verify: bool = True) -> bytes:
    """Exactly the bytes [start, stop) of an object, verified (see storage_s3.get) unless the caller does that itself.

    Raises ObjectChanged when `etag` is given and is not the object's, InputRefused when it does not exist or is shorter,
    Retryable when the store does not answer by the deadline.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"no range: [{start}, {stop})")
    uri = normalize(uri)
    if start == stop:
        return b""
    if is_s3(uri):
        return storage_s3.get(uri, start, stop, etag, verify=verify)
    with _explained(uri), open(uri, "rb", buffering=0) as file:
        _same(uri, file.fileno(), etag)
        COUNTERS.add("requests")
        parts, position = [], start
        while position < stop:
            part = os.pread(file.fileno(), stop - position, position)
            if not part:
                raise InputRefused(f"{uri} has {position} bytes or fewer, not {stop}: it is shorter than expected")
            parts.append(part)
            position += len(part)
            COUNTERS.add("bytes_read", len(part))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def open_file(uri: str, *, offset: int = 0, size: int | None = None, etag: str | None = None) -> IO[bytes]:
    """A seekable binary reader of an object, or of its bytes [offset, offset + size); never fetches all of a large one.

    It reads the bytes that had the tag `etag`, or the tag of the moment when it is opened: a later change raises ObjectChanged
    on S3. `size` and `etag` together save a request. Raises InputRefused, UsageError, Retryable; so do its reads.
    """
    uri = normalize(uri)
    if not is_s3(uri):
        with _explained(uri), contextlib.ExitStack() as stack:
            file = stack.enter_context(open(uri, "rb"))
            info = _same(uri, file.fileno(), etag)
            if offset == 0 and (size is None or size >= info.size):
                stack.pop_all()
                return file
    elif size is None or etag is None:
        info = _stat(uri)
        if info is None:
            raise InputRefused(f"{uri} does not exist: check the path")
        if etag is not None and etag != info.etag:
            raise ObjectChanged(f"{uri} was replaced by other bytes since it was listed: list it again")
    else:
        info = ObjectInfo(uri, offset + size, etag)
    length = max(0, info.size - offset) if size is None else max(0, min(size, info.size - offset))
    return BlockReader(lambda start, stop: read_range(uri, offset + start, offset + stop, info.etag or None), length)


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises InputRefused when it does not exist."""
    uri = normalize(uri)
    if is_s3(uri):
        return storage_s3.get(uri)
    with _explained(uri), open(uri, "rb") as file:
        return file.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write or replace one object; readers see the old bytes or the new ones, never a part."""
    uri = normalize(uri)
    if is_s3(uri):
        storage_s3.put(uri, len(data), lambda start, stop: data if stop - start == len(data) else data[start:stop])
        return
    with _partial(uri) as file:
        file.write(data)


def upload(local_path: str | os.PathLike[str], uri: str) -> None:
    """Copy a local file to `uri`, as `write_bytes` does but without holding it in memory."""
    uri = normalize(uri)
    with _explained(os.fspath(local_path)), open(local_path, "rb") as source:
        if is_s3(uri):
            descriptor = source.fileno()
            size = os.fstat(descriptor).st_size
            storage_s3.put(uri, size, lambda start, stop: os.pread(descriptor, stop - start, start))
            return
        with _partial(uri) as file:
            shutil.copyfileobj(source, file, storage_s3.PART_BYTES)


def delete(uris: Iterable[str]) -> None:
    """Delete objects or local files; those that do not exist are no error."""
    names = [normalize(uri) for uri in uris]
    storage_s3.remove(uri for uri in names if is_s3(uri))
    for path in names:
        if not is_s3(path):
            with _explained(path), contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def exists(uri: str) -> bool:
    """Whether an object or folder stands at `uri`."""
    uri = normalize(uri)
    if not is_s3(uri):
        with _explained(uri):
            return os.path.exists(uri)
    operation = Operation(uri)
    if operation.key and _stat(uri):
        return True
    listing = {"Bucket": operation.bucket, "Prefix": operation.prefix, "MaxKeys": 1}
    try:
        found = operation.request(lambda: operation.client.list_objects_v2(**listing))
    except InputRefused:
        return False
    return bool(found.get("Contents")) or not operation.key


def check_bucket(uri: str) -> None:
    """Fail in seconds, with one sentence, when the bucket of an s3 URI cannot be reached; local paths always pass."""
    uri = normalize(uri)
    if is_s3(uri):
        operation = Operation(uri, min(CHECK_DEADLINE_S, storage_s3.DEADLINE_S))
        operation.request(lambda: operation.client.head_bucket(Bucket=operation.bucket))


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """(pyarrow file system, path without scheme): the pair that Ray Train's RunConfig takes as storage."""
    import pyarrow.fs

    uri = normalize(uri)
    if not is_s3(uri):
        os.makedirs(uri, exist_ok=True)
        return pyarrow.fs.LocalFileSystem(), uri
    # Credentials stay out of the pickled object: every process resolves them by the standard AWS chain.
    return (
        pyarrow.fs.S3FileSystem(
            endpoint_override=storage_s3.endpoint(),
            region=storage_s3.region(),
            connect_timeout=storage_s3.CONNECT_TIMEOUT_S,
            request_timeout=storage_s3.READ_TIMEOUT_S,
            retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=10),  # Arrow knows no deadline
        ),
        uri[len("s3://") :],
    )


def delta_options(uri: str) -> dict[str, str]:
    """Storage options for the deltalake package: commits are conditional puts, so writers never overwrite each other."""
    if not is_s3(uri):
        return {}
    import boto3

    options = {
        "aws_region": storage_s3.region(),
        "aws_conditional_put": "etag",
        "timeout": f"{storage_s3.READ_TIMEOUT_S * 1000:.0f}ms",
        "connect_timeout": f"{storage_s3.CONNECT_TIMEOUT_S * 1000:.0f}ms",
        "max_retries": "100",  # the time limit decides
        "retry_timeout": f"{storage_s3.DEADLINE_S * 1000:.0f}ms",
    }
    credentials = boto3.Session().get_credentials()
    if credentials:
        frozen = credentials.get_frozen_credentials()
        options |= {"aws_access_key_id": frozen.access_key, "aws_secret_access_key": frozen.secret_key}
        options |= {"aws_session_token": frozen.token} if frozen.token else {}
    endpoint = storage_s3.endpoint()
    if endpoint:
        options |= {"aws_endpoint_url": endpoint, "aws_allow_http": str(endpoint.startswith("http://")).lower()}
    return options


def _local_info(path: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}", found.st_mtime)


def _check_names(infos: list[ObjectInfo]) -> None:
    for info in infos:
        try:
            info.uri.encode()
        except UnicodeEncodeError as error:
            raise InputRefused(f"{info.uri!r}: its name is not UTF-8, so it has no URI: rename it") from error


def _same(path: str, descriptor: int, etag: str | None) -> ObjectInfo:
    info = _local_info(path, os.fstat(descriptor))
    if etag is not None and etag != info.etag:
        raise ObjectChanged(f"{path} was replaced by other bytes since it was listed: list it again")
    return info


def _stat(uri: str) -> ObjectInfo | None:
    uri = normalize(uri)
    if is_s3(uri):
        return storage_s3.head(uri)
    try:
        with _explained(uri):
            return _local_info(uri, os.stat(uri))
    except InputRefused:
        return None


@contextlib.contextmanager
def _partial(path: str) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when it is whole, and leaves nothing when it never is."""
    partial = f"{path}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}"
    with _explained(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(partial, "wb") as file:
                yield file
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise


def _local_pages(root: str) -> Iterator[list[ObjectInfo]]:
    with _explained(root):
        found = os.stat(root)
    if not stat.S_ISDIR(found.st_mode):
        yield [_local_info(root, found)]
        return
    page: list[ObjectInfo] = []
    todo: list[tuple[str, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while todo:
        folder, above = todo.pop()
        with _explained(folder):
            found = os.stat(folder)
            if (found.st_dev, found.st_ino) in above:  # a link to a folder that it lies in
                continue
            above = above | {(found.st_dev, found.st_ino)}
            for entry in os.scandir(folder):
                if entry.is_dir():
                    todo.append((entry.path, above))
                elif entry.is_file() and not entry.name.endswith(PARTIAL):
                    with contextlib.suppress(FileNotFoundError):  # deleted since the folder was read
                        page.append(_local_info(entry.path, entry.stat()))
        if len(page) >= LOCAL_PAGE:
            yield page
            page = []
    if page:
        yield page


def _s3_pages(uri: str) -> Iterator[list[ObjectInfo]]:
    """A listing of more than one page goes on in parallel over ranges of keys."""
    first, more = _s3_page(uri, "", None, "")
    if first:
        yield first
    if not more:
        alone = None if first or not Operation(uri).key else storage_s3.head(uri)
        if alone:
            yield [alone]
        return
    bounds = [bound for bound in storage_s3.listing_bounds(uri) if bound > more[0]]
    ranges: list[tuple[str, str | None, str]] = [(a, b, "") for a, b in zip([more[0], *bounds], [*bounds, None], strict=True)]
    running: dict[Future[Any], str | None] = {}
    with storage_s3.threads(storage_s3.THREADS) as pool:
        while running or ranges:
            while ranges and len(running) < storage_s3.THREADS:
                after, until, token = ranges.pop(0)
                running[pool.submit(_s3_page, uri, after, until, token)] = until
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                until = running.pop(future)
                page, more = future.result()
                if more:
                    ranges.insert(0, (more[0], until, more[1]))
                if page:
                    yield page


def _s3_page(uri: str, after: str, until: str | None, token: str) -> tuple[list[ObjectInfo], tuple[str, str] | None]:
    """One page of the keys in (after, until] below `uri`, and what continues it: (last key, token), None at the end."""
    operation = Operation(uri)
    arguments = {"ContinuationToken": token} if token else {"StartAfter": after} if after else {}
    arguments |= {"Bucket": operation.bucket, "Prefix": operation.prefix}
    found = operation.request(lambda: operation.client.list_objects_v2(**arguments))
    page, key = [], after
    for entry in found.get("Contents", ()):
        key = entry["Key"]
        if until is not None and key > until:
            return page, None
        if not key.endswith("/"):  # what consoles write to show an empty folder
            stamp = entry["LastModified"].timestamp()
            page.append(ObjectInfo(f"s3://{operation.bucket}/{key}", entry["Size"], entry.get("ETag", "").strip('"'), stamp))
    return page, (key, found["NextContinuationToken"]) if found.get("IsTruncated") else None


@contextlib.contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn the errors of a local file system into ours: one sentence, retryable or not."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputRefused(f"{uri} does not exist: check the path") from error
    except IsADirectoryError as error:
        raise InputRefused(f"{uri} is a folder, not a file: check the path") from error
    except PermissionError as error:
        raise UsageError(f"{uri}: access denied ({error}): check the owner and the permissions") from error
    except OSError as error:
        if error.errno in {errno.ENAMETOOLONG, errno.ELOOP}:
            raise InputRefused(f"{uri} cannot be opened ({error.strerror}): check the path") from error
        raise Retryable(f"{uri}: the file system failed ({error}): try again") from error
