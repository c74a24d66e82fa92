"""Sources as items: prefixes, lists, tars (sound, cut off, hostile), LeRobot datasets, image folders. No Ray."""

import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode, make_frames
from s3_faults import FaultyS3

from pipelines import sources, storage, storage_s3, tar_listing
from pipelines.catalog_schema import ITEM_SCHEMA
from pipelines.errors import InputRefused
from pipelines.video import VideoRefused

VIDEO = (".mp4", ".mkv")


def rows(uri: Path | str, kind: str = "auto", suffixes: tuple[str, ...] = VIDEO) -> list[dict]:
    pages = list(sources.objects(str(uri), kind, suffixes))
    assert all(page.schema == ITEM_SCHEMA for page in pages)
    return [row for page in pages for row in page.to_pylist()]


def write(folder: Path, *names: str) -> list[str]:
    """Files of different sizes; returns their URIs."""
    for index, name in enumerate(names, 1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * index)
    return [str(folder / name) for name in names]


def make_tar(members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name: str = "a.mp4", size: int = 0, kind: bytes = tarfile.REGTYPE, format: int = tarfile.GNU_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(format)


def extended(kind: bytes, data: bytes) -> bytes:
    """An extended header and its data, as they stand before a member."""
    return header("././@LongLink", len(data), kind) + data + bytes(-len(data) % 512)


def members(folder: Path, data: bytes, suffixes: tuple[str, ...] = VIDEO, name: str = "x.tar") -> list[dict]:
    path = folder / name
    path.write_bytes(data)
    (info,) = storage.list_files(str(path))
    table = sources.tar_members(info.uri, info.size, info.etag, suffixes)
    assert table.schema == ITEM_SCHEMA
    assert set(table["uri"].to_pylist()) <= {info.uri}
    assert set(table["etag"].to_pylist()) <= {info.etag}
    return table.to_pylist()


@pytest.fixture
def in_memory(monkeypatch) -> Callable[[bytes], list[dict]]:
    """Lists a tar that is in no file: thousands of files would be slow."""

    def listing(data: bytes) -> list[dict]:
        monkeypatch.setattr(storage, "read_range", lambda uri, start, stop, etag: data[start:stop])
        return sources.tar_members("s3://b/x.tar", len(data), "tag", VIDEO).to_pylist()

    return listing


def refusal(folder: Path, data: bytes, name: str = "x.tar") -> VideoRefused:
    with pytest.raises(VideoRefused) as caught:
        members(folder, data, name=name)
    return caught.value


# --- prefixes and images ---


def test_a_prefix_gives_videos_and_tars_and_nothing_else(tmp_path):
    found = write(tmp_path, "a.mp4", "deep/er/B.MKV", "deep/shard.tar", "old.tar.gz", "notes.json", "tar", "c.mp4.part")
    (tmp_path / "real.mp4").write_bytes(encode(make_frames(4)))
    got = {row["uri"]: row for row in rows(tmp_path)}
    assert sorted(got) == sorted([*found[:4], str(tmp_path / "real.mp4")])
    assert {uri for uri in got if sources.is_tar(uri)} == set(found[2:4])
    (info,) = storage.list_files(found[1])
    constant = {"member": "", "offset": 0, "label": None, "cuts": None}
    assert got[found[1]] == {"uri": info.uri, "size": 2, "etag": info.etag, **constant}
    assert sorted(row["uri"] for row in rows(tmp_path, "tars")) == sorted(found[2:4])
    assert [row["uri"] for row in rows(found[0], "prefix")] == [found[0]]
    assert [row["uri"] for row in rows(found[2])] == [found[2]]
    with pytest.raises(InputRefused, match="does not exist"):
        rows(tmp_path / "nowhere")


def test_images_are_labelled_by_their_folder(tmp_path):
    write(tmp_path, "train/cat/1.JPG", "train/dog/2.png", "3.jpg", "train/dog/clip.mp4", "cat/4.webp")
    got = {Path(row["uri"]).name: row["label"] for row in rows(tmp_path, "images", (".jpg", ".png", ".webp"))}
    assert got == {"1.JPG": "cat", "2.png": "dog", "3.jpg": None, "4.webp": "cat"}


def test_a_name_outside_unicode_is_refused_by_name(tmp_path):
    (tmp_path / b"caf\xe9.mp4".decode("utf-8", "surrogateescape")).write_bytes(b"x")
    with pytest.raises(InputRefused, match=r"caf\\udce9.*rename"):
        rows(tmp_path)


def test_detect(tmp_path):
    for name in ("l.csv", "l.TSV", "l.txt", "l.parquet", "s3://b/x/l.jsonl"):
        assert sources.detect(name, "auto") == "list"
    assert sources.detect(str(tmp_path), "auto") == "prefix"
    assert sources.detect(str(tmp_path / "l.csv"), "prefix") == "prefix"
    write(tmp_path, "meta/info.json")  # another program's
    assert sources.detect(str(tmp_path), "auto") == "prefix"
    with pytest.raises(InputRefused, match="no LeRobot dataset"):
        sources.detect(str(tmp_path), "lerobot")
    for text in ("[]", '{"codebase_version": 3}', "{}"):
        (tmp_path / "meta/info.json").write_text(text)
        assert sources.detect(str(tmp_path), "auto") == "prefix"


# --- lists ---


def listed(folder: Path, text: str | bytes, name: str = "list.csv") -> list[tuple[str, str | None, int]]:
    """(path below the folder, label, size) of each row."""
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(row["uri"].removeprefix(f"{folder}/"), row["label"], row["size"]) for row in rows(folder / name)]


@pytest.mark.parametrize(
    "text",
    [
        "a.mp4 3\nmy clip.mp4 4\nsub/ü 視頻.mp4 5\n",
        "a.mp4::3\nmy clip.mp4::4\nsub/ü 視頻.mp4::5",
        'a.mp4 3\r\n"my clip.mp4"   4\r\n\r\n  "sub/ü 視頻.mp4" "5"\r\n',
        "a.mp4\t3\nmy clip.mp4\t4\nsub/ü 視頻.mp4\t5",
        "\ufeffid,Path,label\n0,a.mp4,3\n1, my clip.mp4, 4\n2,sub/ü 視頻.mp4,5\n",
        '\ufeff"video"\t"label"\r\na.mp4\t3\r\n"my clip.mp4"\t4\r\nsub/ü 視頻.mp4\t5',
    ],
    ids=["space", "colons", "quoted-crlf", "tab", "csv-bom", "tsv"],
)
def test_the_syntaxes_of_text_lists(tmp_path, text):
    write(tmp_path, "a.mp4", "my clip.mp4", "sub/ü 視頻.mp4")
    assert listed(tmp_path, text) == [("a.mp4", "3", 1), ("my clip.mp4", "4", 2), ("sub/ü 視頻.mp4", "5", 3)]


def test_text_lists_without_labels_with_captions_with_quotes(tmp_path):
    write(tmp_path, "a.mp4", "b.mp4", 'say "hi" :: now.mp4')
    assert listed(tmp_path, "a.mp4\nb.mp4", "l.txt") == [("a.mp4", None, 1), ("b.mp4", None, 2)]
    assert listed(tmp_path, "path\na.mp4\n", "l.csv") == [("a.mp4", None, 1)]
    assert listed(tmp_path, "a.mp4::a dog, running\nb.mp4::a cat") == [("a.mp4", "a dog, running", 1), ("b.mp4", "a cat", 2)]
    quoted = '"say ""hi"" :: now.mp4" 1\na.mp4 2'
    assert listed(tmp_path, quoted) == [('say "hi" :: now.mp4', "1", 3), ("a.mp4", "2", 1)]
    assert listed(tmp_path, 'label,file_name\n"a ""dog"", running",a.mp4\n') == [("a.mp4", 'a "dog", running', 1)]


def test_jsonl_and_parquet_lists(tmp_path):
    write(tmp_path, "a.mp4", "b.mp4")
    expected = [("a.mp4", "3", 1), ("b.mp4", None, 2)]
    assert listed(tmp_path, '{"video_path": "a.mp4", "label": 3}\n\n{"label": null, "path": "b.mp4"}', "l.jsonl") == expected
    for column, label in ((pa.array(["a.mp4", "b.mp4"], pa.large_string()), pa.array([3, None], pa.int32())),
                          (pa.array(["a.mp4", "b.mp4"]).dictionary_encode(), ["3", None])):  # fmt: skip
        pq.write_table(pa.table({"other.x": [1, 2], "URI": column, "label": label}), tmp_path / "l.parquet")
        assert [(Path(r["uri"]).name, r["label"], r["size"]) for r in rows(tmp_path / "l.parquet")] == expected
    pq.write_table(pa.table({"path": ["b.mp4", None]}), tmp_path / "l.parquet")
    with pytest.raises(InputRefused, match="row 2 names no object"):
        rows(tmp_path / "l.parquet")


def test_paths_of_a_list_are_resolved_once_each_and_the_first_label_wins(tmp_path):
    (tmp_path / "lists").mkdir()
    a, tar = write(tmp_path, "a.mp4", "s.tar")
    text = f"../a.mp4 first\n{a} second\nfile://{a} third\n{tmp_path}//lists/.././a.mp4 fourth\n/gone.mp4 5\n../s.tar 6\n"
    (tmp_path / "lists/l.txt").write_text(text)
    got = rows(tmp_path / "lists/l.txt")
    assert [(row["uri"], row["label"]) for row in got] == [(a, "first"), ("/gone.mp4", "5"), (tar, "6")]
    assert (got[1]["size"], got[1]["etag"]) == (-1, "")
    assert got[0]["etag"] == storage.list_files(a)[0].etag


def test_a_list_in_s3_starts_relative_paths_there(monkeypatch):
    text = b"a.mp4 1\n../b.mp4 2\n../../../../c.mp4 3\ns3://other/x//y.mp4 4\n/local.mp4 5\n"
    asked = []
    monkeypatch.setattr(storage, "open_file", lambda uri: io.BytesIO(text))
    monkeypatch.setattr(storage, "stat_many", lambda uris: asked.extend(uris) or dict.fromkeys(uris))
    got = rows("s3://bucket/lists/l.txt")
    uris = ["s3://bucket/lists/a.mp4", "s3://bucket/b.mp4", "s3://bucket/c.mp4", "s3://other/x//y.mp4", "/local.mp4"]
    assert [row["uri"] for row in got] == asked == uris
    asked.clear()
    rows("s3://bucket/l.txt")
    assert asked[:2] == ["s3://bucket/a.mp4", "s3://bucket/b.mp4"]


@pytest.mark.parametrize("name", ["l.csv", "l.txt", "l.tsv", "l.jsonl"])
def test_an_empty_list_gives_nothing(tmp_path, name):
    assert listed(tmp_path, "", name) == []
    assert listed(tmp_path, "\ufeff\r\n  \r\n", name) == []
    pq.write_table(pa.table({"path": pa.array([], pa.string())}), tmp_path / "l.parquet")
    assert rows(tmp_path / "l.parquet") == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "a.mp4::1\n\nb.mp4 2\n", "line 3 has no '::'"),
        ("l.csv", "a.mp4 1\na.mp4,3\n", "line 2 holds commas.*path,label"),
        ("l.csv", "a.mp4, 3\n", "line 1 holds commas"),
        ("l.csv", 'a.mp4 1\n"b c.mp4 2\n', "line 2 opens a quote"),
        ("l.csv", 'a.mp4 1\n"b c.mp4"2\n', "line 2 opens a quote"),
        ("l.csv", "path,label\na.mp4,1\nb,c.mp4,1\n", "line 3 has 3 cells, the header 2"),
        ("l.csv", 'path,label\n"a\nb.mp4",1\n', "line 2 is not CSV"),
        ("l.csv", "path,label\n,1\n", "line 2 names no object"),
        ("l.txt", "a.mp4 1\nhttp://host/b.mp4 2\n", "line 2 names no object: 'http://host/b.mp4'"),
        ("l.txt", "s3://bucket 2\n", "line 1 names no object"),
        ("l.txt", "folder/ 2\n", "line 1 names no object"),
        ("l.txt", "file://host/a.mp4 2\n", "line 1 names no object"),
        ("l.txt", b"a.mp4 1\ncaf\xe9.mp4 2\n", "line 2 is not UTF-8"),
        ("l.txt", b"\xff\xfea\0.\0m\0p\0", "line 1.*NUL.*is this a list"),
        ("l.txt", b"a" * 70000, "line 1 is longer than 65536 bytes"),
        ("l.jsonl", '{"path": "a.mp4"}\n{"path": 3}\n', "line 2 is no object with a path"),
        ("l.jsonl", '{"path": "a.mp4"\n', "line 1 is not JSON"),
        ("l.jsonl", "[" * 60000, "line 1 is not JSON"),
        ("l.jsonl", '{"path": "a\\u0000b"}', "line 1 names no object"),
        ("l.jsonl", '{"path": "a\\ud800b"}', "line 1 holds text that is no Unicode"),
        ("l.parquet", "no parquet at all", "is not a Parquet file"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named(tmp_path, name, text, message):
    with pytest.raises(InputRefused, match=message):
        listed(tmp_path, text, name)


def test_a_parquet_list_without_paths_is_refused(tmp_path):
    for table, message in (({"clip": ["a"]}, "no column of paths"), ({"path": [{"x": 1}]}, "paths and labels as text")):
        pq.write_table(pa.table(table), tmp_path / "l.parquet")
        with pytest.raises(InputRefused, match=message):
            rows(tmp_path / "l.parquet")


# --- tars ---


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, format):
    video = encode(make_frames(4))
    long = "d" * 90 + "/" + "e" * (60 if format == tarfile.USTAR_FORMAT else 160) + ".mkv"
    names = ["a.mp4", "b/c.MP4", "b/c.json", long, "z.mkv"] + ([] if format == tarfile.USTAR_FORMAT else ["ü/視 頻.mp4"])
    data = make_tar([(name, video[: 1000 * n]) for n, name in enumerate(names)], format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if not info.name.endswith("json")]
    got = members(tmp_path, data)
    assert [(row["member"], row["offset"], row["size"]) for row in got] == expected
    whole = next(row for row in got if row["member"] == "z.mkv")
    assert data[whole["offset"] :][: whole["size"]] == video[:4000]
    assert members(tmp_path, data, (".avi",)) == []


def test_links_folders_and_names_that_escape_are_labels_or_nothing(tmp_path):
    data = header("d.mp4", kind=tarfile.DIRTYPE) + header("l.mp4", 4096, tarfile.SYMTYPE) + header("h.mp4", kind=tarfile.LNKTYPE)
    assert members(tmp_path, data + bytes(1024)) == []
    bad = ["../../etc/x.mp4", "/etc/y.mp4", "a/../../z.mp4", "../" * 60 + "w.mp4", "s3://b/v.mp4"]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert [row["member"] for row in members(tmp_path, make_tar([(name, b"1") for name in bad], format))] == bad
    pax = b"14 path=a\0b.mp4\n"
    assert len(pax) == 16
    (row,) = members(tmp_path, extended(tarfile.XHDTYPE, b"16" + pax[2:]) + header() + bytes(1024))
    assert row["member"] == "a\ufffdb.mp4"
    (row,) = members(tmp_path, make_tar([("caf\udce9.mp4", b"1")], tarfile.GNU_FORMAT))
    assert row["member"] == "caf\ufffd.mp4"


def test_labels_come_from_cls_siblings(tmp_path):
    texts = {"s/1.cls": b"7\n", "s/2.CLS": b"8", "s/2.json": b"9", "4.cls": b"x" * 1025, "5.cls": b" "}
    videos = dict.fromkeys(("s/1.mp4", "s/2.left.mp4", "3.mp4", "4.mp4", "5.mp4", "t/1.mp4"), b"v")
    samples = sorted({**texts, **videos}.items())
    got = {row["member"]: row["label"] for row in members(tmp_path, make_tar(samples))}
    assert got == {"s/1.mp4": "7", "s/2.left.mp4": "8", "3.mp4": None, "4.mp4": None, "5.mp4": None, "t/1.mp4": None}


def test_a_truncated_tar_gives_its_complete_members_and_what_is_missing(in_memory):
    data = make_tar([("a.mp4", b"1" * 700), ("b.txt", b"2" * 700), ("c.mp4", b"3" * 700)])
    whole = in_memory(data)
    assert [row["offset"] for row in whole] == [512, 512 + 2 * 1536]
    lost = {}
    for stop in range(1, 3 * 1536 + 1):
        try:
            part = [(row["member"], row["offset"] + row["size"] <= stop) for row in in_memory(data[:stop])]
        except VideoRefused as refused:
            part = refused.reason
        lost.setdefault(str(part), []).append(stop)
    cut = ("(header cut off)", False)
    a, c = ("a.mp4", True), ("c.mp4", True)
    assert {key: (stops[0], stops[-1]) for key, stops in lost.items()} == {
        "not_a_video": (1, 511),
        str([("a.mp4", False)]): (512, 1211),
        str([a]): (1212, 3072),  # but for 1537 to 2747, see below
        str([a, cut]): (1537, 3583),
        str([a, ("b.txt", False)]): (2048, 2747),
        str([a, ("c.mp4", False)]): (3584, 4283),
        str([a, c]): (4284, 4608),
    }
    assert lost[str([a])] == [*range(1212, 1537), *range(2748, 3073)]
    assert in_memory(data[:4608]) == in_memory(data[:4608] + bytes(600)) == whole


@pytest.mark.parametrize("cut", [600, 1100, 1536, 1700])
def test_a_tar_that_ends_in_an_extended_header_says_so(tmp_path, cut):
    data = make_tar([("d" * 600 + ".mp4", b"1")], tarfile.GNU_FORMAT)
    (row,) = members(tmp_path, data[:cut])
    assert row["member"] == "(header cut off)"
    assert row["offset"] + row["size"] > cut


def test_tars_put_one_after_the_other_are_read_to_the_end(tmp_path):
    data = make_tar([("a.mp4", b"1")]) + make_tar([("b.mp4", b"2")])
    assert [row["member"] for row in members(tmp_path, data)] == ["a.mp4", "b.mp4"]
    assert members(tmp_path, make_tar([])) == []


def pax_size(text: bytes) -> bytes:
    record = b" size=" + text + b"\n"
    return extended(tarfile.XHDTYPE, b"%d" % (len(record) + 2) + record)


HOSTILE = {
    "text": b"not a tar at all\n" * 100,
    "short": b"x",
    "negative size": header(size=-512) + bytes(1024),
    "size of 2**80": header(size=2**80) + bytes(1024),
    "negative long name": header("././@LongLink", -512, tarfile.GNUTYPE_LONGNAME) + header() + bytes(1024),
    "long name of a petabyte": header("././@LongLink", 10**15, tarfile.GNUTYPE_LONGNAME) + bytes(4096),
    "PAX records of 10 GB": header("x", 10**10, tarfile.XHDTYPE) + bytes(4096),
    "endless long names": extended(tarfile.GNUTYPE_LONGNAME, b"n") * 5000,
    "negative PAX size": pax_size(b"-1024") + header() + bytes(1024),
    "PAX size of 5000 digits": pax_size(b"9" * 92) + header() + bytes(1024),
    "PAX size of other digits": pax_size("٣".encode()) + header() + bytes(1024),
    "PAX record of length 0": extended(tarfile.XHDTYPE, b"0 path=x\n") + header() + bytes(1024),
    "PAX record beyond its end": extended(tarfile.XHDTYPE, b"99 path=x\n") + header() + bytes(1024),
    "PAX digits without end": extended(tarfile.XHDTYPE, b"1" * (1 << 20)) + header() + bytes(1024),
    "PAX keys without end": extended(tarfile.XHDTYPE, b"2 " * (1 << 19)) + header() + bytes(1024),
    "broken second header": header(size=5) + b"12345" + bytes(507) + b"x" * 512 + bytes(1024),
    "zeros for 3 MB": header() + bytes(3 << 20) + header(),
    "bad checksum": header().replace(b"a.mp4", b"b.mp4") + bytes(1024),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(10)
def test_hostile_tars_are_refused(tmp_path, name):
    refused = refusal(tmp_path, HOSTILE[name])
    assert refused.reason == "not_a_video"
    assert "tar" in refused.detail


def test_a_petabyte_member_is_listed_as_missing(tmp_path):
    for size in (10**15, 2**62):
        assert [(row["member"], row["size"]) for row in members(tmp_path, header(size=size) + b"12345")] == [("a.mp4", size)]


def test_compressed_sparse_empty_and_vanished_tars_are_refused(tmp_path):
    data = make_tar([("a.mp4", b"1")])
    for name in ("x.tar.gz", "x.tgz", "x.tar"):
        refused = refusal(tmp_path, gzip.compress(data), name)
        assert (refused.reason, "uncompressed" in refused.detail) == ("not_allowed", True)
        assert sources.is_tar(name)
    sparse = header(kind=tarfile.GNUTYPE_SPARSE)
    pax = extended(tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n") + header()
    for data in (sparse, pax):
        assert refusal(tmp_path, data + bytes(1024)).reason == "not_allowed"
    assert refusal(tmp_path, b"").reason == "empty"
    for size, etag, reason in ((-1, "", "missing"), (5, "", "missing"), (5, "other", "changed")):
        path = tmp_path / ("x.tar" if reason == "changed" else "gone.tar")
        with pytest.raises(VideoRefused) as caught:
            sources.tar_members(str(path), size, etag, VIDEO)
        assert caught.value.reason == reason


def test_the_number_of_members_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_listing, "MAX_MEMBERS", 100)
    assert len(members(tmp_path, header() * 100)) == 100
    assert refusal(tmp_path, header() * 101).reason == "too_large"
    assert refusal(tmp_path, header("a.txt") * 101).reason == "too_large"


@pytest.mark.timeout(60)
def test_mutated_tars_are_listed_or_refused(in_memory):
    """2000 mutations: no other error, no hang, offsets ascend, and members said to be complete lie inside."""
    good = b"".join(make_tar([("a" * 120 + ".mp4", b"1" * 600), ("ü.cls", b"7"), ("ü.mp4", b"2")], format)
                    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))  # fmt: skip
    good = good.replace(bytes(8192), bytes(512))
    rng, outcomes = random.Random(7), {"listed": 0, "refused": 0}
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(len(data))] = rng.choice((0, 0x80, 0xFF, 0x30, 0x37, rng.randrange(256)))
        try:
            got = in_memory(bytes(data[: rng.choice((len(data), rng.randrange(len(data)))) + 1]))
        except VideoRefused:
            outcomes["refused"] += 1
            continue
        outcomes["listed"] += 1
        offsets = [row["offset"] for row in got]
        assert offsets == sorted(set(offsets))
        assert all(row["size"] >= 0 for row in got)
    assert min(outcomes.values()) > 100


def test_little_of_a_tar_is_read(tmp_path):
    large = make_tar([(f"{n}.mp4", bytes(2_000_000)) for n in range(10)])
    storage.reset_counters()
    assert len(members(tmp_path, large)) == 10
    assert storage.counters()["bytes_read"] < 11 * (20 << 10)
    small = make_tar([(f"{n}.mp4", bytes(100)) for n in range(5000)])
    storage.reset_counters()
    assert len(members(tmp_path, small)) == 5000
    assert storage.counters()["requests"] < 15
    assert storage.counters()["bytes_read"] <= len(small)


# --- LeRobot ---


def make_lerobot(root: Path, version: str = "v3.0", **changes) -> Path:
    """Two cameras; episodes 0 to 2 in the first file, 3 in the second one of `top`, which also has a camera-less episode."""
    keys = ("observation.images.top", "wrist")
    info = {
        "codebase_version": version,
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": {**{key: {"dtype": "video"} for key in keys}, "action": {"dtype": "float32"}},
    } | changes
    places = {
        keys[0]: ([0, 0, 0, 0], [0, 0, 0, 1], [0.0, 2.5, 1.25, 0.0]),
        keys[1]: ([0, 0, 0, None], [0, 0, 0, None], [0.0, 1.25, 2.5, None]),
    }
    for part, chosen in enumerate(([0, 2, 1], [3])):
        table = {"episode_index": chosen, "tasks": [["lift"]] * len(chosen), "stats/action/max": [[1.0]] * len(chosen)}
        for key, (chunk, file, start) in places.items():
            for name, values in (("chunk_index", chunk), ("file_index", file), ("from_timestamp", start)):
                table[f"videos/{key}/{name}"] = [values[n] for n in chosen]
            table[f"videos/{key}/to_timestamp"] = [None if start[n] is None else start[n] + 1.25 for n in chosen]
        path = root / f"meta/episodes/chunk-000/file-{part:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
    (root / "meta/info.json").write_text(json.dumps(info))
    write(root, "videos/observation.images.top/chunk-000/file-000.mp4", "videos/wrist/chunk-000/file-000.mp4", "stray.mp4")
    return root


def test_lerobot_files_are_cut_where_episodes_begin(tmp_path):
    root = make_lerobot(tmp_path / "data")
    assert sources.detect(str(root), "auto") == "lerobot"
    got = [(row["uri"].removeprefix(f"{root}/videos/"), row["label"], row["size"], row["cuts"]) for row in rows(root)]
    top = "observation.images.top"
    assert got == [
        (f"{top}/chunk-000/file-000.mp4", top, 1, [1.25, 2.5]),
        (f"{top}/chunk-000/file-001.mp4", top, -1, []),
        ("wrist/chunk-000/file-000.mp4", "wrist", 2, [1.25, 2.5]),
    ]


@pytest.mark.parametrize("kind", ["auto", "lerobot"])
def test_older_lerobot_datasets_are_refused_with_the_way_out(tmp_path, kind):
    root = make_lerobot(tmp_path, "v2.1")
    with pytest.raises(InputRefused, match=r"version v2\.1.*convert_dataset_v21_to_v30.*kind=prefix"):
        sources.detect(str(root), kind)
    assert len(rows(root, "prefix")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {"x": {"dtype": "image"}}}, "no feature of dtype video"),
        ({"features": {"other": {"dtype": "video"}}}, "no column 'videos/other/chunk_index'"),
        ({"video_path": None}, "no template"),
        ({"video_path": "../{video_key}/{file_index:03d}.mp4"}, "no template"),
        ({"video_path": "{video_key.__class__}"}, "no template"),
        ({"video_path": "{chunk_index:0999999999d}.mp4"}, "no template"),
    ],
)
def test_broken_lerobot_metadata_is_refused(tmp_path, changes, message):
    with pytest.raises(InputRefused, match=message):
        rows(make_lerobot(tmp_path, **changes))


def test_lerobot_without_episodes_or_with_broken_ones_is_refused(tmp_path):
    root = make_lerobot(tmp_path)
    episodes = sorted((root / "meta/episodes/chunk-000").iterdir())
    episodes[0].write_bytes(b"no parquet")
    with pytest.raises(InputRefused, match=r"file-000\.parquet is not a readable Parquet file"):
        rows(root)
    for path in episodes:
        path.unlink()
    with pytest.raises(InputRefused, match="no episodes"):
        rows(root)


# --- the same from S3 ---


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_sources_in_s3_are_those_of_the_same_files_here(tmp_path, monkeypatch, rate):
    monkeypatch.setattr(storage_s3, "READ_TIMEOUT_S", 0.3)
    monkeypatch.setattr(storage_s3, "FIRST_WAIT_S", 0.01)
    make_lerobot(tmp_path / "robot")
    write(tmp_path / "raw", "a b.mp4", "ü/c.mp4", "cat/1.jpg")
    (tmp_path / "raw/s.tar").write_bytes(make_tar([("m.mp4", b"1" * 5000), ("m.cls", b"3"), ("n.mp4", b"2" * 70000)]))
    (tmp_path / "raw/l.csv").write_text("a b.mp4 1\nü/c.mp4 2\ngone.mp4 3\ns.tar 4\n")
    pq.write_table(pa.table({"uri": ["a b.mp4", "ü/c.mp4"]}), tmp_path / "raw/l.parquet")

    def everything(root: str) -> list[tuple]:
        found = []
        folders = [("raw", kind) for kind in ("prefix", "tars", "images")]
        asked = [*folders, ("raw/l.csv", "auto"), ("raw/l.parquet", "auto"), ("robot", "auto")]
        for name, kind in asked:
            for row in rows(f"{root}/{name}", kind, (".jpg",) if kind == "images" else VIDEO):
                inside = []
                if sources.is_tar(row["uri"]):
                    inside = sources.tar_members(row["uri"], row["size"], row["etag"], VIDEO).drop(["uri", "etag"]).to_pylist()
                told = {key: value for key, value in row.items() if key != "etag"} | {"uri": row["uri"].removeprefix(root)}
                found.append((name, told, inside, bool(row["etag"])))
        return sorted(found, key=str)

    here = everything(str(tmp_path))
    with FaultyS3(seed=3, rate=rate, stall_s=0.6) as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        server.load("bucket", tmp_path)
        assert everything("s3://bucket") == here
    assert len(here) == 3 + 1 + 1 + 4 + 2 + 3
