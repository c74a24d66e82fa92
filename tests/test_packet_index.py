"""The packet index: exact round trips, slices that decode, sizes, and corruption that is told."""

import io
import itertools
import os
import zlib
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
from conftest import encode as encode_video
from conftest import make_frames
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import packet_index
from pipelines.packet_index import (
    NO_PTS,
    PacketIndex,
    decode,
    decode_slice,
    encode,
    frames_before,
    shown,
    slice_range,
    write_pack,
)

INT64 = st.integers(-(2**63) + 1, 2**63 - 1)


def index_of(packets: list[tuple[int, int, int, bool, bool]]) -> PacketIndex:
    columns = zip(*packets, strict=True) if packets else [()] * 5
    kinds = (np.int64, np.int64, np.int32, bool, bool)
    return PacketIndex(*(np.array(column, dtype=kind) for column, kind in zip(columns, kinds, strict=True)))


def demux(file) -> PacketIndex:
    with av.open(file) as container:
        packets = [p for p in container.demux(container.streams.best("video")) if p.size]
        rows = [(p.pts, p.pos, p.size, p.is_keyframe, p.is_discard) for p in packets]
        return index_of([(NO_PTS if pts is None else pts, -1 if pos is None else pos, *rest) for pts, pos, *rest in rows])


def assert_equal(left: PacketIndex, right: PacketIndex) -> None:
    for name, a, b in zip(PacketIndex._fields, left, right, strict=True):
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def segments_of(packets: int):
    return mock.patch.object(packet_index, "SEGMENT_PACKETS", packets)


def films(count: int, gop: int, pyramid: bool = True, audio: bool = True, seed: int = 0) -> PacketIndex:
    """A stream like x264's: mini GOPs of B-frames, sizes log-normal by kind of frame, audio in the gaps."""
    rng = np.random.default_rng(seed)
    order = np.arange(count)
    if pyramid:  # display places 4 2 1 3 within groups of four; the key frame stands alone
        place = (order % gop - 1) % 4
        grouped = (order % gop > 0) & (order % gop <= (min(gop, count) - 1) // 4 * 4) & (order - place + 3 < count)
        order = np.where(grouped, order - place + np.array([3, 1, 0, 2])[place], order)
    key = np.arange(count) % gop == 0
    size = np.exp(rng.normal(8, 0.5, count)) * np.where(key, 12, np.where(order % 4 == 0, 2, 0.7))
    gap = np.where(rng.random(count) < 0.1, rng.integers(300, 9000, count), 0) * audio
    size = size.astype(np.int32)
    pos = 48 + np.cumsum(gap + size) - size
    return PacketIndex(order * 512, pos, size, key, np.zeros(count, bool))


# Round trips


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(INT64, INT64, st.integers(0, 2**31 - 1), st.booleans(), st.sampled_from(["shown", "hidden", "timeless"]))),
    st.sampled_from([1, 3, 1024]),
)
def test_any_index_survives(rows, packets):
    index = index_of([(NO_PTS if h == "timeless" else pts, pos, size, key, h != "shown") for pts, pos, size, key, h in rows])
    with segments_of(packets):
        blob, directory = encode(index)
    assert_equal(decode(blob, directory), index)


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "mp4", {"g": "20", "bf": "3"}),
        ("libx264", "matroska", {}),
        ("mpeg2video", "mpegts", {"g": "12", "bf": "2"}),
        ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8"}),
        ("mpeg4", "avi", {"g": "5"}),
    ],
)
def test_real_videos_survive_with_any_segments(codec, container, options):
    index = demux(io.BytesIO(encode_video(make_frames(60), codec, container, options=options)))
    for packets in (1, 7, 1024):
        with segments_of(packets):
            blob, directory = encode(index)
        assert_equal(decode(blob, directory), index)


def test_an_index_encodes_to_the_same_bytes_whatever_the_arrays_are_made_of():
    index = films(3000, 60)
    strided = PacketIndex(*(np.stack([column, column], axis=1)[:, 0] for column in index))
    assert encode(index) == encode(strided) == encode(PacketIndex(*(column.copy() for column in index)))


def test_segments_begin_at_key_frames_and_decode_alone():
    index = films(5000, 60)
    blob, directory = encode(index)
    start = 0
    for begin, end in itertools.pairwise([0, 1080, 2160, 3240, 4320, 5000]):
        _, stop = slice_range(directory, int(index.pts[begin]), int(index.pts[begin]))
        part = decode_slice(blob[start:stop], directory, start, stop)
        assert_equal(part, PacketIndex(*(column[begin:end] for column in index)))
        assert part.key[0]
        assert frames_before(directory, start) == begin
        start = stop
    assert start == len(blob)


def test_packets_before_the_first_key_frame_are_kept():
    index = films(300, 100)
    index.key[0] = False
    with segments_of(50):
        blob, directory = encode(index)
    assert_equal(decode(blob, directory), index)
    assert slice_range(directory, int(index.pts[5]), int(index.pts[5]))[0] == 0


def test_shown_frames_are_sorted_and_leave_out_hidden_ones():
    index = index_of([(30, 0, 1, True, False), (NO_PTS, 1, 1, False, True), (-10, 2, 1, False, False), (5, 3, 1, False, True)])
    assert shown(index).tolist() == [-10, 30]


def test_an_empty_index_is_no_bytes():
    blob, directory = encode(index_of([]))
    assert blob == b""
    assert len(decode(blob, directory).pts) == 0
    with pytest.raises(ValueError, match="shows none"):
        slice_range(directory, 0, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": np.array([1, -1], np.int32)}, "negative size"),
        ({"pts": np.array([0, NO_PTS])}, "no presentation time"),
        ({"pts": np.array([0.0, 1.0])}, "pts is float64"),
        ({"size": np.array([1, 2**40])}, "size is int64"),
        ({"key": np.array([True])}, "key is bool"),
    ],
)
def test_columns_of_another_kind_are_refused(change, message):
    index = index_of([(0, 0, 1, True, False), (1, 1, 1, False, False)])
    with pytest.raises(ValueError, match=message):
        encode(index._replace(**change))


# Slices


@st.composite
def streams(draw) -> tuple[PacketIndex, np.ndarray]:
    """A stream of open and closed GOPs with pyramids, and for each packet the key frame that decoding it must begin from."""
    packets, governing, keys, clock = [], [], [0], draw(st.integers(-1000, 1000))
    step = draw(st.integers(1, 4))
    for _ in range(draw(st.integers(0, 3))):  # before the first key frame
        packets.append((clock, False, False))
        governing.append(0)
        clock += step
    for number in range(draw(st.integers(1, 12))):
        leading = draw(st.integers(0, 3)) if number else 0
        trailing = draw(st.integers(0, 6))
        hidden_key = draw(st.sampled_from([None, None, None, "pts", "timeless"]))
        keys.append(len(packets))
        key_pts = clock + leading * step
        packets.append((NO_PTS if hidden_key == "timeless" else key_pts, True, hidden_key is not None))
        governing.append(keys[-1])
        for pts in draw(st.permutations(range(leading))):
            packets.append((clock + pts * step, False, False))
            governing.append(keys[-2])
        if draw(st.booleans()):  # a VP9 alternative reference: never shown
            packets.append((draw(st.sampled_from([NO_PTS, key_pts])), False, True))
            governing.append(keys[-1])
        for pts in draw(st.permutations(range(trailing))):
            packets.append((key_pts + (1 + pts) * step, False, False))
            governing.append(keys[-1])
        clock = key_pts + (trailing + 1) * step + draw(st.sampled_from([0, 0, 100]))
    index = index_of([(pts, 10 * k, 10, key, hidden) for k, (pts, key, hidden) in enumerate(packets)])
    return index, np.array(governing)


@settings(max_examples=300, deadline=None)
@given(streams(), st.integers(1, 9), st.data())
def test_a_slice_holds_every_packet_from_the_governing_key_frame_on(stream, packets, data):
    index, governing = stream
    times = shown(index)
    if not len(times):
        return
    with segments_of(packets):
        blob, directory = encode(index)
    first = data.draw(st.integers(int(times[0]), int(times[-1]) + 5))
    last = first + data.draw(st.integers(0, 60))
    start, stop = slice_range(directory, first, last)
    part = decode_slice(blob[start:stop], directory, start, stop)
    on_screen = times[times <= first][-1]
    wanted = np.flatnonzero(~index.hidden & (index.pts >= on_screen) & (index.pts <= last))
    needed = np.arange(governing[wanted].min(), wanted.max() + 1)
    assert set(index.pos[needed]) <= set(part.pos.tolist())
    assert frames_before(directory, start) == (~index.hidden[: part.pos[0] // 10]).sum()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-50, 50), st.booleans()), min_size=1, max_size=60), st.integers(-60, 60), st.integers(0, 40)
)
def test_timestamps_in_any_order_lose_no_frame(rows, first, length):
    index = index_of([(pts, k, 1, key, False) for k, (pts, key) in enumerate(rows)])
    wanted = np.flatnonzero((index.pts >= first) & (index.pts <= first + length))
    with segments_of(4):
        blob, directory = encode(index)
    if len(wanted):
        start, stop = slice_range(directory, first, first + length)
        assert set(wanted) <= set(decode_slice(blob[start:stop], directory, start, stop).pos)


def test_slices_of_closed_gops_are_no_longer_than_they_must_be():
    index = films(20_000, 50)
    blob, directory = encode(index)
    for first in range(0, 19_000, 370):
        start, stop = slice_range(directory, first * 512, (first + 120) * 512)
        part = decode_slice(blob[start:stop], directory, start, stop)
        length = packet_index.SEGMENT_PACKETS + 50
        assert len(part.pts) <= length * (2 if first // 1050 != (first + 120) // 1050 else 1)
        assert stop - start < 6000


def test_open_gops_read_one_segment_more_only_for_leading_pictures():
    display = np.concatenate([[0], *([g * 10 + 10, *range(g * 10 + 1, g * 10 + 10)] for g in range(20))])
    index = index_of([(int(pts), 10 * k, 10, pts % 10 == 0, False) for k, pts in enumerate(display)])
    with segments_of(15):
        _, directory = encode(index)
    start_of = {pts: slice_range(directory, pts, pts)[0] for pts in range(201)}
    starts = sorted(set(start_of.values()))
    cuts = [0, *range(21, 201, 20)]
    for pts in range(201):
        key = -(-pts // 10) * 10  # the key frame that carries it in decode order
        segment = np.searchsorted(cuts, np.flatnonzero(display == pts)[0], side="right") - 1
        leads = pts != key and int(display[cuts[segment]]) == key and segment > 0
        assert start_of[pts] == starts[segment - leads], pts
    assert len(starts) == len(cuts)


def read_clip(data: bytes, part: PacketIndex, wanted: set[int], extradata: bytes | None, codec: str) -> dict[int, np.ndarray]:
    """Decode packets by position and size alone, as a trainer does."""
    context = av.CodecContext.create(codec, "r")
    context.extradata = extradata
    frames = {}
    for pts, pos, size in zip(part.pts.tolist(), part.pos.tolist(), part.size.tolist(), strict=True):
        packet = av.Packet(data[pos : pos + size])
        packet.pts = None if pts == NO_PTS else pts
        frames |= {f.pts: f.to_ndarray(format="gray") for f in context.decode(packet) if f.pts in wanted}
    return frames | {f.pts: f.to_ndarray(format="gray") for f in context.decode(None) if f.pts in wanted}


@pytest.mark.parametrize(
    "options",
    [
        {"g": "24", "bf": "3", "x264-params": "open-gop=1:b-pyramid=normal:scenecut=0"},
        {"g": "24", "bf": "3", "x264-params": "open-gop=0:b-pyramid=normal"},
        {"g": "10", "bf": "0"},
    ],
    ids=["open", "closed", "no-b"],
)
def test_frames_decoded_from_slices_equal_those_of_the_whole_video(options):
    data = encode_video(np.concatenate([make_frames(100, seed=k) for k in (0, 1)]), options={**options, "threads": "1"})
    index = demux(io.BytesIO(data))
    with av.open(io.BytesIO(data)) as container:
        extradata = container.streams.video[0].codec_context.extradata
        whole = {frame.pts: frame.to_ndarray(format="gray") for frame in container.decode(video=0)}
    times = shown(index)
    assert times.tolist() == sorted(whole)
    with segments_of(30):
        blob, directory = encode(index)
    shorter = 0
    for first in range(0, 190, 3):
        wanted = set(times[first : first + 10].tolist())
        start, stop = slice_range(directory, min(wanted), max(wanted))
        part = decode_slice(blob[start:stop], directory, start, stop)
        shorter += len(part.pts) < len(index.pts)
        frames = read_clip(data, part, wanted, extradata, "h264")
        assert frames.keys() == wanted
        assert all((frames[pts] == whole[pts]).all() for pts in wanted)
    assert shorter == 64


def test_times_without_a_frame_are_refused_and_say_which_there_are():
    _, directory = encode(films(100, 10))
    with pytest.raises(ValueError, match=r"from pts -9 to -1; the video's run from 0 to \d+"):
        slice_range(directory, -9, -1)
    with pytest.raises(ValueError, match="no frame is on screen"):
        slice_range(directory, 20, 10)
    assert slice_range(directory, 10**9, 10**9 + 5) == slice_range(directory, 50_000, 50_000)  # the last frame stays on screen


# Corruption


def test_every_flipped_bit_and_every_cut_is_told():
    with segments_of(64):
        blob, directory = encode(films(300, 32))
    for data, read in ((blob, lambda bad: decode(bad, directory)), (directory, lambda bad: decode(blob, bad))):
        for place, bit in itertools.product(range(len(data)), (0, 7)):
            bad = bytearray(data)
            bad[place] ^= 1 << bit
            with pytest.raises(ValueError, match="packet index"):
                read(bytes(bad))
        for length in range(len(data)):
            with pytest.raises(ValueError, match="packet index"):
                read(data[:length])
        with pytest.raises(ValueError, match="packet index"):
            read(data + b"\0")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.binary(max_size=80), st.booleans())
def test_noise_never_decodes_even_with_right_checksums(blob, directory, signed):
    if signed:
        blob = zlib.crc32(blob).to_bytes(4, "little") + blob
        body = bytes([packet_index.VERSION]) + directory
        directory = zlib.crc32(body).to_bytes(4, "little") + body
    if not blob[4:] and not directory[5:]:
        return
    with pytest.raises(ValueError, match=r"."):
        decode(blob, directory)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
def test_changes_under_a_right_checksum_end_in_an_index_or_a_value_error(place, value, in_blob):
    blob, directory = map(bytearray, encode(films(200, 50)))
    data = blob if in_blob else directory
    data[4 + place % (len(data) - 4)] = value
    data[:4] = zlib.crc32(data[4:]).to_bytes(4, "little")
    try:
        index = decode(bytes(blob), bytes(directory))
    except ValueError:
        return
    assert all(len(column) == len(index.pts) for column in index)


def test_a_directory_of_another_video_or_version_is_refused():
    index = films(200, 50)
    blob, directory = encode(index)
    other = bytearray(directory)
    other[5 + len(packet_index._varints(np.array([200, 0, len(blob)], np.uint64)))] += 2  # the first pts, one later
    other[:4] = zlib.crc32(other[4:]).to_bytes(4, "little")
    with pytest.raises(ValueError, match="of different videos"):
        decode(blob, bytes(other))
    body = bytes([packet_index.VERSION + 1]) + directory[5:]
    with pytest.raises(ValueError, match=f"version {packet_index.VERSION + 1}"):
        decode(blob, zlib.crc32(body).to_bytes(4, "little") + body)


def test_a_claim_of_endless_packets_takes_no_memory():
    packed = zlib.compress(bytes(1 << 20), wbits=-15)
    blob = zlib.crc32(packed).to_bytes(4, "little") + packed
    body = bytes([packet_index.VERSION]) + packet_index._varints(np.array([2**39, 0, len(blob), 0, 0, 0], np.uint64))
    with pytest.raises(ValueError, match="cannot hold the 549755813888 packets"):
        decode(blob, zlib.crc32(body).to_bytes(4, "little") + body)


def test_bytes_that_are_not_whole_segments_are_refused():
    blob, directory = encode(films(5000, 50))
    start, stop = slice_range(directory, 3000 * 512, 3000 * 512)
    assert 0 < start < stop < len(blob)
    for bad in ((start + 1, stop), (start, stop - 1), (-1, stop), (start, len(blob) + 1), (stop, start)):
        with pytest.raises(ValueError, match="not whole segments"):
            decode_slice(blob[slice(*bad)], directory, *bad)
    with pytest.raises(ValueError, match="where the directory says"):
        decode_slice(blob[start : stop - 1], directory, start, stop)


# Packs and sizes


def test_a_pack_is_named_by_its_bytes_and_gives_each_blob_back():
    blobs = [encode(films(count, 30, seed=count))[0] for count in (1, 50, 2000)] + [b""]
    name, data, offsets = write_pack(blobs)
    assert [data[at : at + len(blob)] for at, blob in zip(offsets, blobs, strict=True)] == blobs
    assert name == write_pack(list(blobs))[0] != write_pack(blobs[::-1])[0]
    assert len(name) == len("0" * 32 + ".pack")
    assert write_pack([])[1:] == (b"", [])


@pytest.mark.parametrize(("fps", "gop", "audio"), [(30, 250, True), (60, 60, True), (25, 12, False)])
def test_an_hour_takes_less_than_half_a_megabyte(fps, gop, audio):
    blob, directory = encode(films(3600 * fps, gop, audio=audio))
    assert len(blob) + len(directory) < 500_000
    assert len(directory) < 12 * (3600 * fps // packet_index.SEGMENT_PACKETS + 2)


def test_a_short_video_takes_a_few_bytes():
    blob, directory = encode(films(16, 100, pyramid=False, audio=False))
    assert len(directory) <= 13
    assert len(blob) < 75
    blob, directory = encode(index_of([(0, 0, 9999, True, False)]))
    assert len(blob) + len(directory) < 35


@pytest.mark.skipif(not os.environ.get("JEPA_TEST_CLIPS"), reason="JEPA_TEST_CLIPS names no folder of real clips")
def test_real_clips_survive():
    count = 0
    for path in sorted(Path(os.environ["JEPA_TEST_CLIPS"]).rglob("*.*")):
        if path.suffix != ".md":
            index = demux(str(path))
            assert_equal(decode(*encode(index)), index)
            count += 1
    assert count
