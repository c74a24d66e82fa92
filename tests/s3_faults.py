"""An S3 server in memory that fails on purpose: 503, 500, reset, stall, truncated body, flipped byte.

Speaks what boto3, pyarrow and deltalake ask for: GET (Range, If-Match), HEAD, PUT (Content-MD5, If-None-Match, If-Match), DELETE,
DeleteObjects, CopyObject, ListObjectsV2, multipart uploads. Signatures are not checked; buckets exist once they are named in
`buckets` or created. Which requests fail depends on the seed, the request and how often it was made, not on the order of threads.

    with FaultyS3(seed=1, rate=0.2) as server:        # in this process: objects, counts and settings are attributes
        server.objects["bucket", "key"] = b"..."      # or server.load("bucket", folder)
        subprocess.run(command, env={**os.environ, **server.env()})

    with SeparateS3("bucket", folder) as server:      # in a process of its own, for deltalake: some of its calls keep the
        server.set(rate=0.2, flips=r"[.]mp4$")        # interpreter's lock while they wait for the server
        server.counts()
"""

import argparse
import base64
import bisect
import contextlib
import hashlib
import http.server
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

KINDS = ("503", "500", "reset", "stall", "truncate", "flip")
PAGE = 1000
CONTROL = "-"
"""Name of a bucket that is none: PUT sets attributes of the server and clears its counts, GET gives the counts."""


@dataclass(frozen=True)
class Stored:
    data: bytes
    etag: str
    modified: float


@dataclass
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Objects(MutableMapping[tuple[str, str], bytes]):
    """{(bucket, key): bytes}; replacing an object gives it a new tag, as S3 does."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.stored: dict[tuple[str, str], Stored] = {}
        self._sorted: list[tuple[str, str]] | None = None

    def __getitem__(self, name):
        return self.stored[name].data

    def __setitem__(self, name, data):
        self.put(name, bytes(data), hashlib.md5(data).hexdigest())

    def __delitem__(self, name):
        with self.lock:
            del self.stored[name]
            self._sorted = None

    def __iter__(self):
        return iter(self.names())

    def __len__(self):
        return len(self.stored)

    def put(self, name, data, etag):
        with self.lock:
            if name not in self.stored:
                self._sorted = None
            self.stored[name] = Stored(data, etag, time.time())

    def names(self):
        with self.lock:
            if self._sorted is None:
                self._sorted = sorted(self.stored)  # code points sort as UTF-8 does
            return self._sorted


class FaultyS3:
    """The server, as a context manager. Counters are keyed by (method, key) and by kind of fault."""

    def __init__(self, *, seed: int = 0, rate: float = 0.0, kinds: tuple[str, ...] = KINDS, stall_s: float = 3.0,
                 flips: str = "", flips_first: str = "", applies: str = "", md5_tags: bool = True,
                 port: int = 0) -> None:  # fmt: skip
        """`flips`: a pattern of the keys whose GET bodies may have a byte flipped, `flips_first`: of those whose first one surely
        has; `applies`: a pattern of "METHOD key" of the requests that may fail at all; `stall_s` must exceed the client's read
        timeout; `md5_tags`: False as under SSE-KMS."""
        self.seed, self.rate, self.kinds, self.stall_s = seed, rate, kinds, stall_s
        self.flips, self.flips_first, self.applies, self.md5_tags = flips, flips_first, applies, md5_tags
        self.objects, self.buckets = Objects(), {"bucket"}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.bytes_sent: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self._attempts: Counter[str] = Counter()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", port), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultyS3":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def env(self) -> dict[str, str]:
        """Environment of a client."""
        return environment(self.endpoint)

    def load(self, bucket: str, folder: Path, prefix: str = "") -> None:
        """Copy a folder into a bucket."""
        self.buckets.add(bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.objects[bucket, prefix + str(path.relative_to(folder))] = path.read_bytes()

    def reset_counts(self) -> None:
        self.requests.clear()
        self.bytes_sent.clear()
        self.faults.clear()
        self._attempts.clear()

    def total_requests(self, method: str = "") -> int:
        return sum(count for (name, _), count in self.requests.items() if not method or name == method)

    def pick_fault(self, method: str, key: str, target: str) -> tuple[str, int]:
        """(kind or "", a number for its details)."""
        with self.lock:
            self.requests[method, key] += 1
            self._attempts[target] += 1
            attempt = self._attempts[target]
        number = int.from_bytes(hashlib.sha256(f"{self.seed} {target} {attempt}".encode()).digest()[:16], "big")
        if method == "GET" and attempt == 1 and self.flips_first and re.search(self.flips_first, key):
            return "flip", number // 10**9
        if not re.search(self.applies, f"{method} {key}") or number % 10**6 >= self.rate * 10**6:
            return "", 0
        kind = self.kinds[number // 10**6 % len(self.kinds)]
        return kind, number // 10**9


class SeparateS3:
    """The same server in a process of its own; `folder` is copied into the bucket."""

    def __init__(self, bucket: str = "bucket", folder: Path | None = None) -> None:
        self.command = [sys.executable, __file__, "--port", "0", "--bucket", bucket]
        self.command += ["--folder", str(folder)] if folder else []

    @classmethod
    def at(cls, endpoint: str) -> "SeparateS3":
        """One that runs already, to be set and asked."""
        server = cls()
        server.endpoint = endpoint
        return server

    def __enter__(self) -> "SeparateS3":
        self._process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        self.endpoint = self._process.stdout.readline().strip()
        assert self.endpoint, "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def env(self) -> dict[str, str]:
        """Environment of a client."""
        return environment(self.endpoint)

    def set(self, **attributes: object) -> None:
        """Set seed, rate, kinds, stall_s, flips, flips_first, applies or md5_tags of the server, and clear its counts."""
        self._control("PUT", json.dumps(attributes).encode())

    def counts(self) -> dict[str, Counter]:
        """{"requests": {(method, key): n}, "bytes_sent": {(method, key): n}, "faults": {kind: n}}"""
        found = self._control("GET")
        rows = {name: Counter({(method, key): n for method, key, n in found[name]}) for name in ("requests", "bytes_sent")}
        return {**rows, "faults": Counter(found["faults"])}

    def _control(self, method: str, data: bytes | None = None) -> dict:
        request = urllib.request.Request(f"{self.endpoint}/{CONTROL}/", data=data, method=method)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)


def impatient(server: FaultyS3, monkeypatch: Any) -> FaultyS3:
    """The server emptied and without faults, and clients of this process that use it and lose patience quickly."""
    from pipelines import storage_s3

    for name, value in (("READ_TIMEOUT_S", 0.3), ("FIRST_WAIT_S", 0.01), ("LONGEST_WAIT_S", 0.2), ("DEADLINE_S", 20.0)):
        monkeypatch.setattr(storage_s3, name, value)
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    server.seed, server.rate, server.kinds, server.stall_s, server.md5_tags = 0, 0.0, KINDS, 0.6, True
    server.applies = server.flips = server.flips_first = ""
    server.uploads.clear()
    server.objects.clear()
    server.reset_counts()
    return server


def environment(endpoint: str) -> dict[str, str]:
    """Environment of a client of a server that does not check signatures."""
    return {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}  # fmt: skip


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def shutdown_request(self, request):
        self.close_request(request)  # without the polite end that the base class sends first, so that a reset is one

    def handle_error(self, request, client_address):
        pass  # clients hang up; that is the point


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultyS3
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def _serve(self) -> None:
        owner = self.owner
        parts = urlsplit(self.path)
        self.bucket, _, self.key = unquote(parts.path.lstrip("/")).partition("/")
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        body = self._body()
        if self.bucket == CONTROL:
            return self._send(self._control(body))
        target = f"{self.command} {self.path} {self.headers.get('Range', '')}"
        kind, detail = owner.pick_fault(self.command, self.key, target)
        if kind == "flip" and not (self.command == "GET" and self.key and not self.query and re.search(owner.flips, self.key)):
            kind = "503" if "503" in owner.kinds else ""
        if kind in {"503", "500"} or (kind in {"reset", "stall"} and detail % 2):
            self._count(kind)
            return self._fail(kind)
        reply = self._answer(body)  # half of the resets and stalls come after the work is done: the answer is lost
        if kind in {"truncate", "stall"} and (self.command == "HEAD" or not reply.body):
            kind = "reset" if kind == "truncate" else kind
        if kind == "flip" and (reply.status >= 300 or not reply.body):
            kind = ""
        if kind:
            self._count(kind)
        self._send(reply, kind, detail)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _control(self, body: bytes) -> Reply:
        if self.command == "PUT":
            for name, value in json.loads(body).items():
                setattr(self.owner, name, value)
            self.owner.reset_counts()
        counts = {name: [[*key, n] for key, n in getattr(self.owner, name).items()] for name in ("requests", "bytes_sent")}
        return Reply(200, json.dumps({**counts, "faults": self.owner.faults}).encode())

    def _count(self, kind: str) -> None:
        with self.owner.lock:
            self.owner.faults[kind] += 1

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
            whole, rest = b"", data
            while rest:
                header, _, rest = rest.partition(b"\r\n")
                size = int(header.split(b";")[0], 16)
                if not size:
                    break
                whole, rest = whole + rest[:size], rest[size + 2 :]
            return whole
        return data

    def _fail(self, kind: str) -> None:
        if kind == "503":
            self._send(self._error(503, "SlowDown"))
        elif kind == "500":
            self._send(self._error(500, "InternalError"))
        else:
            if kind == "stall":
                self.owner.stopping.wait(self.owner.stall_s)
            self._hang_up()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _send(self, reply: Reply, kind: str = "", detail: int = 0) -> None:
        if kind in {"reset", "stall"} and (self.command == "HEAD" or not reply.body):
            return self._fail(kind)
        body = bytearray(reply.body)
        if kind == "flip":
            body[detail % len(body)] ^= 1 << detail % 8
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = body[: detail % len(body)] if kind in {"reset", "stall", "truncate"} else body
        with self.owner.lock:
            self.owner.bytes_sent[self.command, self.key] += len(sent)
        self.wfile.write(sent)
        if kind == "truncate":
            self.close_connection = True  # an orderly end, too early
        elif kind in {"reset", "stall"}:
            self.wfile.flush()
            self._fail(kind)

    def _answer(self, body: bytes) -> Reply:
        if self.bucket not in self.owner.buckets and not (self.command == "PUT" and not self.key):
            return self._error(404, "NoSuchBucket")
        if not self.key:
            return self._bucket_request(body)
        if "uploads" in self.query or "uploadId" in self.query:
            return self._multipart(body)
        return {"GET": self._get, "HEAD": self._get, "PUT": self._put, "DELETE": self._delete}[self.command](body)

    def _error(self, status: int, code: str) -> Reply:
        text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
        return Reply(status, b"" if self.command == "HEAD" else text.encode(), {"Content-Type": "application/xml"})

    def _xml(self, text: str) -> Reply:
        return Reply(200, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode(), {"Content-Type": "application/xml"})

    def _get(self, _: bytes) -> Reply:
        stored = self.owner.objects.stored.get((self.bucket, self.key))
        if stored is None:
            return self._error(404, "NoSuchKey")
        if not self._precondition(stored):
            return self._error(412, "PreconditionFailed")
        headers = {"ETag": f'"{stored.etag}"', "Last-Modified": formatdate(stored.modified, usegmt=True)}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "binary/octet-stream"}
        size = len(stored.data)
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return Reply(200, stored.data, headers)
        start = int(match[1]) if match[1] else max(0, size - int(match[2]))
        stop = min(size, int(match[2]) + 1) if match[1] and match[2] else size
        if start >= size:
            return self._error(416, "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Reply(206, stored.data[start:stop], headers)

    def _precondition(self, stored: Stored | None) -> bool:
        wanted, unwanted = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        if wanted and (stored is None or wanted.strip('"') not in {stored.etag, "*"}):
            return False
        return not (unwanted and stored is not None and unwanted.strip('"') in {stored.etag, "*"})

    def _put(self, body: bytes) -> Reply:
        objects, name = self.owner.objects, (self.bucket, self.key)
        if "x-amz-copy-source" in self.headers:
            source = unquote(self.headers["x-amz-copy-source"]).lstrip("/").partition("/")
            stored = objects.stored.get((source[0], source[2]))
            if stored is None:
                return self._error(404, "NoSuchKey")
            body = stored.data
        if not self._digest_fits(body):
            return self._error(400, "BadDigest")
        etag = (hashlib.md5 if self.owner.md5_tags else hashlib.sha256)(body).hexdigest()[:32]
        with objects.lock:
            if not self._precondition(objects.stored.get(name)):
                return self._error(412, "PreconditionFailed")
            objects.put(name, body, etag)
        if "x-amz-copy-source" in self.headers:
            return self._xml(f"<CopyObjectResult><ETag>&quot;{etag}&quot;</ETag></CopyObjectResult>")
        return Reply(200, b"", {"ETag": f'"{etag}"'})

    def _digest_fits(self, body: bytes) -> bool:
        digest = self.headers.get("Content-MD5")
        return not digest or base64.b64decode(digest) == hashlib.md5(body).digest()

    def _delete(self, _: bytes) -> Reply:
        self.owner.objects.pop((self.bucket, self.key), None)
        return Reply(204)

    def _multipart(self, body: bytes) -> Reply:
        uploads, name = self.owner.uploads, (self.bucket, self.key)
        if "uploads" in self.query:
            with self.owner.lock:
                upload = f"upload-{len(uploads)}-{time.monotonic_ns():x}"
                uploads[upload] = {}
            return self._xml(f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>")
        upload = self.query["uploadId"]
        if upload not in uploads:
            return self._error(404, "NoSuchUpload")
        if self.command == "PUT":
            if not self._digest_fits(body):
                return self._error(400, "BadDigest")
            uploads[upload][int(self.query["partNumber"])] = body
            return Reply(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        if self.command == "DELETE":
            uploads.pop(upload)
            return Reply(204)
        numbers = [int(text) for text in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        parts = [uploads[upload].get(number) for number in numbers]
        if not parts or None in parts:
            return self._error(400, "InvalidPart")
        etag = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest() + f"-{len(parts)}"
        with self.owner.objects.lock:
            if not self._precondition(self.owner.objects.stored.get(name)):
                return self._error(412, "PreconditionFailed")
            self.owner.objects.put(name, b"".join(parts), etag)
        uploads.pop(upload)
        return self._xml(f"<CompleteMultipartUploadResult><ETag>&quot;{etag}&quot;</ETag></CompleteMultipartUploadResult>")

    def _bucket_request(self, body: bytes) -> Reply:
        if self.command == "PUT":
            self.owner.buckets.add(self.bucket)
            return Reply(200)
        if self.command == "POST" and "delete" in self.query:
            keys = [element.text for element in ElementTree.fromstring(body).iter() if element.tag.rpartition("}")[2] == "Key"]
            for key in keys:
                self.owner.objects.pop((self.bucket, key), None)
            rows = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            return self._xml(f"<DeleteResult>{rows}</DeleteResult>")
        if self.command == "GET" and "location" in self.query:
            return self._xml("<LocationConstraint></LocationConstraint>")
        return self._list() if self.command == "GET" else Reply(200)

    def _list(self) -> Reply:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter", "")
        limit = min(PAGE, int(self.query.get("max-keys", PAGE)))
        after = self.query.get("continuation-token") or self.query.get("start-after", "")
        coded = quote if self.query.get("encoding-type") == "url" else escape
        rows, last, truncated = [], "", False
        for bucket, key in _from(self.owner.objects.names(), (self.bucket, max(after, prefix))):
            if bucket != self.bucket or not key.startswith(prefix):
                break
            folder = _folder(key, prefix, delimiter)
            if key <= after or (folder and folder == last) or (folder and after and folder <= after and after.startswith(folder)):
                continue
            if len(rows) == limit:
                truncated = True
                break
            last = folder or key
            rows.append(
                f"<CommonPrefixes><Prefix>{coded(folder)}</Prefix></CommonPrefixes>" if folder else self._entry(key, coded)
            )
        more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if truncated else ""
        encoding = "<EncodingType>url</EncodingType>" if coded is quote else ""
        return self._xml(f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{self.bucket}</Name>'
                         f"<Prefix>{coded(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount><MaxKeys>{limit}</MaxKeys>"
                         f"<IsTruncated>{str(truncated).lower()}</IsTruncated>{encoding}{more}{''.join(rows)}"
                         "</ListBucketResult>")  # fmt: skip

    def _entry(self, key: str, coded: Callable[[str], str]) -> str:
        stored = self.owner.objects.stored.get((self.bucket, key))
        if stored is None:  # deleted meanwhile
            return ""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stored.modified))
        return (f"<Contents><Key>{coded(key)}</Key><LastModified>{stamp}</LastModified><ETag>&quot;{stored.etag}&quot;</ETag>"
                f"<Size>{len(stored.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>")  # fmt: skip


def _from(names: list[tuple[str, str]], start: tuple[str, str]) -> Iterator[tuple[str, str]]:
    return iter(names[bisect.bisect_left(names, start) :])


def _folder(key: str, prefix: str, delimiter: str) -> str:
    if not delimiter or delimiter not in key[len(prefix) :]:
        return ""
    return prefix + key[len(prefix) :].split(delimiter)[0] + delimiter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9000)
    parser.add_argument("--bucket", default="bucket")
    parser.add_argument("--folder", type=Path, help="copied into the bucket at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    args = parser.parse_args()
    with FaultyS3(seed=args.seed, rate=args.rate, port=args.port) as server:
        server.buckets.add(args.bucket)
        if args.folder:
            server.load(args.bucket, args.folder)
        print(server.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
