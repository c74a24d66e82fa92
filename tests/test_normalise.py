"""Normalised shards: times, key frames and bytes of a transcoded video, shards that are made once, the plan's arithmetic."""

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from conftest import encode, make_frames
from hypothesis import given
from hypothesis import strategies as st

from jepa_core.sampling import Crop
from pipelines import ingest_plan, normalise, storage
from pipelines.catalog_schema import item_id
from pipelines.errors import UsageError
from pipelines.ingest_plan import Corpus, Cost, PlanOptions
from pipelines.transcode import Settings, _ticks, scaled_size, transcode
from pipelines.video import VideoRefused, decode_clip

SMALL = Settings(short_side=32)


def shown(data: bytes, stream: int = 0) -> list[Fraction]:
    """Times in seconds of the frames of a full sequential decode."""
    with av.open(io.BytesIO(data)) as container:
        video = container.streams[stream]
        return [frame.pts * video.time_base for frame in container.decode(video)]


def packets(data: bytes) -> list[av.Packet]:
    with av.open(io.BytesIO(data)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def boxes(data: bytes) -> list[str]:
    """Names of an MP4's outer boxes, in order."""
    names, at = [], 0
    while at < len(data):
        names.append(data[at + 4 : at + 8].decode())
        at += int.from_bytes(data[at : at + 4], "big")
    return names


def made(source: bytes, count: int, **settings) -> bytes:
    result = transcode(io.BytesIO(source), stream=0, num_frames=count, **settings)
    assert result["num_frames"] == count
    return result["data"]


def picture(data: bytes, place: int, width: int, height: int, size: int = 32) -> np.ndarray:
    """The frame at a place, whole, as training decodes it."""
    with av.open(io.BytesIO(data)) as container:
        pts = [frame.pts for frame in container.decode(video=0)]
    return decode_clip(io.BytesIO(data), 0, np.array([pts[place]]), Crop(0, 0, width, height, False), size)[0].astype(int)


SOURCES = {
    "b_frames": {"options": {"bf": "3", "g": "250"}},
    "variable_rate": {"pts": [k * k // 5 + 3 * k for k in range(70)], "rate": 90},
    "late_start": {"pts": [12345 + 2 * k for k in range(70)], "rate": 1000},
    "intra": {"options": {"g": "1"}},
    "vp8": {"codec": "libvpx", "container": "webm"},
    "mpeg4_avi": {"codec": "mpeg4", "container": "avi"},
    "transport_stream": {"container": "mpegts", "options": {"bf": "2"}},
    "one_tick_a_second": {"codec": "mpeg4", "container": "avi", "rate": 1},
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_frame_keeps_its_time_and_key_frames_come_every_32(name):
    source = encode(make_frames(70), **SOURCES[name])
    result = made(source, 70)
    assert shown(result) == shown(source)
    found = packets(result)
    keys = [index for index, packet in enumerate(found) if packet.is_keyframe]
    assert keys == [0, 32, 64]
    for start, stop in zip(keys, [*keys[1:], len(found)], strict=True):
        assert min(packet.pts for packet in found[start:stop]) == found[start].pts, "a closed GOP shows nothing before its key"
    assert boxes(result)[:2] == ["ftyp", "moov"]
    with av.open(io.BytesIO(result)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert container.streams[0].pix_fmt == "yuv420p"


def test_a_video_that_begins_before_zero_moves_as_a_whole():
    frames = make_frames(20)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts", options={"avoid_negative_ts": "disabled"}) as out:
        stream = out.add_stream("mpeg4", rate=30, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index - 7, Fraction(1, 30)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    before = shown(buffer.getvalue())
    assert before[0] < 0
    result = transcode(io.BytesIO(buffer.getvalue()), stream=0, num_frames=20)
    assert result["shift"] > 0
    assert shown(result["data"]) == [time - before[0] for time in before]


def test_the_result_is_small_upright_and_shows_the_same(tmp_path):
    assert scaled_size(1280, 720, 256) == (456, 256)
    assert scaled_size(480, 1920, 256) == (256, 1024)
    assert scaled_size(97, 63, 256) == (96, 64)
    frames = make_frames(6, width=96, height=64)
    upright = encode(frames, options={"crf": "10"})
    turned = rotated(upright, tmp_path)
    with av.open(io.BytesIO(turned)) as container:
        assert int(next(container.decode(video=0)).rotation) % 360 == 90
    result = made(turned, 6, short_side=32, crf=5)
    with av.open(io.BytesIO(result)) as container:
        frame = next(container.decode(video=0))
        assert (frame.width, frame.height, int(frame.rotation)) == (32, 48, 0)
    for place in (0, 5):
        same = picture(turned, place, 64, 96) - picture(result, place, 32, 48)
        other = picture(turned, place, 64, 96) - picture(result, place, 32, 48)[::-1]
        assert np.abs(same).mean() < 20 < 40 < np.abs(other).mean()


def rotated(data: bytes, folder: Path) -> bytes:
    """The same MP4 with a display matrix of a quarter turn written into its track header."""
    at = data.index(b"tkhd") + 4
    matrix = at + 40 if data[at] == 0 else at + 52
    turn = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30))
    return data[:matrix] + turn + data[matrix + 36 :]


@pytest.mark.parametrize(("width", "height"), [(97, 63), (2, 2), (16, 400)])
def test_odd_and_tiny_sizes_are_kept_as_near_as_even_numbers_go(width, height):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as out:
        stream = out.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "bgr0"
        for image in make_frames(3, width=width, height=height):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        out.mux(stream.encode())
    result = made(buffer.getvalue(), 3)
    with av.open(io.BytesIO(result)) as container:
        assert (container.streams[0].width, container.streams[0].height) == scaled_size(width, height, 256)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv444p10le"])
def test_colours_survive_full_range_and_ten_bits(pix_fmt):
    image = np.zeros((64, 64, 3), np.uint8)
    image[:32, :32], image[:32, 32:], image[32:, :32], image[32:] = (255, 255, 255), (200, 30, 30), (30, 30, 200), (0, 0, 0)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, pix_fmt
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode())
    source = buffer.getvalue()
    difference = picture(source, 1, 64, 64) - picture(made(source, 3, crf=1), 1, 64, 64)
    assert np.abs(difference).mean() < 2


def test_the_same_video_gives_the_same_bytes():
    source = encode(make_frames(40))
    rng, heap = np.random.default_rng(0), []
    first = made(source, 40, short_side=48)
    for _ in range(15):
        heap.append(rng.bytes(int(rng.integers(100, 300_000))))  # x264's unwritten memory differs from call to call
        assert made(source, 40, short_side=48) == first
    assert made(source, 40) != made(source, 40, crf=30)


def test_other_frame_counts_and_damage_are_refused():
    source = encode(make_frames(40), options={"bf": "0"})
    for count in (39, 41):
        with pytest.raises(VideoRefused, match="catalog's") as caught:
            made(source, count)
        assert caught.value.reason == "frame_count"
    middle = next(packet for packet in packets(source) if packet.pts and packet.size > 100)
    damaged = bytearray(source)
    damaged[middle.pos + 5 : middle.pos + middle.size] = bytes(255 - b for b in source[middle.pos + 5 : middle.pos + middle.size])
    with pytest.raises(VideoRefused) as caught:
        made(bytes(damaged), 40)
    assert caught.value.reason == "undecodable"
    with pytest.raises(VideoRefused, match="is no video"):
        transcode(io.BytesIO(source), stream=3)
    with pytest.raises(VideoRefused, match="pixels"):
        transcode(io.BytesIO(source), stream=0, max_pixels=100)


@given(st.integers(1, 1001), st.integers(1, 2**31 - 1))
def test_ticks_are_whole_numbers_of_every_time_base_and_fine_enough(numerator, denominator):
    time_base = Fraction(numerator, denominator)
    per_second, per_unit = _ticks(time_base)
    assert Fraction(per_unit, per_second) == time_base
    assert 10_000 <= per_second < 2**31


def test_time_bases_finer_than_mp4_are_refused():
    with pytest.raises(VideoRefused, match="ticks per second"):
        _ticks(Fraction(1, 2**31))


def test_a_part_begins_at_the_key_frame_before_it():
    source = encode(make_frames(60), options={"g": "10", "bf": "2", "sc_threshold": "0"})
    times = shown(source)
    with av.open(io.BytesIO(source)) as container:
        base = container.streams[0].time_base
    result = transcode(io.BytesIO(source), stream=0, span=(int(times[23] / base), int(times[41] / base)))
    assert shown(result["data"]) == times[20:42]


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 2000))
def test_shards_hold_every_video_once_in_order_and_are_as_full_as_they_can_be(sizes, limit):
    spans = normalise.group(np.array(sizes, np.int64), limit)
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(len(sizes)))
    for start, stop in spans:
        assert stop - start == 1 or sum(sizes[start:stop]) <= limit
        assert stop == len(sizes) or sum(sizes[start : stop + 1]) > limit, "the next video would not have fitted"


def test_estimated_sizes_follow_duration_picture_and_quality():
    rows = [{"width": 1280, "height": 720, "duration": 3600.0, "num_frames": 108_000},
            {"width": 1280, "height": 720, "duration": 7200.0, "num_frames": 216_000},
            {"width": 64, "height": 64, "duration": 0.0, "num_frames": 1}]  # fmt: skip
    hour, two, picture = normalise.estimated_bytes(pa.Table.from_pylist(rows), Settings())
    assert 100e6 < hour < 300e6, "measured on real clips: 50 to 230 MB"
    assert two == pytest.approx(2 * hour, rel=0.01)
    assert 1000 < picture < 20_000
    better = normalise.estimated_bytes(pa.Table.from_pylist(rows), Settings(crf=17))
    assert better[0] > 1.8 * hour


def video_table(folder: Path, count: int, first: int = 0) -> pa.Table:
    """Rows of `videos` for small files, the second a WebDataset-like member at an offset, one with a wrong frame count."""
    rows = []
    for number in range(first, first + count):
        data = encode(make_frames(24, seed=number))
        path, offset = folder / f"{number:03}.mp4", 512 if number == 1 else 0
        path.write_bytes(b"\0" * offset + data)
        info = storage.list_files(str(path.parent), (path.name,))[0]
        rows.append({"id": item_id(info.uri, "", offset, len(data), info.etag), "uri": info.uri, "member": "", "offset": offset,
                     "size": len(data), "etag": info.etag, "label": f"class {number}" if number % 2 else None,
                     "digest": "d" * 64, "stream": 0, "num_frames": 99 if number == 2 else 24, "duration": 0.8,
                     "width": 96, "height": 64})  # fmt: skip
    return pa.Table.from_pylist(rows)


def make_all(videos: pa.Table, out: Path, shard_bytes: int = 20_000) -> list[str]:
    """What a run does, without Ray: names of the shards that it made."""
    plan = normalise.planned(videos, str(out), SMALL, shard_bytes)
    finished = set(normalise.finished(str(out), plan))
    tables = [table for table in normalise.shard_tables(plan, videos) if table["shard"][0].as_py() not in finished]
    results = [normalise.make_shard(table, SMALL, str(out), "catalog@3").to_pylist()[0] for table in tables]
    normalise.write_refused(str(out), plan)
    return [row["shard"] for row in results]


def members(out: Path) -> dict[str, bytes]:
    """Bytes of all members of all shards, read by offset."""
    found = {}
    for path in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for entry in tar:
                assert (entry.mtime, entry.uid, entry.gid, entry.uname) == (0, 0, 0, "")
                assert entry.name not in found, "a video is in one shard only"
                with storage.open_file(str(path), offset=entry.offset_data, size=entry.size) as file:
                    found[entry.name] = file.read()
    return found


def test_shards_hold_each_video_with_its_provenance_and_refusals_have_reasons(tmp_path):
    videos = video_table(tmp_path, 5)
    names = make_all(videos, tmp_path / "out")
    assert len(names) > 1
    found = members(tmp_path / "out")
    good = [row for row in videos.to_pylist() if row["num_frames"] == 24]
    labelled = {f"{row['id']}.cls" for row in good if row["label"]}
    assert set(found) == {f"{row['id']}.{kind}" for row in good for kind in ("mp4", "json")} | labelled
    for row in good:
        source = Path(row["uri"]).read_bytes()[row["offset"] :]
        assert found[f"{row['id']}.mp4"] == made(source, 24, short_side=32)
        facts = json.loads(found[f"{row['id']}.json"])
        assert (facts["uri"], facts["digest"], facts["catalog"]) == (row["uri"], "d" * 64, "catalog@3")
    assert {found[name].decode() for name in labelled} == {"class 1", "class 3"}
    refused = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert [(row["uri"][-7:], row["reason"]) for row in refused] == [("002.mp4", "frame_count")]


def test_a_killed_run_goes_on_and_a_grown_catalog_adds_shards(tmp_path):
    videos, out = video_table(tmp_path, 6), tmp_path / "out"
    names = make_all(videos, out)
    first = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    refused = (out / "refused.jsonl").read_bytes()
    assert refused
    assert make_all(videos, out) == [], "nothing is done twice"
    lost = sorted(first)[0]
    (out / "shards" / lost).unlink()
    assert make_all(videos, out) == [lost.removesuffix(".tar")], "only what is missing"
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == first, "byte for byte"
    assert (out / "refused.jsonl").read_bytes() == refused

    (out / "shards" / lost).unlink()  # killed again, and the catalog has grown before the next run
    grown = pa.concat_tables([video_table(tmp_path, 2, first=10), videos])
    again = make_all(grown, out)
    assert lost.removesuffix(".tar") in again, "a planned shard keeps its name and its videos"
    assert {name: data for name, data in stands(out).items() if name in first} == first
    assert len(again) > 1
    assert len([name for name in members(out) if name.endswith(".mp4")]) == 7, "each good video once"
    assert not set(again[1:]) & set(names)
    with pytest.raises(UsageError, match="other settings"):
        normalise.planned(grown, str(out), Settings(short_side=64), 20_000)


def stands(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "shards").iterdir()}


def test_a_shard_without_a_good_video_is_not_made_again(tmp_path):
    videos, out = video_table(tmp_path, 1, first=2), tmp_path / "out"
    assert len(make_all(videos, out)) == 1
    assert not (out / "shards").exists() or not list((out / "shards").iterdir())
    assert make_all(videos, out) == []
    assert len((out / "refused.jsonl").read_text().splitlines()) == 1


def test_a_changed_or_vanished_source_is_a_refusal(tmp_path):
    videos, out = video_table(tmp_path, 2), tmp_path / "out"
    Path(videos["uri"][0].as_py()).unlink()
    Path(videos["uri"][1].as_py()).write_bytes(encode(make_frames(30, seed=9)))
    make_all(videos, out)
    refused = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in refused] == ["missing", "changed"]


def test_the_arithmetic_of_the_measured_table():
    """A million hours of 720p: 500 CPU s to make an hour, 255 against 25 ms a clip, 979 against 220 MB an hour."""
    corpus = Corpus(videos=10_000_000, seconds=3.6e9, bytes=979_000_000 * 1_000_000)
    cost = Cost(source_clip_cpu_s=0.255, source_clip_bytes=1.3e6, clip_cpu_s=0.025, clip_bytes=0.28e6,
                encode_cpu_s=500 / 3600, bytes_per_s=220e6 / 3600)  # fmt: skip
    numbers = ingest_plan.arithmetic(corpus, cost, PlanOptions(clips_per_s=100, epochs=10))
    assert numbers["hours"] == 1e6
    assert numbers["clips_per_epoch"] == 9e8, "900 clips of 4 s an hour"
    assert numbers["normalised"]["core_hours_to_make"] == pytest.approx(500 * 1e6 / 3600)
    assert numbers["normalised"]["gb"] == pytest.approx(220e3)
    assert numbers["source"]["gb"] == 979e3
    assert (numbers["source"]["cores"], numbers["normalised"]["cores"]) == (25.5, 2.5)
    assert numbers["source"]["gb_per_epoch"] == pytest.approx(9e8 * 1.3e6 / 1e9)
    assert numbers["break_even_epochs"] == pytest.approx(500 / (900 * 0.23))
    assert numbers["source"]["core_hours"] == pytest.approx(10 * 9e8 * 0.255 / 3600)
    assert numbers["normalised"]["core_hours"] == pytest.approx((5e8 + 10 * 9e8 * 0.025) / 3600)
    assert numbers["recommendation"].startswith("normalise: 10 epochs")
    once = ingest_plan.arithmetic(corpus, cost, PlanOptions(epochs=1))
    assert once["recommendation"].startswith("stream the source: 1 epochs")
    assert ingest_plan.table(numbers)[-1] == ("break-even, epochs", "", "2.42")
    cheap = Cost(0.02, 1e5, 0.025, 1e5, 0.1, 6e4)
    never = ingest_plan.arithmetic(corpus, cheap, PlanOptions())
    assert never["break_even_epochs"] is None
    assert ingest_plan.table(never)[-1][2] == "never"


def test_samples_are_drawn_by_duration_and_by_seed():
    durations, frames = np.array([1.0, 0.0, 3.0, 96.0]), np.array([10, 1, 30, 960])
    drawn = ingest_plan.draw(durations, frames, 4000, 0)
    share = np.bincount(drawn, minlength=4) / 4000
    assert share[1] == 0
    assert share[3] == pytest.approx(0.96, abs=0.02)
    assert (drawn == ingest_plan.draw(durations, frames, 4000, 0)).all()
    assert not len(ingest_plan.draw(np.zeros(3), np.ones(3), 8, 0))


def test_one_clip_is_measured_both_ways(tmp_path):
    source = encode(make_frames(120, width=320, height=240), options={"g": "50"})
    (tmp_path / "a.mp4").write_bytes(source)
    info = storage.list_files(str(tmp_path))[0]
    with av.open(io.BytesIO(source)) as container:
        base = container.streams[0].time_base
    row = {"uri": info.uri, "offset": 0, "size": info.size, "etag": info.etag, "stream": 0, "width": 320, "height": 240,
           "time_base_num": base.numerator, "time_base_den": base.denominator}  # fmt: skip
    pts = np.array([int(time / base) for time in shown(source)])
    options = PlanOptions(clip_frames=4, fps=4.0, crop_size=64, settings=Settings(short_side=64))
    cost = ingest_plan._measure_item(row, pts, 0, options)
    assert all(value > 0 for value in cost.values())
    assert cost["clip_bytes"] < cost["source_clip_bytes"] <= info.size
    assert cost["bytes_per_s"] < info.size / 5
    assert cost["clip_cpu_s"] < cost["source_clip_cpu_s"] < 1, "64 pixels decode faster than 240"


@pytest.mark.ray
def test_shards_are_catalogued_and_show_what_the_source_shows(tmp_path, ray_session, reporter):
    from pipelines import catalog, ingest
    from pipelines.ingest_config import IngestConfig, NormaliseConfig

    source = tmp_path / "in"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.mp4").write_bytes(encode(make_frames(40 + number, seed=number), options={"crf": "10"}))
    ingest.run(IngestConfig(source=str(source), catalog=str(tmp_path / "cat")), reporter)
    config = NormaliseConfig(catalog=str(tmp_path / "cat"), out=str(tmp_path / "out"), crf=5)
    first = normalise.run(config, reporter)
    assert (first["videos"], first["shards"], first["made"], first["refused"]) == (3, 1, 1, 0)
    assert normalise.run(config, reporter)["made"] == 0
    ref = catalog.parse_ref(first["target"])
    rows = catalog.read_videos(ref).to_pylist()
    assert sorted(row["num_frames"] for row in rows) == [40, 41, 42]
    sources = {row["id"]: row for row in catalog.read_videos(catalog.parse_ref(first["catalog"])).to_pylist()}
    for row in rows:
        before = sources[row["member"].partition(".")[0]]
        pts = [catalog.frame_times(catalog.parse_ref(first["catalog"]), before), catalog.frame_times(ref, row)]
        assert (pts[0] * before["time_base_num"] * row["time_base_den"]
                == pts[1] * row["time_base_num"] * before["time_base_den"]).all()  # fmt: skip
        clips = []
        for place, times in ((before, pts[0]), (row, pts[1])):
            with storage.open_file(place["uri"], offset=place["offset"], size=place["size"], etag=place["etag"]) as file:
                crop = Crop(0, 0, place["width"], place["height"], False)
                clips.append(decode_clip(file, place["stream"], times[[3, 17, 39]], crop, 64).astype(int))
        assert np.abs(clips[0] - clips[1]).mean() < 8
    numbers = ingest_plan.run_plan(ref, PlanOptions(samples=2, clip_frames=2, crop_size=32, settings=SMALL), reporter)
    assert numbers["samples"] == 2
    assert numbers["videos"] == 3
    assert numbers["hours"] == pytest.approx((40 + 41 + 42) / 30 / 3600, rel=0.01)
