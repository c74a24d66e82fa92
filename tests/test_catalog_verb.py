"""jepa catalog: tables, differences, verification, lists and the contact sheet, on small local catalogs."""

import hashlib
import io
import json

import av
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from conftest import encode, make_frames
from PIL import Image

from pipelines import catalog, catalog_diff, catalog_verb, contact_sheet, packet_index, reference_list, storage
from pipelines.catalog_schema import QUARANTINE, QUARANTINE_SCHEMA, RUN_SCHEMA, RUNS, VIDEO_SCHEMA, VIDEOS, item_id
from pipelines.errors import InputRefused, UsageError
from pipelines.ingest_config import CatalogConfig
from pipelines.progress import Reporter
from pipelines.video import VideoRefused

NOW = 1_700_000_000_000_000


def video(uri, member="", etag="1", size=1000, **fields):
    row = {"id": item_id(uri, member, 0, size, etag), "uri": uri, "member": member, "offset": 0, "size": size, "etag": etag,
           "source": "/data", "digest": f"d-{uri}{member}", "content_digest": None, "container": "mp4", "codec": "h264",
           "width": 640, "height": 480, "fps": 30.0, "duration": 36.0, "num_frames": 1080, "keep": True, "status": "current",
           "run": "r"}  # fmt: skip
    return row | fields


def refusal(uri, reason, **fields):
    row = {"id": item_id(uri, "", 0, 0, ""), "uri": uri, "member": "", "offset": 0, "size": 0, "etag": "", "source": "/data",
           "reason": reason, "stage": "probe", "detail": f"about {uri}", "status": "current", "run": "r"}  # fmt: skip
    return row | fields


def append(uri, rows, name=VIDEOS, run="r1"):
    schema = {VIDEOS: VIDEO_SCHEMA, QUARANTINE: QUARANTINE_SCHEMA, RUNS: RUN_SCHEMA}[name]
    writer = catalog.Writer(catalog.parse_ref(str(uri)), run)
    writer.append(name, pa.Table.from_pylist(rows, schema))
    return catalog.pin(catalog.parse_ref(str(uri))).version


def change(uri, id, run="r2", **fields):
    changes = pa.Table.from_pylist([{"id": id, **fields}])
    catalog.Writer(catalog.parse_ref(str(uri)), run).update(VIDEOS, changes)
    return catalog.pin(catalog.parse_ref(str(uri))).version


def run(action, uri, **options):
    """(result, tables by title, other events) of one action."""
    stream = io.StringIO()
    result = catalog_verb.run(CatalogConfig(action=action, catalog=str(uri), **options), Reporter(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    tables = {event["title"]: event["rows"] for event in events if event["event"] == "table"}
    return result, tables, [event for event in events if event["event"] != "table"]


@pytest.fixture
def uri(tmp_path):
    return tmp_path / "c"


def test_show_counts_what_stands_and_names_the_last_runs(uri):
    append(uri, [refusal("/data/x", "empty"), refusal("/data/y", "empty"), refusal("/data/z", "crashed")], QUARANTINE)
    runs = [{"run": f"run{n}", "started": NOW + n, "finished": None if n == 6 else NOW + n + 9, "ingested": n} for n in range(7)]
    append(uri, runs, RUNS)
    version = append(uri, [video("/data/a.mp4"), video("/data/b.mp4", codec="av1", keep=False),
                           video("/data/c.mp4", status="replaced"), video("/data/d.mp4", status="vanished")])  # fmt: skip
    result, tables, _ = run("show", uri)
    assert result == {"catalog": f"{uri}@{version}", "current": 2, "kept": 1, "replaced": 1, "vanished": 1, "quarantined": 3,
                      "hours": 0.02, "kept_hours": 0.01, "bytes": 2000}  # fmt: skip
    assert tables["videos by codec"] == [{"codec": "av1", "videos": 1, "share": "50.0%"},
                                         {"codec": "h264", "videos": 1, "share": "50.0%"}]  # fmt: skip
    assert tables["refused items by reason"][0] == {"reason": "empty", "refused items": 2, "share": "66.7%"}
    assert {f"videos by {name}" for name in ("container", "resolution", "fps", "duration")} <= tables.keys()
    assert [row["run"] for row in tables["last runs"]] == ["run6", "run5", "run4", "run3", "run2"]
    assert (tables["last runs"][0]["finished"], tables["last runs"][1]["finished"]) == ("", "2023-11-14T22:13:20+00:00")


def test_show_of_an_old_version_shows_the_quarantine_of_that_time(uri):
    append(uri, [refusal("/data/x", "empty")], QUARANTINE)
    old = append(uri, [video("/data/a.mp4")])
    append(uri, [refusal("/data/y", "crashed")], QUARANTINE)
    append(uri, [video("/data/b.mp4")])
    result, _, _ = run("show", f"{uri}@{old}")
    assert (result["current"], result["quarantined"]) == (1, 1)
    result, _, _ = run("show", uri)
    assert (result["current"], result["quarantined"]) == (2, 2)


def test_a_missing_catalog_is_refused(tmp_path):
    for action in ("show", "history", "quarantine"):
        with pytest.raises(InputRefused, match="holds no catalog"):
            run(action, tmp_path / "none")


def test_history_names_run_operation_and_rows(uri):
    rows = [video("/data/a.mp4"), video("/data/b.mp4")]
    append(uri, rows, run="first")
    last = change(uri, rows[0]["id"], run="second", status="vanished")
    _, tables, _ = run("history", uri)
    newest, added, created = tables["versions"]
    assert (newest["version"], newest["run"], newest["rows changed"]) == (last, "second", 1)
    assert newest["operation"] == "update"
    assert (added["version"], added["run"], added["rows added"], added["operation"]) == (last - 1, "first", 2, "append")
    assert (created["version"], created["rows added"]) == (0, 0)
    result, tables, _ = run("history", uri, count=1)
    assert result["versions"] == len(tables["versions"]) == 1
    result, _, _ = run("history", f"{uri}@{last - 1}")
    assert result["versions"] == 2


def test_diff_tells_added_removed_changed_and_decisions(uri):
    old_a = video("/data/a.mp4")
    others = [video("/data/gone.mp4"), video("/data/same.mp4"), video("/data/drop.mp4"), video("/data/keep.mp4", keep=False)]
    before = append(uri, [old_a, *others])
    change(uri, old_a["id"], status="replaced")
    change(uri, others[0]["id"], status="vanished")
    change(uri, others[2]["id"], keep=False)
    change(uri, others[3]["id"], keep=True)
    new_a = video("/data/a.mp4", etag="2", size=1001)
    after = append(uri, [new_a, video("/data/t.tar", member="m.mp4"), video("/data/t.tar", member="n.mp4")])
    result, tables, _ = run("diff", f"{uri}@{before}", other=f"{uri}@{after}")
    assert {key: result[key] for key in ("added", "removed", "changed", "kept", "dropped", "same")} == {
        "added": 2, "removed": 1, "changed": 1, "kept": 1, "dropped": 1, "same": 1}  # fmt: skip
    changed = {"id": new_a["id"], "uri": "/data/a.mp4", "member": "", "size": 1001, "etag": "2", "before": old_a["id"]}
    assert tables["changed: 1 of 1"] == [changed]
    assert [row["uri"] for row in tables["removed: 1 of 1"]] == ["/data/gone.mp4"]
    assert {row["member"] for row in tables["added: 2 of 2"]} == {"m.mp4", "n.mp4"}
    assert [row["uri"] for row in tables["dropped: 1 of 1"]] == ["/data/drop.mp4"]
    assert [row["uri"] for row in tables["kept: 1 of 1"]] == ["/data/keep.mp4"]
    back, tables, _ = run("diff", f"{uri}@{after}", other=f"{uri}@{before}")
    assert (back["added"], back["removed"], back["changed"]) == (1, 2, 1)
    assert tables["changed: 1 of 1"][0]["before"] == new_a["id"]


def test_diff_of_a_version_with_itself_and_after_compaction_is_empty(uri):
    first = append(uri, [video(f"/data/{n}.mp4") for n in range(5)])
    before = append(uri, [video(f"/data/{n}.mp4") for n in range(5, 9)])
    run("compact", uri)
    result, tables, _ = run("diff", f"{uri}@{before}", other=str(uri))
    assert result["after"] != result["before"]
    assert [result[key] for key in ("added", "removed", "changed", "kept", "dropped", "same")] == [0, 0, 0, 0, 0, 9]
    assert not tables
    assert run("diff", f"{uri}@{first}", other=str(uri))[0]["added"] == 4


def test_diff_equals_a_plain_comparison_of_random_catalogs(uri, tmp_path):
    rng = np.random.default_rng(0)
    tables = []
    for name in ("one", "two"):
        states = rng.integers(0, 5, 1200)  # absent, gone, etag 1 kept, etag 1 dropped, etag 2
        rows = [video(f"/data/{n}.mp4", etag="2" if state == 4 else "1", keep=bool(state != 3),
                      status="vanished" if state == 1 else "current") for n, state in enumerate(states) if state]  # fmt: skip
        append(tmp_path / name, [rows[n] for n in rng.permutation(len(rows))])
        tables.append({row["uri"]: (row["id"], row["keep"]) for row in rows if row["status"] == "current"})
    found = catalog_diff.diff(*(catalog.parse_ref(str(tmp_path / name)) for name in ("one", "two")))
    old, new = tables
    both = old.keys() & new.keys()
    changed = {uri for uri in both if old[uri][0] != new[uri][0]}
    turned = {uri for uri in both - changed if old[uri] != new[uri]}
    assert found.counts == {
        "added": len(new.keys() - old.keys()), "removed": len(old.keys() - new.keys()), "changed": len(changed),
        "kept": sum(new[uri][1] for uri in turned), "dropped": sum(old[uri][1] for uri in turned),
        "same": len(both - changed - turned)}  # fmt: skip
    assert all(count > catalog_diff.SHOWN for count in found.counts.values())
    added = sorted(new[uri][0] for uri in new.keys() - old.keys())
    assert [row["id"] for row in found.examples["added"]] == added[: catalog_diff.SHOWN]
    assert all((old[row["uri"]][0], new[row["uri"]][0]) == (row["before"], row["id"]) for row in found.examples["changed"])
    assert len(found.examples["changed"]) == catalog_diff.SHOWN


def test_diff_needs_a_second_version(uri):
    append(uri, [video("/data/a.mp4")])
    with pytest.raises(UsageError, match="diff compares two"):
        run("diff", uri)


def verify(uri, reprobe, count=0, seed=0):
    stream = io.StringIO()
    try:
        return catalog_verb.verify(catalog.parse_ref(str(uri)), count, seed, reprobe, Reporter(stream)), stream.getvalue()
    except InputRefused as error:
        return error, stream.getvalue()


def test_verify_tells_equal_different_and_gone(uri):
    append(uri, [video(f"/data/{name}", content_digest="c") for name in ("same", "stream", "bytes", "gone", "lost", "bad", "new")]
           + [video("/data/old", status="replaced")])  # fmt: skip

    def reprobe(row):
        name = row["uri"].rpartition("/")[2]
        if name == "gone":
            raise InputRefused("/data/gone does not exist: check the path")
        if name == "new":
            raise storage.ObjectChanged("/data/new was replaced by other bytes since it was listed")
        if name in ("lost", "bad"):
            raise VideoRefused({"lost": "missing", "bad": "undecodable"}[name], "told by the reader")
        return "other" if name == "stream" else row["digest"], "other" if name == "bytes" else row["content_digest"]

    error, text = verify(uri, reprobe)
    assert "4 videos differ and 2 are gone, 1 are equal" in str(error)
    (table,) = [json.loads(line) for line in text.splitlines() if "not as the catalog says" in line]
    verdicts = {row["uri"].rpartition("/")[2]: row["verdict"] for row in table["rows"]}
    differs, gone = dict.fromkeys(("stream", "bytes", "bad", "new"), "differs"), dict.fromkeys(("gone", "lost"), "gone")
    assert verdicts == differs | gone


def test_verify_compares_the_bytes_only_where_both_know_them(uri):
    append(uri, [video("/data/a", content_digest=None), video("/data/b", content_digest="c")])
    result, _ = verify(uri, lambda row: (row["digest"], "new" if row["uri"] == "/data/a" else None))
    assert (result["equal"], result["differs"], result["gone"]) == (2, 0, 0)


def test_verify_reads_a_seeded_sample(uri):
    append(uri, [video(f"/data/{n}.mp4") for n in range(50)])

    def read(count, seed):
        seen = []
        result, _ = verify(uri, lambda row: (seen.append(row["uri"]) or row["digest"], None), count, seed)
        assert result["equal"] == len(seen)
        return set(seen)

    assert len(read(10, 0)) == 10
    assert read(10, 0) == read(10, 0) != read(10, 1)
    assert read(10, 0) < read(20, 0)
    assert len(read(0, 0)) == len(read(80, 0)) == 50


def test_quarantine_gives_an_example_of_each_reason_and_a_list(uri, tmp_path):
    rows = [refusal(f"/data/{n}", "empty") for n in range(5)] + [refusal("/data/b", "crashed", detail='a, "b"\nc')]
    append(uri, [*rows, refusal("/data/was", "empty", status="vanished")], QUARANTINE)
    version = append(uri, [video("/data/a.mp4")])
    append(uri, [refusal("/data/later", "crashed")], QUARANTINE)
    assert run("quarantine", uri)[0]["quarantined"] == 7
    uri = f"{uri}@{version}"
    result, tables, _ = run("quarantine", uri)
    assert result["quarantined"] == 6
    empty, crashed = tables["refused items"]
    assert (empty["reason"], empty["count"], crashed["reason"], crashed["count"]) == ("empty", 5, "crashed", 1)
    assert empty["detail"] == f"about {empty['example']}"
    run("quarantine", uri, out=str(tmp_path / "q.csv"))
    listed = pa.csv.read_csv(tmp_path / "q.csv", parse_options=pa.csv.ParseOptions(newlines_in_values=True)).to_pylist()
    assert {(row["uri"], row["reason"], row["detail"]) for row in listed} == {(r["uri"], r["reason"], r["detail"]) for r in rows}
    run("quarantine", uri, out=str(tmp_path / "q.list"), format="parquet")
    assert pq.read_table(tmp_path / "q.list").schema.equals(QUARANTINE_SCHEMA)
    with pytest.raises(UsageError, match=r"neither in \.csv nor"):
        run("quarantine", uri, out=str(tmp_path / "q.txt"))
    assert not (tmp_path / "q.txt").exists()


def reference_reads(path):
    """What vjepa2's loader makes of a list (src/datasets/video_dataset.py)."""
    try:
        data = pandas.read_csv(path, header=None, delimiter=" ")
    except pandas.errors.ParserError:
        data = pandas.read_csv(path, header=None, delimiter="::", engine="python")
    return list(data.values[:, 0]), list(data.values[:, 1])


@pytest.mark.parametrize("space", [False, True])
def test_the_exported_list_reads_as_the_reference_reads_it(uri, tmp_path, space):
    last = "/data/z y.mp4" if space else "/data/z.mp4"
    rows = [video("/data/b.mp4", label="7"), video("/data/a.mp4"), video("s3://bucket/c.mp4", label=""), video(last, label="3")]
    skipped = [video("/data/t.tar", member="m.mp4"), video('/data/q"uote.mp4'), video("/data/new\nline.mp4")]
    unread = [video("/data/old.mp4", status="replaced"), video("/data/dropped.mp4", keep=False)]
    append(uri, [*rows, *skipped, *unread, *([video("/data/colons::and space")] if space else [])])
    result, _, events = run("export", uri, out=str(tmp_path / "list.csv"))
    assert reference_reads(tmp_path / "list.csv") == (["/data/a.mp4", "/data/b.mp4", last, "s3://bucket/c.mp4"], [0, 7, 3, 0])
    assert result == {"catalog": f"{uri}@1", "videos": 4, "skipped": 4 if space else 3, "out": str(tmp_path / "list.csv")}
    assert not events


def test_the_line_with_the_fewest_spaces_comes_first_and_equal_spaces_are_warned_of(uri, tmp_path):
    append(uri, [video("/data/a b c.mp4"), video("/data/d e.mp4"), video("/data/f g h.mp4")])
    out = tmp_path / "list.csv"
    assert not run("export", uri, out=str(out))[2]
    assert reference_reads(out) == (["/data/d e.mp4", "/data/a b c.mp4", "/data/f g h.mp4"], [0, 0, 0])
    append(tmp_path / "one", [video("/data/d e.mp4")])
    events = run("export", tmp_path / "one", out=str(out))[2]
    assert "cuts them at a space" in events[0]["message"]
    assert out.read_text() == "/data/d e.mp4::0\n"


def test_a_list_of_nothing_is_an_empty_file(tmp_path):
    empty = VIDEO_SCHEMA.empty_table().select(reference_list.COLUMNS)
    counts = reference_list.write(empty, tmp_path / "list.csv")
    assert counts == {"videos": 0, "skipped": 0, "ambiguous": False}
    assert (tmp_path / "list.csv").read_bytes() == b""


def test_export_to_parquet_takes_all_columns_of_what_training_reads(uri, tmp_path):
    rows = [video("/data/b.mp4", hashes=[1, 2]), video("/data/t.tar", member="m.mp4", extradata=b"\x01")]
    append(uri, [*rows, video("/data/dropped.mp4", keep=False), video("/data/old.mp4", status="vanished")])
    result, _, _ = run("export", uri, out=str(tmp_path / "list.parquet"))
    found = pq.read_table(tmp_path / "list.parquet")
    assert result["videos"] == 2
    assert found.sort_by("uri").equals(pa.Table.from_pylist(rows, VIDEO_SCHEMA).sort_by("uri"))


def test_choose_is_uniform_and_does_not_hang_on_the_order_of_rows(tmp_path):
    rows = [video(f"/data/{n}.mp4", keep=n % 4 != 0) for n in range(400)]
    append(tmp_path / "one", rows)
    append(tmp_path / "two", rows[250:][::-1])
    append(tmp_path / "two", rows[:250])
    one, two = (catalog.parse_ref(str(tmp_path / name)) for name in ("one", "two"))
    ids = [row["id"] for row in rows]
    times = np.zeros(len(rows))
    for seed in range(100):
        chosen = catalog_verb.choose(one, 60, seed, catalog_verb.KEPT)
        assert chosen[:7] == catalog_verb.choose(one, 7, seed, catalog_verb.KEPT)
        assert len(set(chosen)) == 60
        times[[ids.index(id) for id in chosen]] += 1
    assert catalog_verb.choose(two, 60, 3, catalog_verb.KEPT) == catalog_verb.choose(one, 60, 3, catalog_verb.KEPT)
    kept = times[[row["keep"] for row in rows]]
    assert times.sum() == kept.sum()  # no dropped video
    # Each of 300 is drawn 100 times with p = 0.2: 20 +- 4.
    assert 3.2 < kept.std() < 4.8
    assert (kept.min(), kept.max()) > (5, 5)
    assert kept.max() < 36


def stored_video(folder, name, data, **fields):
    """A row about real bytes with its packet index in a pack."""
    (folder / name).write_bytes(data)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        number, packets = stream.index, [packet for packet in container.demux(stream) if packet.size]
    index = packet_index.PacketIndex(
        pts=np.array([packet.pts for packet in packets]), pos=np.array([packet.pos for packet in packets]),
        size=np.array([packet.size for packet in packets], dtype=np.int32),
        key=np.array([packet.is_keyframe for packet in packets]),
        hidden=np.zeros(len(packets), dtype=bool))  # fmt: skip
    blob, directory = packet_index.encode(index)
    pack = f"{hashlib.sha256(blob).hexdigest()[:16]}.pack"
    storage.write_bytes(str(folder / "c" / "index" / pack), blob)
    info = next(info for info in storage.list_files(str(folder)) if info.uri.endswith(f"/{name}"))
    return video(info.uri, size=info.size, etag=info.etag, stream=number, width=96, height=64, duration=2.0,
                 index_pack=pack, index_offset=0, index_size=len(blob), index_directory=directory, **fields)  # fmt: skip


def test_the_contact_sheet_shows_four_frames_of_each_video_and_says_what_fails(tmp_path):
    frames = make_frames(60)
    good = stored_video(tmp_path, "good.mp4", encode(frames))
    bad = stored_video(tmp_path, "bad.mp4", encode(make_frames(60, seed=1)))
    whole = (tmp_path / "bad.mp4").read_bytes()
    start = whole.index(b"mdat") + 8
    (tmp_path / "bad.mp4").write_bytes(whole[:start] + bytes(2000) + whole[start + 2000 :])
    bad |= {"etag": next(info.etag for info in storage.list_files(str(tmp_path)) if info.uri.endswith("bad.mp4"))}
    append(tmp_path / "c", [good, bad, video("/data/dropped.mp4", keep=False)])
    result, _, _ = run("sample", tmp_path / "c", out=str(tmp_path / "sheet.png"), count=5)
    assert (result["videos"], result["undecodable"]) == (2, 1)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    m, (w, h), side = contact_sheet.MARGIN, contact_sheet.TILE, contact_sheet.SIDE
    assert sheet.shape == (2 * m + h, 3 * m + 2 * w, 3)
    order = catalog_verb.choose(catalog.parse_ref(str(tmp_path / "c")), 5, 0, catalog_verb.KEPT)
    tiles = {id: sheet[m : m + h, m + n * (w + m) :][:, :w] for n, id in enumerate(order)}
    band = slice((side - 107) // 2, (side - 107) // 2 + 107)  # 160 x 107: 96 x 64 scaled to a width of 160
    for place, wanted in enumerate((7, 22, 36, 51)):  # of frames 0 to 59 at 1/8, 3/8, 5/8, 7/8
        shown = tiles[good["id"]][:side, place * side : (place + 1) * side]
        scores = [np.abs(np.asarray(Image.fromarray(f).resize((160, 107))).astype(int) - shown[band]).mean() for f in frames]
        assert int(np.argmin(scores)) == wanted
        assert min(scores) < np.sort(scores)[1] / 2  # the next best frame is far off
    assert (tiles[bad["id"]][:side] == contact_sheet.TROUBLE).all(axis=2).sum() > 50  # the reason, in letters
    assert (tiles[good["id"]][:side] == contact_sheet.TROUBLE).all(axis=2).sum() == 0


def test_the_times_on_the_sheet_are_those_on_screen():
    assert contact_sheet.frame_times(np.array([5])).tolist() == [5] * 4
    assert contact_sheet.frame_times(np.array([0, 100, 110, 800])).tolist() == [100, 110, 110, 110]


def test_sample_needs_a_place_and_a_video(uri, tmp_path):
    append(uri, [video("/data/a.mp4", keep=False)])
    with pytest.raises(UsageError, match="out="):
        run("sample", uri)
    with pytest.raises(InputRefused, match="no video that training would read"):
        run("sample", uri, out=str(tmp_path / "sheet.png"))


def test_compact_and_vacuum_keep_the_newest_version(uri):
    for n in range(4):
        append(uri, [video(f"/data/{n}.mp4", index_pack="p.pack")])
    assert run("compact", uri)[0]["files_removed"] >= 4
    preview, _, _ = run("vacuum", uri, retention_hours=0, dry_run=True)
    done, _, _ = run("vacuum", uri, retention_hours=0)
    assert preview[VIDEOS] == done[VIDEOS] >= 4
    assert run("show", uri)[0]["current"] == 4
