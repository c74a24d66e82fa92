"""Labelled lists: every published form, matching to a catalog, splits that leak nothing, and what is refused by name."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import label_lists, label_match
from pipelines.errors import InputRefused
from pipelines.label_lists import Label

SSV2 = [{"id": "78687", "label": "holding potato next to vicks", "template": "Holding [something] next to [something]"}]
COIN = {"database": {"abc": {"class": "PutOnHair", "subset": "training", "start": 4.0, "end": 20.5}}}
KINETICS = "label,youtube_id,time_start,time_end,split,is_cc\ntesting apple,-3B32lodo2M,59,69,train,0\n"


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"path": ["a/x.mp4"], "label": [3], "split": ["val"], "start": [1.5], "stop": [2.5]}), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "row"),
    [
        ("k400.csv", "/data/abseiling/x.mp4 0\n", Label("/data/abseiling/x.mp4", "0")),
        ("spaces.txt", "/data/ice skating/x.mp4::7\n", Label("/data/ice skating/x.mp4", "7")),
        ("train.csv", KINETICS, Label("-3B32lodo2M_000059_000069", "testing apple", "train", group="-3B32lodo2M")),
        ("ssv2.json", json.dumps(SSV2), Label("78687", "Holding something next to something")),
        ("d48.json", json.dumps([{"vid_name": "_8Vy", "label": 26, "start_frame": 0}]), Label("_8Vy", "26")),
        ("jester.csv", "34870;Drumming Fingers\n", Label("34870", "Drumming Fingers")),
        ("COIN.json", json.dumps(COIN), Label("abc", "PutOnHair", "train", 4.0, 20.5)),
        ("t.csv", "\ufeffpath,label,split,group\na/x.mp4,cat,dev,g1\n", Label("a/x.mp4", "cat", "validation", group="g1")),
        ("t.tsv", "video\tlabel\nx y.mp4\tcat\n", Label("x y.mp4", "cat")),
        ("t.jsonl", '{"path": "x.mp4", "label": 2, "stop": 3}\n', Label("x.mp4", "2", None, None, 3.0)),
        ("t.parquet", parquet(), Label("a/x.mp4", "3", "validation", 1.5, 2.5)),
    ],
)
def test_every_published_form_is_recognised(name, data, row):
    data = data if isinstance(data, bytes) else data.encode()
    assert label_lists.parse(data, name) == [row]
    given = label_lists.parse(data, name, split="test")[0]
    assert given.split == (row.split or "test"), "a split of the list's own holds"


def test_kinetics_archives_and_folders():
    entry = {"annotations": {"label": "archery", "segment": [3.0, 13.0]}, "subset": "validate"}
    found = label_lists.parse(json.dumps({"abc": entry}).encode(), "k700.json")
    assert found == [Label("abc_000003_000013", "archery", "validation", group="abc")]
    rows = label_lists.from_folders(["/in1k/train/n01/a.jpg", "/in1k/val/n02/b.jpg", "/mine/cats/c.mp4"])
    assert [(row.label, row.split) for row in rows] == [("n01", "train"), ("n02", "validation"), ("cats", None)]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.csv", "x.mp4 cat\n", ["line 1", "x.mp4 cat"]),
        ("a.csv", "path,label\nx.mp4,\n", ["row 1", "no label"]),
        ("a.csv", "path,label\nx.mp4,cat,more\n", ["line 2", "cells"]),
        ("a.csv", "path,label,split\nx.mp4,cat,holdout\n", ["row 1", "holdout"]),
        ("a.csv", "path,label,start,stop\nx.mp4,cat,5,5\n", ["x.mp4", "5 s"]),
        ("a.csv", "path,label,start\nx.mp4,cat,soon\n", ["row 1", "soon"]),
        ("a.json", "[{", ["no JSON"]),
        ("a.json", '[{"id": "7"}]', ["entry 1", "test list"]),
        ("a.json", '{"database": {"v": {"subset": "training"}}}', ["v is no entry"]),
        ("a.csv", "", ["no labelled row"]),
        ("a.csv", b"\xff\xfe 0", ["UTF-8"]),
        ("a.parquet", b"PAR1 not", ["Parquet"]),
        ("a.jsonl", '{"path": "x"', ["no JSON"]),
        ("k.csv", "label,youtube_id,time_start,time_end\na,b,soon,9\n", ["line 2"]),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_with_the_row(name, data, words):
    with pytest.raises(InputRefused) as refusal:
        label_lists.parse(data if isinstance(data, bytes) else data.encode(), name)
    assert all(word in str(refusal.value) for word in [name, *words]), refusal.value


def test_classes_come_in_the_order_of_their_list():
    found = label_lists.class_names(b'{"Moving [something] up": "1", "Approaching [something]": "0"}', "labels.json")
    assert found == ["Approaching something", "Moving something up"]
    assert label_lists.class_names(b"b\na\n", "labels.csv") == ["b", "a"]
    assert label_lists.class_names(b'[["Back", "15som"], ["Forward", "PIKE"]]', "vocab.json") == ["Back 15som", "Forward PIKE"]


def video(path: str, content: str | None = None) -> dict:
    return {
        "id": f"id-{path}",
        "uri": path,
        "member": "",
        "digest": f"stream-{path}",
        "content_digest": content or f"bytes-{path}",
    }


def listed(per_class: int, classes: str = "ab", split: str | None = None) -> tuple[list[Label], list[dict]]:
    rows = [Label(f"{label}/{number}{split or ''}.mp4", label, split) for label in classes for number in range(per_class)]
    return rows, [video(f"/videos/{row.name}") for row in rows]


def test_a_name_means_the_video_that_shares_most_of_its_path():
    videos = [video("/v/train/x.mp4"), video("/v/val/x.mp4"), video("/v/train/y.webm"), video("/v/z.1.mp4")]
    rows = [Label("/elsewhere/val/x.mp4", "0"), Label("y", "0"), Label("old/y.mp4", "0"), Label("z.1", "0"), Label("nobody", "0")]
    found, missing = label_match.match(rows, videos, 0.5, "list")
    assert [entry["uri"] for _, entry in found] == ["/v/val/x.mp4", "/v/train/y.webm", "/v/train/y.webm", "/v/z.1.mp4"]
    assert missing == ["nobody"]
    with pytest.raises(InputRefused, match=r"x\.mp4 \(/v/train/x\.mp4 or /v/val/x\.mp4\)"):
        label_match.match([Label("x.mp4", "0")], videos, 0.5, "list")
    with pytest.raises(InputRefused, match=r"1 of 5 rows.*nobody"):
        label_match.match(rows, videos, 0.1, "list")


def test_what_no_split_says_is_cut_by_source_and_by_seed_alone():
    rows, videos = listed(10)
    built = label_match.build(rows, videos, "list")
    again = label_match.build(list(reversed(rows)), list(reversed(videos)), "list")
    split_of = {sample.video: sample.split for sample in built.samples}
    assert split_of == {sample.video: sample.split for sample in again.samples}, "neither the order of rows nor of videos counts"
    assert split_of != {sample.video: sample.split for sample in label_match.build(rows, videos, "list", seed=1).samples}
    counts = {(s, c): sum(x.split == s and x.label == c for x in built.samples) for s in label_match.SPLITS for c in (0, 1)}
    assert counts == {
        ("train", 0): 7,
        ("train", 1): 7,
        ("validation", 0): 1,
        ("validation", 1): 1,
        ("test", 0): 2,
        ("test", 1): 2,
    }
    assert "test: 0.2" in built.notes["splits"]
    assert "validation: 0.1" in built.notes["splits"]

    grouped = [row._replace(group=f"{row.label}{int(row.name[2]) // 2}") for row in rows]
    groups = {}
    for row, sample in zip(grouped, label_match.build(grouped, videos, "list").samples, strict=True):
        groups.setdefault(row.group, set()).add(sample.split)
    assert all(len(found) == 1 for found in groups.values())


def test_given_splits_stay_and_a_lone_validation_split_is_the_test():
    (train, a), (validation, b), (test, c) = (listed(4, split=split) for split in label_match.SPLITS)
    built = label_match.build([*train, *validation, *test], [*a, *b, *c], "list")
    assert [sample.split for sample in built.samples] == [row.split for row in (*train, *validation, *test)]
    assert built.notes["splits"] == "as given"
    built = label_match.build([*train, *validation], [*a, *b], "list")
    assert {s.name for s in built.samples if s.split == "test"} == {row.name for row in validation}
    assert sum(sample.split == "validation" for sample in built.samples) == 2
    numbers = [Label(row.name, {"a": "10", "b": "9"}[row.label]) for row in listed(4)[0]]
    assert label_match.build(numbers, listed(4)[1], "list").classes == ("9", "10"), "numbers are sorted as numbers"


def refusals() -> dict[str, tuple]:
    train, a = listed(4, split="train")
    test, b = listed(4, split="test")
    copy = [video(row["uri"], a[0]["content_digest"]) if n == 5 else row for n, row in enumerate(b)]
    grouped = [row._replace(group="kitchen") if n == 0 else row for n, row in enumerate([*train, *test[:-1]])]
    shared = [*grouped, test[-1]._replace(group="kitchen")]
    return {
        "a copy in test": ([*train, *test], [*a, *copy], {}, ["1 sources", "a/0train.mp4 (train)", "b/1test.mp4 (test)"]),
        "a group in test": (shared, [*a, *b], {}, ["a/0train.mp4 (train)", "b/3test.mp4 (test)"]),
        "one file in both": ([*train, *test, train[0]._replace(split="test")], [*a, *b], {}, ["a/0train.mp4", "twice"]),
        "two labels": ([*train, *test, train[0]._replace(label="b")], [*a, *b], {}, ["a/0train.mp4", "'a'", "'b'"]),
        "no class of the list": ([*train, *test], [*a, *b], {"classes": ["a", "c"]}, ["none of the 2 classes", "b"]),
        "an empty class": ([*train, *test], [*a, *b], {"classes": ["a", "b", "walking"]}, ["no video", "walking"]),
        "a class twice": ([*train, *test], [*a, *b], {"classes": ["a", "b", "b"]}, ["twice", "b"]),
        "a class missing in test": ([*train, *test[:4]], [*a, *b], {}, ["missing from test: b"]),
        "one class": (*listed(4, "a"), {}, ["one class, a"]),
        "one video of a class": (listed(4)[0][:5], listed(4)[1], {}, ["one source", "b"]),
        "some rows have a split": ([*train, *listed(4)[0]], [*a, *listed(4)[1]], {}, ["8 rows have no split", "a/0.mp4"]),
        "validation alone": (*listed(4, split="validation"), {}, ["validation split alone"]),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_would_make_an_accuracy_meaningless_is_refused_by_name(case):
    rows, videos, options, words = refusals()[case]
    with pytest.raises(InputRefused) as refusal:
        label_match.build(rows, videos, "list", **options)
    assert all(word in str(refusal.value) for word in ["list", *words]), refusal.value


def test_equal_rows_count_once_and_stretches_of_a_video_stay_together():
    rows, videos = listed(4)
    assert len(label_match.build([*rows, rows[0]], videos, "list").samples) == 8
    cut = [row._replace(start=float(n), stop=n + 1.0) for row in rows for n in range(3)]
    built = label_match.build(cut, videos, "list")
    places = {}
    for sample in built.samples:
        places.setdefault(sample.video, set()).add(sample.split)
    assert len(built.samples) == 24
    assert all(len(found) == 1 for found in places.values())
    assert len(label_match.build(cut, videos, "list", whole=True).samples) == 8
