"""Storage against a server that fails on purpose, and on local disk: exact bytes, typed errors, a deadline."""

import hashlib
import io
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from s3_faults import KINDS, FaultyS3, SeparateS3, impatient

from pipelines import storage, storage_s3
from pipelines.block_reader import BLOCK_BYTES, BlockReader
from pipelines.errors import InputRefused, Retryable, UsageError

DATA = random.Random(0).randbytes(3 * BLOCK_BYTES + 12345)
TAG = hashlib.md5(DATA).hexdigest()
URI = "s3://bucket/raw/clip.mp4"
NAME = ("bucket", "raw/clip.mp4")


@pytest.fixture(scope="module")
def server():
    with FaultyS3() as server:  # one for all: a new endpoint costs a new client
        yield server


@pytest.fixture
def s3(server, monkeypatch):
    """A server without faults and with one object, and clients that lose patience quickly."""
    impatient(server, monkeypatch)
    server.objects[NAME] = DATA
    storage.reset_counters()
    return server


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """A folder of either kind."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        return "s3://bucket/root"
    return str(tmp_path / "root")


# Faults


@pytest.mark.parametrize("seed", range(3))
def test_one_request_in_five_fails_and_nothing_is_lost(s3, seed):
    s3.seed, s3.rate = seed, 0.2
    rng, before = random.Random(seed), time.monotonic()
    files = {f"s3://bucket/out/{index % 3}/{index}": rng.randbytes(rng.randrange(0, 50_000)) for index in range(30)}
    spans = [sorted(rng.sample(range(len(DATA)), 2)) for _ in range(20)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(storage.write_bytes, files, files.values()))
        assert list(pool.map(storage.read_bytes, files)) == list(files.values())
        assert list(pool.map(lambda span: storage.read_range(URI, *span, TAG), spans)) == [DATA[a:b] for a, b in spans]
    assert {info.uri: info.etag for info in storage.list_files("s3://bucket/out")} == {
        uri: hashlib.md5(data).hexdigest() for uri, data in files.items()
    }
    with storage.open_file(URI) as file:
        assert file.read() == DATA
    assert [info.size for info in storage.stat_many(files).values()] == [len(data) for data in files.values()]
    storage.delete(files)
    assert not storage.exists("s3://bucket/out")
    assert storage.counters()["retries"] > 10
    assert time.monotonic() - before < 15


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_is_survived_alone(s3, kind):
    s3.kinds, s3.rate = (kind,), 0.5
    assert storage.read_range(URI, 1000, 500_000) == DATA[1000:500_000]
    assert storage.read_bytes(URI) == DATA
    assert storage.read_range(URI, 7, 20_000) == DATA[7:20_000]
    assert s3.faults[kind] > 0


@pytest.mark.parametrize("kinds", [("503",), ("reset",), ("stall",), ("truncate",)])
def test_an_outage_ends_by_the_deadline(s3, monkeypatch, kinds):
    monkeypatch.setattr(storage_s3, "DEADLINE_S", 1.0)
    monkeypatch.setattr(storage_s3, "SLOWEST_BYTES_PER_S", 1 << 40)
    s3.kinds, s3.rate, s3.objects["bucket", "tiny"] = kinds, 1.0, b"x"  # of one byte nothing arrives when its body is cut
    tiny, big = "s3://bucket/tiny", len(DATA)
    calls = [
        lambda: storage.read_bytes(tiny),
        lambda: storage.read_range(tiny, 0, 1),
        lambda: storage.list_files("s3://bucket/raw"),
        lambda: storage.stat_many([tiny]),
        lambda: storage.open_file(tiny),
        lambda: storage.exists(tiny),
        lambda: storage.write_bytes(tiny, b"new"),
        lambda: storage.write_bytes(tiny, bytes(big)),
        lambda: storage.check_bucket(tiny),
        lambda: storage.delete(["s3://bucket/other"]),
    ]

    def ends(call):
        before = time.monotonic()
        with pytest.raises(Retryable, match="did not answer"):
            call()
        return time.monotonic() - before

    with ThreadPoolExecutor(len(calls)) as pool:
        assert max(pool.map(ends, calls)) < 3.0


def test_bytes_that_never_arrive_whole_are_refused_by_the_deadline(s3, monkeypatch):
    monkeypatch.setattr(storage_s3, "DEADLINE_S", 0.5)
    s3.kinds, s3.rate = ("flip",), 1.0
    with pytest.raises(Retryable):
        storage.read_range(URI, 100, 50_000)


def test_retries_do_not_nest(s3, monkeypatch):
    monkeypatch.setattr(storage_s3, "DEADLINE_S", 0.5)
    s3.kinds, s3.rate = ("503",), 1.0
    storage.reset_counters()
    with pytest.raises(Retryable):
        storage.read_bytes(URI)
    assert s3.total_requests() == storage.counters()["requests"] == storage.counters()["retries"] + 1


def test_a_cut_body_is_continued_not_begun_again(s3):
    s3.kinds, s3.rate = ("truncate",), 0.5
    assert storage.read_bytes(URI) == DATA
    assert s3.faults["truncate"] > 0
    assert s3.bytes_sent["GET", NAME[1]] == len(DATA)


# Integrity


def test_plain_http_reads_ranges_twice_and_whole_objects_once(s3):
    assert storage.read_range(URI, 10, 20) == DATA[10:20]
    assert s3.total_requests("GET") == 2
    storage.read_bytes(URI)
    assert s3.total_requests("GET") == 3
    storage.read_range(URI, 0, len(DATA), TAG)
    assert s3.total_requests("GET") == 4
    assert storage.counters() == {"requests": 4, "bytes_read": 20 + 2 * len(DATA), "retries": 0}


def test_over_tls_one_request_suffices(s3, monkeypatch):
    class Tls(str):
        def startswith(self, prefix, *rest):
            return True if prefix == "https://" else super().startswith(prefix, *rest)

    monkeypatch.setattr(type(storage_s3.client().meta), "endpoint_url", property(lambda meta: Tls(s3.endpoint)))
    assert storage.read_range(URI, 10, 20) == DATA[10:20]
    assert s3.total_requests("GET") == 1


def test_flipped_bytes_never_come_through(s3):
    s3.kinds, s3.rate = ("flip",), 0.3
    rng = random.Random(5)
    for _ in range(40):
        start = rng.randrange(len(DATA) - 3000)
        assert storage.read_range(URI, start, start + 3000) == DATA[start : start + 3000]
    for _ in range(10):
        assert storage.read_bytes(URI) == DATA
    assert s3.faults["flip"] > 20


def test_a_tag_that_is_no_md5_is_not_insisted_on(s3):
    s3.md5_tags = False
    storage.write_bytes("s3://bucket/kms", DATA[:999])
    assert storage.read_bytes("s3://bucket/kms") == DATA[:999]
    assert s3.requests["GET", "kms"] == 2


def test_written_bytes_are_checked_by_the_store(s3, monkeypatch):
    monkeypatch.setattr(storage_s3, "DEADLINE_S", 0.3)
    monkeypatch.setattr(storage_s3, "_md5", lambda data: "AAAAAAAAAAAAAAAAAAAAAA==")
    with pytest.raises(Retryable, match="BadDigest"):
        storage.write_bytes("s3://bucket/new", b"data")
    assert ("bucket", "new") not in s3.objects


def test_replaced_bytes_raise_object_changed(s3):
    assert storage.read_range(URI, 5, 9, TAG) == DATA[5:9]
    reader = storage.open_file(URI)
    assert reader.read(10) == DATA[:10]
    s3.objects[NAME] = DATA[::-1]
    with pytest.raises(storage.ObjectChanged, match="replaced"):
        storage.read_range(URI, 5, 9, TAG)
    with pytest.raises(storage.ObjectChanged):
        reader.seek(2 * BLOCK_BYTES) and reader.read(10)
    with pytest.raises(storage.ObjectChanged):
        storage.open_file(URI, etag=TAG)
    assert storage.read_range(URI, 5, 9) == DATA[::-1][5:9]


def test_an_object_replaced_during_a_read_is_read_anew(s3, monkeypatch):
    new, proceed = DATA[::-1], storage_s3._Reading.proceed

    def replaced_meanwhile(reading):
        try:
            proceed(reading)
        except Exception:
            s3.rate = 0.0
            s3.objects[NAME] = new
            raise

    monkeypatch.setattr(storage_s3._Reading, "proceed", replaced_meanwhile)
    s3.kinds, s3.rate = ("truncate",), 1.0
    assert storage.read_bytes(URI) == new


# Both kinds of storage


def test_round_trip_errors_and_slices(root):
    uri = storage.join(root, "a", "x.bin")
    assert not storage.exists(root)
    storage.write_bytes(uri, DATA)
    assert storage.exists(root)
    assert storage.exists(uri)
    (info,) = storage.list_files(root)
    assert (info.uri, info.size, storage.age_hours(info) < 0.1) == (uri, len(DATA), True)
    assert storage.stat_many([uri, uri + "y"]) == {uri: info, uri + "y": None}
    assert storage.read_range(uri, 3, 3) == b""
    assert storage.read_range(uri, len(DATA) - 2, len(DATA), info.etag) == DATA[-2:]
    for start, stop in [(0, len(DATA) + 1), (len(DATA) + 5, len(DATA) + 9)]:
        with pytest.raises(InputRefused, match="shorter"):
            storage.read_range(uri, start, stop)
    with pytest.raises(ValueError, match="range"):
        storage.read_range(uri, 5, 3)
    for read in (storage.read_bytes, storage.open_file, lambda name: storage.read_range(name, 0, 1)):
        with pytest.raises(InputRefused, match="does not exist"):
            read(uri + "y")
    with pytest.raises(storage.ObjectChanged):
        storage.read_range(uri, 0, 5, "0" * 32)
    with pytest.raises(storage.ObjectChanged):
        storage.open_file(uri, etag="0" * 32)
    storage.delete([uri, uri + "y"])
    assert not storage.exists(uri)


def test_slices_are_files_of_their_own(root):
    uri = storage.join(root, "x.tar")
    storage.write_bytes(uri, DATA)
    etag = storage.stat_many([uri])[uri].etag
    for offset, size in [(0, 100), (512, BLOCK_BYTES + 5), (len(DATA) - 10, 10), (len(DATA) - 10, 99), (7, None), (5, 0)]:
        expected = DATA[offset:] if size is None else DATA[offset : offset + size]
        with storage.open_file(uri, offset=offset, size=size) as file:
            assert file.seek(0, io.SEEK_END) == len(expected)
            assert file.read() == b""
            assert file.seek(-min(9, len(expected)), io.SEEK_END) == file.tell()
            assert file.read(100) == expected[-9:]
            file.seek(0)
            assert file.read() == expected
    with storage.open_file(uri, offset=100, size=50, etag=etag) as file:
        assert file.read() == DATA[100:150]


def test_listing_is_recursive_sorted_and_filtered(root):
    names = ["b.mp4", "a/c.MP4", "a/d/e.mkv", "a.mp4/x.txt", "ü &+.mp4"]
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())
    assert [info.uri for info in storage.list_files(root)] == sorted(storage.join(root, name) for name in names)
    videos = [info.uri for info in storage.list_files(root, (".mp4", ".mkv"))]
    assert videos == sorted(storage.join(root, name) for name in names if not name.endswith(".txt"))
    assert [info.size for info in storage.list_files(storage.join(root, "b.mp4"))] == [5], "one file is a listing too"
    assert storage.list_files(storage.join(root, "none"), missing_ok=True) == []


def test_an_empty_object(root):
    uri = storage.join(root, "empty")
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""
    with storage.open_file(uri) as file:
        assert (file.read(), file.read(5)) == (b"", b"")
    assert storage.list_files(root)[0].size == 0


def test_upload_copies_in_parts(root, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_s3, "PART_BYTES", 1 << 20)
    source, uri = tmp_path / "source", storage.join(root, "big")
    source.write_bytes(DATA)
    storage.upload(source, uri)
    assert storage.read_bytes(uri) == DATA
    with pytest.raises(InputRefused, match="nowhere"):
        storage.upload(tmp_path / "nowhere", uri)


# S3 alone


def test_multipart_uploads_survive_faults_and_lost_answers(s3, monkeypatch):
    monkeypatch.setattr(storage_s3, "PART_BYTES", 200_000)
    for seed in range(4):
        s3.seed, s3.rate = seed, 0.3
        storage.write_bytes("s3://bucket/big", DATA)
        s3.rate = 0
        assert s3.objects.pop(("bucket", "big")) == DATA
    assert not s3.uploads or all(not parts for parts in s3.uploads.values()), "only uploads whose creation was not heard of"


def test_a_failed_upload_is_aborted(s3, monkeypatch):
    monkeypatch.setattr(storage_s3, "PART_BYTES", 200_000)
    monkeypatch.setattr(storage_s3, "DEADLINE_S", 0.3)
    monkeypatch.setattr(storage_s3, "SLOWEST_BYTES_PER_S", 1 << 40)
    s3.rate, s3.kinds, s3.applies = 1.0, ("503",), "^PUT"
    with pytest.raises(Retryable):
        storage.write_bytes("s3://bucket/big", DATA)
    assert not s3.uploads
    assert ("bucket", "big") not in s3.objects


def test_large_listings_are_cut_into_ranges(s3):
    keys = [f"many/{a}/{b}/{n:04d}.mp4" for a in "xyz" for b in range(3) for n in range(300)]
    keys += [f"many/flat{n:04d}.mp4" for n in range(1500)] + ["many/x/", "many.txt", "manyx/a.mp4"]
    for key in keys:
        s3.objects["bucket", key] = b"1"
    wanted = sorted(f"s3://bucket/{key}" for key in keys if key.startswith("many/") and not key.endswith("/"))
    s3.rate = 0.2
    assert [info.uri for info in storage.list_files("s3://bucket/many", (".mp4",))] == wanted
    assert max(len(page) for page in storage.list_pages("s3://bucket/many")) <= 1000
    s3.rate = 0
    s3.reset_counts()
    assert len(next(iter(storage.list_pages("s3://bucket/many")))) == 1000
    assert s3.total_requests() == 1, "whoever stops early asks no more"
    s3.reset_counts()
    storage.list_files("s3://bucket/many/x/1")
    assert s3.total_requests() == 1, "a small folder is one request"


def test_refusals_of_a_store_are_typed(s3):
    for call in (storage.list_files, storage.check_bucket, storage.read_bytes):
        with pytest.raises(InputRefused, match="no-bucket"):
            call("s3://no-bucket/x")
    assert not storage.exists("s3://no-bucket/x")
    assert storage.exists("s3://bucket")
    with pytest.raises(UsageError, match="UPPER_case~"):
        storage.read_bytes("s3://UPPER_case~/x")


def test_a_forked_child_and_threads_have_working_clients(s3):
    assert storage.read_range(URI, 0, 9) == DATA[:9]
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, storage.read_range(URI, 9, 19))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == DATA[9:19]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: storage.read_range(URI, n, n + 9), range(50))) == [DATA[n : n + 9] for n in range(50)]


def test_delta_lake_commits_through_faults_and_stops_at_the_deadline(tmp_path):
    code = """
import sys, time
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError
from s3_faults import SeparateS3
from pipelines import storage
from pipelines.errors import Retryable

def attempt(work):
    def typed():
        try:
            return work(storage.delta_options("s3://bucket/t"))
        except (OSError, DeltaError) as error:
            raise Retryable(str(error)) from error
    return typed

def write(number):
    def work(options):
        seen = DeltaTable("s3://bucket/t", storage_options=options).to_pyarrow_table() if number else None
        if seen is None or number not in seen["a"].to_pylist():
            write_deltalake("s3://bucket/t", pa.table({"a": [number]}), mode="append", storage_options=options)
    return work
server = SeparateS3.at(sys.argv[1])
storage.retrying(attempt(write(0)))
server.set(rate=0.2, flips="^$", stall_s=0.6)
for number in range(1, 4):
    storage.retrying(attempt(write(number)))
assert sum(server.counts()["faults"].values()) > 1
server.set(rate=0)
rows = DeltaTable("s3://bucket/t", storage_options=storage.delta_options("s3://bucket/t")).to_pyarrow_table()["a"].to_pylist()
assert sorted(rows) == list(range(4)), rows
server.set(rate=1, kinds=["503"])
before = time.monotonic()
try:
    attempt(lambda options: DeltaTable("s3://bucket/t", storage_options=options))()
except Retryable:
    assert time.monotonic() - before < 8, time.monotonic() - before
else:
    raise AssertionError("read during an outage")
"""
    with SeparateS3() as server:
        settings = {"JEPA_STORAGE_TIMEOUT_S": "0.5", "JEPA_STORAGE_DEADLINE_S": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run([sys.executable, "-c", code, server.endpoint], env={**os.environ, **server.env(), **settings},
                                capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr


# Local disk alone


def test_local_writes_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "new" / "x"
    storage.write_bytes(str(path), b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(Retryable, match="file system failed"):
        storage.write_bytes(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["x"], "no part is left behind"


def test_local_listing_leaves_out_what_is_no_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.mp4").write_bytes(b"1")
    (tmp_path / "x.mp4.123.part").write_bytes(b"half")
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nothing")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    os.mkfifo(tmp_path / "pipe.mp4")
    found = [os.path.relpath(info.uri, tmp_path) for info in storage.list_files(str(tmp_path))]
    assert found == ["a/x.mp4", "linked/x.mp4"]
    with pytest.raises(InputRefused, match="does not exist"):
        storage.list_files(str(tmp_path / "none"))
    with open(os.fsencode(tmp_path) + b"/\xff.mp4", "wb"), pytest.raises(InputRefused, match="not UTF-8"):
        storage.list_files(str(tmp_path))
    assert storage.list_files(str(tmp_path), (".mkv",)) == []


def test_local_pages_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LOCAL_PAGE", 10)
    for index in range(35):
        (tmp_path / f"{index % 7}").mkdir(exist_ok=True)
        (tmp_path / f"{index % 7}" / str(index)).write_bytes(b"")
    pages = list(storage.list_pages(str(tmp_path)))
    assert sum(map(len, pages)) == 35
    assert max(map(len, pages)) == 10


def test_local_etag_changes_with_the_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    etag = storage.stat_many([str(path)])[str(path)].etag
    assert storage.read_range(str(path), 1, 3, etag) == b"23"
    assert storage.counters()["bytes_read"] >= 2
    os.utime(path, ns=(1, 1))
    with pytest.raises(storage.ObjectChanged):
        storage.read_range(str(path), 1, 3, etag)


def test_local_errors_are_typed(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    for uri in (tmp_path, tmp_path / "x" / "y", tmp_path / ("n" * 300)):
        with pytest.raises(InputRefused):
            storage.read_bytes(str(uri))
    assert storage.stat_many([str(tmp_path / ("n" * 300)), str(tmp_path / "x" / "y")]) == dict.fromkeys(
        [str(tmp_path / ("n" * 300)), str(tmp_path / "x" / "y")]
    )
    for uri in ("gs://x/y", "", "s3://"):
        with pytest.raises(UsageError):
            storage.normalize(uri)


# The reader


def test_block_reader_reads_ahead_only_forwards():
    asked = []

    def fetch(start, stop):
        asked.append((start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)))
        return (DATA * 12)[start:stop]

    size = 36 * BLOCK_BYTES
    file = BlockReader(fetch, size)
    for number in (0, 1, 2, 3):
        file.seek(number * BLOCK_BYTES)
        file.read(10)
    assert asked == [(0, 1), (1, 3), (3, 7)]
    file.seek(30 * BLOCK_BYTES + 5)
    assert file.read(10) == (DATA * 12)[30 * BLOCK_BYTES + 5 :][:10]
    assert asked[3:] == [(30, 31)]
    file.seek(0)
    assert file.read() == (DATA * 12)[:size]
    assert len(file._blocks) <= 16
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)


def test_block_reader_is_a_file_to_other_libraries():
    rng = random.Random(1)
    file, plain = BlockReader(lambda start, stop: DATA[start:stop], len(DATA)), io.BytesIO(DATA)
    for _ in range(200):
        position, size = rng.randrange(len(DATA) + 10), rng.randrange(3 * BLOCK_BYTES) // rng.choice((1, 1000))
        assert file.seek(position) == plain.seek(position)
        assert file.read(size) == plain.read(size)
        assert file.tell() == plain.tell()
    file.seek(5)
    assert io.BufferedReader(file).readline() == DATA[5:].splitlines(keepends=True)[0]
    with pytest.raises(ValueError, match="seek"):
        file.seek(-1)
