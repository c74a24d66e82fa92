"""Requests to S3-compatible stores, for pipelines/storage.py alone: one retry loop, one deadline, verified bytes.

Every logical operation (a range, an object, a page of a listing) has DEADLINE_S seconds plus the time that its bytes take at
SLOWEST_BYTES_PER_S. Until then transient failures are tried again; the AWS library's own retries are off, so loops do not nest.
"""

import base64
import contextlib
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from pipelines.errors import InputRefused, JepaError, Retryable, UsageError

# The AWS libraries' newer default, checksums in trailers, is refused by older S3-compatible stores (Ceph 16: HTTP 411). Read by
# boto3 and Arrow alike; set here so that every process that touches storage has it.
os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")

DEADLINE_S = float(os.environ.get("JEPA_STORAGE_DEADLINE_S", "120"))
SLOWEST_BYTES_PER_S = 1 << 20
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = float(os.environ.get("JEPA_STORAGE_TIMEOUT_S", "20"))
"""Seconds without a byte after which a request has stalled. One may be under way when the deadline passes."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 8.0
CHUNK_BYTES = 1 << 16
PART_BYTES = 16 << 20
UPLOAD_THREADS = 4
THREADS = 8
LISTING_RANGES = 64
LISTING_DEPTH = 4

_TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "BadDigest", "IncompleteBody", "InternalError", "ServiceUnavailable"}
_DENIED_CODES = {"ExpiredToken", "TokenRefreshRequired", "InvalidToken"}
_MD5_TAG = re.compile(r"[0-9a-f]{32}")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")

T = TypeVar("T")


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its URI, size in bytes, a tag that changes when its bytes do, and when it was written (Unix time)."""

    uri: str
    size: int
    etag: str
    modified: float = field(default=0.0, compare=False)


class ObjectChanged(InputRefused):
    """The object no longer has the tag that was asked for: other bytes took its place."""


class _Unreliable(ConnectionError):
    """An answer that cannot be used; asking again may help."""


class _Counters:
    """Process-wide counts, for benchmarks."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.values = {"requests": 0, "bytes_read": 0, "retries": 0}

    def add(self, name: str, amount: int = 1) -> None:
        with self.lock:
            self.values[name] += amount


COUNTERS = _Counters()
_clients: dict[tuple[Any, ...], Any] = {}
_clients_lock = threading.Lock()


def _forget() -> None:
    """In a forked child: connections and locks belong to the parent."""
    global _clients_lock
    _clients.clear()
    _clients_lock = threading.Lock()
    COUNTERS.lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)


def endpoint() -> str | None:
    """The configured endpoint, None for AWS itself."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def region() -> str:
    """The configured region."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def client() -> Any:
    """The boto3 client of this process for the present configuration; safe to share between threads."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
    key = (endpoint(), region(), READ_TIMEOUT_S, *map(os.environ.get, names))
    with _clients_lock:
        if key not in _clients:
            _clients[key] = _new_client()
        return _clients[key]


def _new_client() -> Any:
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.utils import parse_timestamp

    def timestamp(text: Any) -> datetime:
        try:
            # A listing holds a thousand of them; botocore's parser takes longer than the network.
            return datetime.fromisoformat(text)
        except (TypeError, ValueError):
            return parse_timestamp(text)

    session = botocore.session.Session()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=timestamp)
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=4 * THREADS,
    )
    made = boto3.Session(botocore_session=session).client("s3", endpoint_url=endpoint(), region_name=region(), config=config)
    made.meta.events.register("before-send.s3", lambda **_: COUNTERS.add("requests"))
    return made


class Operation:
    """One logical operation: its requests share a deadline, and this is the only loop that tries again."""

    def __init__(self, uri: str, deadline_s: float | None = None) -> None:
        self.uri = uri
        self.bucket, _, self.key = uri[len("s3://") :].partition("/")
        self.prefix = f"{self.key}/" if self.key else ""
        self.client = client()
        self._deadline_s = DEADLINE_S if deadline_s is None else deadline_s
        self._began = time.monotonic()
        self.allow(0)

    def allow(self, size: int) -> None:
        """Give the operation the time that `size` bytes take, on top of the deadline."""
        self.end = self._began + self._deadline_s + size / SLOWEST_BYTES_PER_S

    def check(self) -> None:
        """Raise TimeoutError after the deadline."""
        if time.monotonic() > self.end:
            raise TimeoutError("the deadline passed")

    def request(self, attempt: Callable[[], T]) -> T:
        """`attempt()`, again after transient failures. Raises InputRefused, UsageError, or Retryable at the deadline."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError  # botocore lets it through when the text of an error answer is cut

        def explained() -> T:
            try:
                return attempt()
            except (BotoCoreError, ClientError, ResponseParserError, HTTPError, OSError) as error:
                raise _explain(self.uri, error) from error

        return _again(explained, lambda: self.end)


def retrying(attempt: Callable[[], T]) -> T:
    """`attempt()`, again while it raises Retryable, until the deadline: for libraries with a client of their own (Delta Lake).

    What it does must be harmless when it is done twice: an answer may have been lost after the work was done.
    """
    end = time.monotonic() + DEADLINE_S
    return _again(attempt, lambda: end)


def _again(attempt: Callable[[], T], end: Callable[[], float]) -> T:
    """The retry loop. The waits grow, and are random so that many clients do not come back at the same moment."""
    wait_s = FIRST_WAIT_S
    while True:
        try:
            return attempt()
        except Retryable:
            pause = random.uniform(0.5, 1.5) * wait_s  # noqa: S311
            if time.monotonic() + pause > end():
                raise
        COUNTERS.add("retries")
        time.sleep(pause)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _explain(uri: str, error: Exception) -> JepaError:
    """What the error means for a user: one sentence, retryable or not."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == 404:
            return InputRefused(f"{uri} does not exist ({code}): check the path")
        if status == 412:
            return ObjectChanged(f"{uri} was replaced by other bytes since it was listed: list it again")
        if status == 416:
            return InputRefused(f"{uri} ends before the bytes that were asked for: it is shorter than expected")
        if status in {401, 403} or code in _DENIED_CODES:
            return UsageError(f"{uri}: access denied ({error}): check the credentials and the bucket policy")
        if status not in _TRANSIENT_STATUS and code not in _TRANSIENT_CODES and 400 <= status < 500:
            return UsageError(f"{uri}: the object store refused the request ({error}): check the URI and the endpoint")
    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return UsageError(f"{uri}: no S3 credentials found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, exceptions.ParamValidationError | exceptions.ProfileNotFound):
        return UsageError(f"{uri}: {error}: check the URI and the AWS profile")
    where = endpoint() or "the default AWS endpoint"
    return Retryable(f"{uri}: the object store at {where} did not answer ({error}): try again")


def get(uri: str, start: int = 0, stop: int | None = None, etag: str | None = None, *, verify: bool = True) -> bytes:
    """The bytes [start, stop) of an object, to its end when `stop` is None; verified.

    TLS authenticates what arrives. Over plain http the bytes must match the object's MD5 tag, when they are the whole object,
    or the read before of the same range. Without `verify` that is left out: for bytes that carry a checksum of their own, and for
    those of which a flipped bit costs less than reading all of them twice. Their number and the tag are checked in any case.
    Raises ObjectChanged, InputRefused, UsageError, Retryable.
    """
    operation = Operation(uri)
    authentic = not verify or operation.client.meta.endpoint_url.startswith("https://")
    reading = _Reading(operation, start, stop, etag)
    previous = b""

    def attempt() -> bytes:
        nonlocal previous
        while True:
            reading.proceed()
            data = b"".join(reading.chunks)
            if authentic or not data:
                return data
            digest = hashlib.md5(data, usedforsecurity=False)
            if len(data) == reading.total and _MD5_TAG.fullmatch(reading.tag) and digest.hexdigest() == reading.tag:
                return data
            if digest.digest() == previous:
                return data
            previous = digest.digest()
            reading.restart()
            operation.check()

    return operation.request(attempt)


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A thread pool that drops what has not started when an error, or a caller who stops early, leaves it."""
    pool = ThreadPoolExecutor(count, thread_name_prefix="storage")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Reading:
    """A range that is being read: what has arrived is kept when a body is cut."""

    def __init__(self, operation: Operation, start: int, stop: int | None, etag: str | None) -> None:
        self.operation, self.start, self.stop, self.etag = operation, start, stop, etag
        self.total, self.wanted = 0, -1
        self.restart()

    def restart(self) -> None:
        """Forget what has arrived."""
        self.chunks: list[bytes] = []
        self.have = 0
        self.tag = self.etag or ""

    def proceed(self) -> None:
        """One request for the rest of the range. Raises the library's errors, and OSError for a body that is not right."""
        from botocore.exceptions import ClientError

        if self.have == self.wanted:
            return
        operation, first = self.operation, self.start + self.have
        arguments = {"IfMatch": f'"{self.tag}"'} if self.tag else {}
        if first or self.stop is not None:
            arguments["Range"] = f"bytes={first}-{'' if self.stop is None else self.stop - 1}"
        try:
            response = operation.client.get_object(Bucket=operation.bucket, Key=operation.key, **arguments)
        except ClientError as error:
            if self.etag or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 412:
                raise
            self.restart()
            raise _Unreliable("the object was replaced while it was read") from error
        with contextlib.closing(response["Body"]) as body:
            self._accept(response, "Range" in arguments, first)
            while chunk := body.read(CHUNK_BYTES):
                self.chunks.append(chunk)
                self.have += len(chunk)
                COUNTERS.add("bytes_read", len(chunk))
                operation.check()
        if self.have != self.wanted:
            if self.have > self.wanted:
                self.restart()
            raise _Unreliable(f"{self.have} of {self.wanted} bytes arrived")

    def _accept(self, response: dict[str, Any], ranged: bool, first: int) -> None:
        """Take the object's size and tag from a response; raise when it is not the object or range that was asked for."""
        tag = response.get("ETag", "").strip('"')
        if self.etag and tag and tag != self.etag:  # a store that does not know If-Match
            raise ObjectChanged(f"{self.operation.uri} was replaced by other bytes since it was listed: list it again")
        if ranged:
            match = _CONTENT_RANGE.fullmatch(response.get("ContentRange", ""))
            if not match or int(match[1]) != first:
                raise _Unreliable(f"the answer is not the range from byte {first}")
            self.total = int(match[2])
        else:
            self.total = response["ContentLength"]
        if self.stop is not None and self.stop > self.total:
            raise InputRefused(f"{self.operation.uri} has {self.total} bytes, not {self.stop}: it is shorter than expected")
        self.tag = tag
        self.wanted = (self.total if self.stop is None else self.stop) - self.start
        self.operation.allow(self.wanted)


def head(uri: str) -> ObjectInfo | None:
    """Size and tag of an object, None where it does not exist. Raises UsageError, Retryable."""
    operation = Operation(uri)
    try:
        found = operation.request(lambda: operation.client.head_object(Bucket=operation.bucket, Key=operation.key))
    except InputRefused:
        return None
    return ObjectInfo(uri, found["ContentLength"], found.get("ETag", "").strip('"'), found["LastModified"].timestamp())


def listing_bounds(uri: str) -> list[str]:
    """Up to LISTING_RANGES keys, ascending, that cut a large listing where its folders begin."""

    def folders(prefix: str) -> list[str]:
        operation = Operation(uri)
        listing = {"Bucket": operation.bucket, "Prefix": prefix, "Delimiter": "/"}
        found = operation.request(lambda: operation.client.list_objects_v2(**listing))
        return [entry["Prefix"] for entry in found.get("CommonPrefixes", ())]

    level, found = [Operation(uri).prefix], []
    with threads(THREADS) as pool:
        for _ in range(LISTING_DEPTH):
            level = [name for names in pool.map(folders, level) for name in names]
            found += level
            if not level or len(found) >= 2 * THREADS:
                break
    found.sort()
    return found[:: -(-len(found) // LISTING_RANGES) or 1]


def put(uri: str, size: int, read: Callable[[int, int], bytes]) -> None:
    """Write or replace an object of `size` bytes; `read(start, stop)` gives them. The store checks the MD5 of every part."""
    operation = Operation(uri)
    operation.allow(size)
    s3, target = operation.client, {"Bucket": operation.bucket, "Key": operation.key}
    if size <= PART_BYTES:
        data = read(0, size)
        operation.request(lambda: s3.put_object(**target, Body=data, ContentMD5=_md5(data)))
        return
    target["UploadId"] = operation.request(lambda: s3.create_multipart_upload(**target))["UploadId"]

    def part(number: int) -> dict[str, Any]:
        data = read((number - 1) * PART_BYTES, min(number * PART_BYTES, size))
        arguments = {**target, "PartNumber": number, "Body": data, "ContentMD5": _md5(data)}
        return {"PartNumber": number, "ETag": operation.request(lambda: s3.upload_part(**arguments))["ETag"]}

    try:
        with threads(UPLOAD_THREADS) as pool:
            parts = list(pool.map(part, range(1, -(-size // PART_BYTES) + 1)))
        _complete(operation, target, parts, size)
    except BaseException:
        with contextlib.suppress(Exception):  # what follows is the error that counts; buckets expire unfinished uploads
            s3.abort_multipart_upload(**target)
        raise


def _complete(operation: Operation, target: dict[str, Any], parts: list[dict[str, Any]], size: int) -> None:
    try:
        operation.request(lambda: operation.client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}))
    except InputRefused:
        # The upload is gone: an earlier attempt may have completed it although its answer was lost.
        found = head(operation.uri)
        if found is None or found.size != size or not found.etag.endswith(f"-{len(parts)}"):
            raise


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def remove(uris: Iterable[str]) -> None:
    """Delete objects; those that do not exist are no error."""

    def one(uri: str) -> None:
        operation = Operation(uri)
        operation.request(lambda: operation.client.delete_object(Bucket=operation.bucket, Key=operation.key))

    with threads(THREADS) as pool:
        list(pool.map(one, uris))
