"""Reports of an ingest: counts, drift, and the counter on Ray's metrics port."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from pipelines import ingest_report
from pipelines.catalog_schema import QUARANTINE_SCHEMA, VIDEO_SCHEMA

VIDEO = {"status": "current", "keep": True, "size": 1000, "duration": 36.0, "codec": "h264", "container": "mp4", "width": 640,
         "height": 480, "fps": 30.0}  # fmt: skip


def batch(schema, rows, columns):
    return pa.Table.from_pylist(rows, schema).select(columns).to_batches(max_chunksize=3)


def videos(rows):
    return batch(VIDEO_SCHEMA, [{**VIDEO, **row} for row in rows], ingest_report.VIDEO_COLUMNS)


def refused(reasons, status="current"):
    rows = [{"reason": reason, "status": status} for reason in reasons]
    return batch(QUARANTINE_SCHEMA, rows, ingest_report.QUARANTINE_COLUMNS)


def report_of(codecs, reasons=()):
    return ingest_report.report(videos([{"codec": codec} for codec in codecs]), refused(reasons))


def test_a_report_counts_current_rows_by_class_and_all_rows_by_status():
    rows = [
        {},
        {"width": 1080, "height": 1920, "duration": 3600.0, "fps": 24.0},  # portrait: the shorter side counts
        {"codec": "vp9", "container": "webm", "fps": None, "keep": False, "duration": 0.5},
        {"codec": "vp9", "container": "webm", "width": 320, "height": 239, "keep": None, "fps": float("nan")},
        {"status": "replaced", "codec": "av1"},
        {"status": "vanished", "codec": "av1"},
    ]
    report = ingest_report.report(videos(rows), [*refused(["empty", "empty", "crashed"]), *refused(["empty"], "vanished")])
    assert report["videos"] == {"current": 4, "kept": 2, "replaced": 1, "vanished": 1}
    assert report["codec"] == {"h264": 2, "vp9": 2}
    assert report["container"] == {"mp4": 2, "webm": 2}
    assert report["resolution"] == {"<240p": 1, "480-719p": 2, "1080-2159p": 1}
    assert report["fps"] == {"23-26": 1, "26-31": 1, "unknown": 2}
    assert report["duration"] == {"<1 s": 1, "10-60 s": 2, ">=1 h": 1}
    assert report["reasons"] == {"empty": 2, "crashed": 1}
    assert report["quarantined"] == 3
    assert report["bytes"] == 4000
    assert report["hours"] == pytest.approx((36 + 3600 + 0.5 + 36) / 3600)
    assert report["kept_hours"] == pytest.approx((36 + 3600) / 3600)
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("name", ["resolution", "fps", "duration"])
def test_a_class_holds_its_lower_edge_and_not_its_upper_one(name):
    edges = getattr(ingest_report, f"{name.upper()}_EDGES")
    assert len(ingest_report.CLASSES[name]) == len(edges) + 1
    column = {"resolution": "height", "fps": "fps", "duration": "duration"}[name]
    for position, edge in enumerate(edges):
        below = edge - 1 if name == "resolution" else edge - 1e-6
        for value, wanted in ((below, position), (edge, position + 1)):
            row = {column: value, **({"width": 10000} if name == "resolution" else {})}
            assert ingest_report.report(videos([row]), [])[name] == {ingest_report.CLASSES[name][wanted]: 1}


def test_a_report_of_nothing_is_zeros():
    report = ingest_report.report([], [])
    assert report["videos"]["current"] == report["quarantined"] == report["bytes"] == report["hours"] == 0
    assert report["codec"] == {}
    assert ingest_report.drift(report, report_of(["h264"])) == []
    assert ingest_report.drift(report_of(["h264"]), report) == []


def by_distribution(rows):
    return {row["distribution"]: row for row in rows}


def test_drift_finds_a_new_codec_and_the_population_stability_index():
    before = report_of(["h264"] * 800 + ["vp9"] * 200, ["empty"] * 100)
    now = report_of(["h264"] * 600 + ["vp9"] * 100 + ["av1"] * 300, ["empty"] * 100)
    rows = by_distribution(ingest_report.drift(now, before))
    p, q = np.array([600.5, 100.5, 300.5]) / 1001.5, np.array([800.5, 200.5, 0.5]) / 1001.5
    assert rows["codec"]["psi"] == pytest.approx(((p - q) * np.log(p / q)).sum())
    assert rows["codec"]["level"] == "large"
    assert (rows["codec"]["value"], rows["codec"]["share"], rows["codec"]["before"]) == ("av1", 0.3, 0.0)
    assert rows["codec"]["new"] == ["av1"]
    assert rows["container"]["level"] == rows["reasons"]["level"] == rows["refused"]["level"] == "none"


def test_drift_has_two_thresholds():
    before = report_of(["h264"] * 1000 + ["vp9"] * 1000)
    levels = {}
    for share in (1000, 1200, 1400, 1600):
        now = report_of(["h264"] * share + ["vp9"] * (2000 - share))
        row = by_distribution(ingest_report.drift(now, before))["codec"]
        levels[share] = (row["level"], row["psi"])
    assert levels[1000][1] == 0
    assert [level for level, _ in levels.values()] == ["none", "none", "moderate", "large"]
    assert [index > 0.1 for _, index in levels.values()] == [False, False, True, True]


def test_small_runs_do_not_drift_by_chance():
    rng = np.random.default_rng(0)
    draw = lambda count: report_of(list(rng.choice(["h264", "vp9", "hevc", "av1"], count)))  # noqa: E731
    before = draw(20)
    rows = [by_distribution(ingest_report.drift(draw(20), before))["codec"] for _ in range(100)]
    over = sum(row["psi"] > ingest_report.PSI_MODERATE for row in rows)
    flagged = sum(row["level"] != "none" for row in rows)
    assert over > 50  # by the plain thresholds most of these runs would raise an alarm
    assert flagged <= 5


@pytest.mark.parametrize(("now", "before", "level"), [(60, 10, "large"), (10, 60, "none"), (12, 10, "none"), (2, 0, "none")])
def test_drift_reports_a_jump_of_the_refused_share(now, before, level):
    good = ["h264"] * (1000 if before else 30)  # two refusals of 32 items are chance
    rows = by_distribution(ingest_report.drift(report_of(good, ["not_a_video"] * now), report_of(good, ["empty"] * before)))
    assert rows["refused"]["level"] == level
    assert rows["refused"]["share"] == now / (len(good) + now)
    assert rows["refused"]["new"] == ["not_a_video"]


SCRAPED = """
import json, sys, time, urllib.request
from pipelines import ray_session
from pipelines.config import RayConfig
with ray_session.session(RayConfig(num_cpus=1, object_store_mb=128)):
    import ray
    from pipelines import ingest_report
    first = {"videos": {"current": 5}, "reasons": {"empty": 2}}
    ingest_report.metrics(first)
    ingest_report.metrics({"videos": {"current": 0}, "reasons": {"empty": 1, "crashed": 4}})
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.3)
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        except OSError:
            continue
        lines = [line for line in text.splitlines() if line.startswith("ray_jepa_ingest_items_total{")]
        if len(lines) == 3:
            break
    print(json.dumps({line.split('reason="')[1].split('"')[0]: float(line.rpartition(" ")[2]) for line in lines}))
"""


@pytest.mark.ray
def test_ray_serves_the_counter_on_the_nodes_metrics_port():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["RAY_metrics_report_interval_ms"] = "500"  # 10 s by default
    result = subprocess.run([sys.executable, "-c", SCRAPED], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"accepted": 5, "empty": 3, "crashed": 4}
