"""The catalog's commits: atomic, compared and swapped, pinned; two writers at once never mix; compaction and vacuum."""

import subprocess
import sys
import time

import deltalake
import numpy as np
import pyarrow as pa
import pytest

from pipelines import catalog, item_ids, packet_index, storage
from pipelines.catalog_schema import (
    CURRENT,
    PACKS,
    QUARANTINE,
    QUARANTINE_SCHEMA,
    RUN_SCHEMA,
    RUNS,
    VANISHED,
    VIDEO_SCHEMA,
    VIDEOS,
    item_id,
)
from pipelines.errors import InputRefused, UsageError


def rows(schema: pa.Schema, names: list[str], **values) -> pa.Table:
    """Catalog rows that differ in their URI and id."""
    base = {"member": "", "offset": 0, "size": 1, "etag": "e", "source": "/s", "status": CURRENT, "run": "r", "keep": True}
    made = [base | {"uri": name, "id": item_id(name, "", 0, 1, "e")} | values for name in names]
    return pa.Table.from_pylist([{key: row.get(key) for key in schema.names} for row in made], schema)


@pytest.fixture
def ref(tmp_path):
    return catalog.parse_ref(str(tmp_path / "cat"))


def uris(ref, name=VIDEOS):
    return sorted(catalog.read(ref, name, ("uri",))["uri"].to_pylist())


def test_a_version_is_pinned_with_its_quarantine(ref):
    writer = catalog.Writer(ref, "one")
    writer.append(QUARANTINE, rows(QUARANTINE_SCHEMA, ["bad1"], reason="empty"))
    writer.append(VIDEOS, rows(VIDEO_SCHEMA, ["a"]))
    pinned = catalog.pin(ref)
    writer.append(QUARANTINE, rows(QUARANTINE_SCHEMA, ["bad2"], reason="empty"))
    writer.append(VIDEOS, rows(VIDEO_SCHEMA, ["b"]))
    assert (uris(pinned), uris(pinned, QUARANTINE)) == (["a"], ["bad1"])
    assert (uris(ref), uris(ref, QUARANTINE)) == (["a", "b"], ["bad1", "bad2"])
    assert catalog.pin(ref).version == pinned.version + 1
    with pytest.raises(UsageError, match="no such version"):
        catalog.pin(ref._replace(version=99))


def test_a_missing_catalog_is_refused(tmp_path):
    with pytest.raises(InputRefused, match="holds no catalog"):
        catalog.pin(catalog.parse_ref(str(tmp_path / "nothing")))


def test_the_same_rows_from_two_runs_stand_once(ref):
    one, two = catalog.Writer(ref, "one"), catalog.Writer(ref, "two")
    for writer in (one, two):
        writer.seen(VIDEOS)
    assert one.append(VIDEOS, rows(VIDEO_SCHEMA, ["a", "b"], run="one")) == 2
    assert two.append(VIDEOS, rows(VIDEO_SCHEMA, ["b", "c"], run="two")) == 1
    assert one.append(VIDEOS, rows(VIDEO_SCHEMA, ["c", "d"], run="one")) == 1
    assert uris(ref) == ["a", "b", "c", "d"]


def test_a_commit_from_an_overtaken_version_conflicts_and_is_made_again(ref, monkeypatch):
    """Another run commits between the moment a writer opens the table and the moment it writes."""
    writer, other = catalog.Writer(ref, "one"), catalog.Writer(ref, "two")
    opened, real = [], catalog._open

    def open_and_overtake(uri, name, version):
        table = real(uri, name, version)
        if name == VIDEOS and not opened:
            opened.append(table)
            other.append(VIDEOS, rows(VIDEO_SCHEMA, ["a"], run="two"))
        return table

    writer.seen(VIDEOS)
    monkeypatch.setattr(catalog, "_open", open_and_overtake)
    assert writer.append(VIDEOS, rows(VIDEO_SCHEMA, ["a", "b"], run="one")) == 1
    table = catalog.read(ref, VIDEOS, ("uri", "run")).sort_by("uri").to_pylist()
    assert table == [{"uri": "a", "run": "two"}, {"uri": "b", "run": "one"}]


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from pipelines import catalog
from pipelines.catalog_schema import VIDEO_SCHEMA, VIDEOS
from test_catalog import rows
writer = catalog.Writer(catalog.parse_ref(sys.argv[1]), sys.argv[2])
for k in range(12):
    writer.append(VIDEOS, rows(VIDEO_SCHEMA, [f"{k}-{j}" for j in range(20)], run=sys.argv[2]))
"""


def test_three_processes_that_write_the_same_rows_at_once_write_each_once(ref, request):
    here = str(request.path.parent)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, ref.uri, f"run{n}", here]) for n in range(3)]
    assert [writer.wait(timeout=600) for writer in writers] == [0, 0, 0]
    found = uris(ref)
    assert len(found) == len(set(found)) == 240


def test_updates_change_only_the_rows_they_name(ref):
    writer = catalog.Writer(ref, "one")
    writer.append(VIDEOS, rows(VIDEO_SCHEMA, ["a", "b"], cuts=[1, 2], extradata=b"\0\1"))
    name = item_id("a", "", 0, 1, "e")
    writer.update(VIDEOS, pa.table({"id": [name], "status": [VANISHED], "status_run": ["two"]}))
    table = catalog.read(ref, VIDEOS).sort_by("uri").to_pylist()
    assert [(row["uri"], row["status"], row["status_run"]) for row in table] == [("a", VANISHED, "two"), ("b", CURRENT, None)]
    assert table[0]["cuts"] == [1, 2]
    assert table[0]["extradata"] == b"\0\1"
    assert catalog.read_videos(ref)["uri"].to_pylist() == ["b"]
    writer.append(RUNS, rows(RUN_SCHEMA, ["x"], run="one"))
    writer.update(RUNS, pa.table({"run": ["one"], "listed": [7]}))
    assert catalog.read(ref, RUNS)["listed"].to_pylist() == [7]


def test_compaction_keeps_rows_and_old_versions_and_vacuum_removes_what_nobody_names(ref):
    writer = catalog.Writer(ref, "one")
    name, data, _ = packet_index.write_pack([b"abc"])
    storage.write_bytes(catalog.pack_uri(ref, name), data)
    storage.write_bytes(catalog.pack_uri(ref, "0" * 32 + ".pack"), b"left by a killed task")
    for k in range(6):
        writer.append(VIDEOS, rows(VIDEO_SCHEMA, [f"v{k}"], index_pack=name))
    before = catalog.pin(ref)
    writer.append(QUARANTINE, rows(QUARANTINE_SCHEMA, ["bad"], reason="empty"))
    writer.append(VIDEOS, rows(VIDEO_SCHEMA, ["last"], index_pack=name))
    counts = catalog.compact(ref)
    assert counts["files_removed"] >= 7 > counts["files_added"]
    assert uris(ref) == sorted([*(f"v{k}" for k in range(6)), "last"])
    assert len(uris(before)) == 6
    assert uris(catalog.pin(ref), QUARANTINE) == ["bad"], "a compacted version knows its quarantine"
    assert catalog.vacuum(ref, 1.0)[PACKS] == 0, "younger than the retention"
    assert catalog.vacuum(ref, 0.0, dry_run=True)[PACKS] == 1
    assert storage.exists(catalog.pack_uri(ref, "0" * 32 + ".pack"))
    counts = catalog.vacuum(ref, 0.0)
    assert (counts[PACKS], counts[VIDEOS] > 0) == (1, True)
    assert storage.exists(catalog.pack_uri(ref, name))
    assert uris(ref) == sorted([*(f"v{k}" for k in range(6)), "last"])


def test_vacuum_keeps_the_pack_that_a_version_within_the_retention_names(ref, monkeypatch):
    """An item that is read again gets another pack; a training run that has pinned the version before still needs the old one."""
    writer = catalog.Writer(ref, "one")
    old, new = (f"{digit * 32}.pack" for digit in "12")
    storage.write_bytes(catalog.pack_uri(ref, old), b"old")
    writer.append(VIDEOS, rows(VIDEO_SCHEMA, ["a"], index_pack=old))
    time.sleep(0.5)
    between = time.time()
    time.sleep(0.5)
    storage.write_bytes(catalog.pack_uri(ref, new), b"new")
    writer.update(VIDEOS, pa.table({"id": [item_id("a", "", 0, 1, "e")], "index_pack": [new]}))
    monkeypatch.setattr(catalog.time, "time", lambda: between + 5 * 3600)
    assert catalog.vacuum(ref, 5.0, dry_run=True)[PACKS] == 0, "five hours ago the old pack was in use"
    monkeypatch.setattr(catalog.time, "time", lambda: between + 6 * 3600)
    assert catalog.vacuum(ref, 5.0)[PACKS] == 1
    assert (storage.exists(catalog.pack_uri(ref, old)), storage.exists(catalog.pack_uri(ref, new))) == (False, True)


def test_a_writer_carries_on_over_a_compaction(ref):
    writer = catalog.Writer(ref, "one")
    for name in ("a", "b"):
        writer.append(VIDEOS, rows(VIDEO_SCHEMA, [name]))
    before = catalog.pin(ref).version
    catalog.compact(ref)
    assert catalog.pin(ref).version == before + 1
    assert writer.append(VIDEOS, rows(VIDEO_SCHEMA, ["b", "c"])) == 1
    assert uris(ref) == ["a", "b", "c"]


def test_the_commit_says_who_made_it(ref):
    catalog.Writer(ref, "window-7").append(VIDEOS, rows(VIDEO_SCHEMA, ["a"]))
    assert deltalake.DeltaTable(f"{ref.uri}/{VIDEOS}").history(1)[0][catalog.RUN] == "window-7"


def test_a_column_of_ids_holds_the_id_of_every_row():
    places = [("s3://b/\u00e9.mp4", "", 0, 1, "e"), ("s3://b/x.tar", "a/b.mp4", 1 << 40, 3, "f-2"), ("/gone", "", 0, -1, "")]
    columns = dict(zip(("uri", "member", "offset", "size", "etag"), zip(*places, strict=True), strict=True))
    table = pa.table({name: list(column) for name, column in columns.items()})
    assert item_ids.item_ids(table).to_pylist() == [item_id(*place) for place in places]
    assert item_ids.text(item_ids.item_numbers(pa.concat_tables([table, table]))[3:]) == [item_id(*place) for place in places]
    assert len(item_ids.item_ids(table.slice(0, 0))) == 0


def test_id_sets_find_what_they_hold():
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**64, (5000, 2), dtype=np.uint64)
    numbers[100:200, 0] = numbers[0, 0]  # equal first words
    ids = item_ids.IdSet(numbers)
    order = rng.permutation(5000)
    np.testing.assert_array_equal(ids.positions(numbers[order]), order)
    absent = numbers.copy()
    absent[:, 1] ^= np.uint64(1)
    assert (ids.positions(absent) == -1).all()
    assert (item_ids.IdSet(numbers[:0]).positions(numbers) == -1).all()
    twice = np.concatenate([numbers, numbers[::-1]])
    np.testing.assert_array_equal(item_ids.IdSet(twice).positions(numbers), np.arange(5000))
    least, most = np.zeros((1, 2), np.uint64), np.full((1, 2), 2**64 - 1, np.uint64)
    assert item_ids.IdSet(np.concatenate([most, least])).positions(np.concatenate([least, most])).tolist() == [1, 0]
    text = item_ids.text(numbers[:3])
    assert text == [item.lower() for item in text]
    np.testing.assert_array_equal(item_ids.words(pa.array(text)), numbers[:3])
    np.testing.assert_array_equal(item_ids.words(pa.chunked_array([text[:1], text[1:]])), numbers[:3])
    with pytest.raises(ValueError, match="32 hex digits"):
        item_ids.words(pa.array(["ab"]))
    with pytest.raises(ValueError, match="lower-case hex"):
        item_ids.words(pa.array(["G" * 32]))
