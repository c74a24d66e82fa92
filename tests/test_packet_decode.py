"""Which packets are decoded for some frames: the least that gives them exactly."""

import numpy as np
import pytest
from clip_files import catalogued, encoded, sequential
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import catalog, packet_decode
from pipelines.packet_index import NO_PTS, PacketIndex


def packets(pts: list[int], keys: list[int], hidden: tuple[int, ...] = (), size: int = 10, gap: int = 0) -> PacketIndex:
    """Packets in decode order, each `gap` bytes behind the one before."""
    number = np.arange(len(pts))
    return PacketIndex(np.array(pts), 100 + number * (size + gap), np.full(len(pts), size, np.int32), np.isin(number, keys),
                       np.isin(number, hidden))  # fmt: skip


CLOSED = packets([0, 3, 1, 2, 4, 7, 5, 6, 8, 11, 9, 10], [0, 4, 8])
OPEN = packets([0, 3, 1, 2, 6, 4, 5, 9, 7, 8, 12, 10, 11, 13], [0, 4, 10])  # 4, 5 and 10, 11 are shown before their key frames


@pytest.mark.parametrize(
    ("index", "wanted", "expected"),
    [
        (CLOSED, [0], [(0, 1)]),
        (CLOSED, [2], [(0, 4)]),
        (CLOSED, [3, 3, 3], [(0, 2)]),  # B-frames behind it in decode order are not its business
        (CLOSED, [1, 9], [(0, 3), (8, 11)]),  # tails and the GOP between are left out
        (CLOSED, [2, 4], [(0, 5)]),  # one run where nothing is left out between
        (CLOSED, [6, 10, 0], [(0, 1), (4, 12)]),
        (OPEN, [6], [(4, 5)]),
        (OPEN, [9], [(4, 8)]),
        (OPEN, [5], [(0, 7)]),
        (OPEN, [3, 5, 6], [(0, 7)]),
        (OPEN, [9, 10, 12], [(4, 12)]),
        (OPEN, [2, 13], [(0, 4), (10, 14)]),
        (packets([0, 1, 2, NO_PTS, 3, 4], [0, 3], (3,)), [4], [(0, 6)]),  # a key frame without a time: all may come before it
        (packets([5, 6, 7, 8], [2]), [6, 8], [(0, 4)]),  # a file that begins without a key frame
        (packets([5, 6, 7, 8], []), [7], [(0, 3)]),
    ],
)
def test_runs_hold_what_decoding_needs_and_no_more(index, wanted, expected):
    assert packet_decode.runs(index, np.array(wanted)) == expected


def test_a_time_between_frames_is_no_frame():
    for time in (-1, 12, 100):
        with pytest.raises(ValueError, match="no frame's"):
            packet_decode.runs(CLOSED, np.array([1, time]))
    with pytest.raises(ValueError, match="no frame's"):
        packet_decode.runs(packets([0, 1, 2], [0], (1,)), np.array([1]))


@given(data=st.data(), gops=st.lists(st.integers(1, 9), min_size=1, max_size=8), leading=st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_every_wanted_packet_has_all_before_it_back_to_its_key_frame(data, gops, leading):
    """For any GOPs, the first pictures after a key frame shown before it (or not), any frames wanted."""
    pts, keys = [], []
    for length in gops:
        early = min(leading, length - 1) if pts else 0
        base = len(pts)
        keys.append(base)
        pts += [base + early, *range(base, base + early), *range(base + early + 1, base + length)]
    index = packets(pts, keys)
    wanted = data.draw(st.lists(st.sampled_from(pts), min_size=1, max_size=6))
    spans = packet_decode.runs(index, np.array(wanted))
    sent = [packet for begin, end in spans for packet in range(begin, end)]
    assert sent == sorted(set(sent))
    assert all(begin in keys for begin, _ in spans)
    needed = set()
    for time in wanted:
        packet = pts.index(time)
        gop = max(k for k in range(len(keys)) if keys[k] <= packet)
        gop -= 1 if time < pts[keys[gop]] else 0
        needed |= set(range(keys[gop], packet + 1))
    assert set(sent) == needed


def test_bytes_are_read_at_once_unless_far_apart():
    index = packets([0, 1, 2, 3, 4, 5], [0, 2, 4], size=10, gap=90)
    assert packet_decode.byte_ranges(index, [(0, 1), (2, 4)], 1000) == [(100, 410)]
    assert packet_decode.byte_ranges(index, [(0, 1), (4, 6)], 200) == [(100, 110), (500, 610)]
    assert packet_decode.byte_ranges(index, [(0, 6)], 50) == [(100 + 100 * k, 110 + 100 * k) for k in range(6)]
    backwards = index._replace(pos=index.pos[::-1].copy())
    assert packet_decode.byte_ranges(backwards, [(0, 2)], 100) == [(500, 610)]


@pytest.mark.parametrize("skip", [True, False])
def test_frames_are_those_of_a_sequential_decode_from_any_parts(skip, tmp_path):
    data = encoded(90, bf="3", g="20")
    ref, row = catalogued(str(tmp_path), data)
    index, frames = catalog.packets(ref, row), sequential(data, 0)
    for wanted in ([3], [0, 89], [10, 30, 31, 55], list(range(90))):
        pts = catalog.frame_times(ref, row)[wanted]
        spans = packet_decode.runs(index, pts)
        for gap in (0, 1 << 20):
            parts = [(start, data[start:stop]) for start, stop in packet_decode.byte_ranges(index, spans, gap)]
            found = {f.pts: f for f in packet_decode.frames(row, index, spans, parts, set(pts.tolist()), skip=skip)}
            assert sorted(found) == pts.tolist()
            for time, frame in found.items():
                np.testing.assert_array_equal(frame.to_ndarray(), frames[time].to_ndarray())


def test_skipping_decodes_fewer_frames(tmp_path, monkeypatch):
    data = encoded(90, bf="3", g="30", **{"x264-params": "b-pyramid=normal:scenecut=0:b-adapt=0"})
    ref, row = catalogued(str(tmp_path), data)
    index, pts = catalog.packets(ref, row), catalog.frame_times(ref, row)[::8]
    spans = packet_decode.runs(index, pts)
    run, counts = packet_decode._run, {True: 0, False: 0}

    def counting(*arguments, skip):
        for frame in run(*arguments, skip=skip):
            counts[skip] += 1
            yield frame

    monkeypatch.setattr(packet_decode, "_run", counting)
    for skip in counts:
        list(packet_decode.frames(row, index, spans, [(0, data)], set(pts.tolist()), skip=skip))
    assert counts[False] == sum(end - begin for begin, end in spans)
    assert counts[True] < 0.7 * counts[False]


def test_what_does_not_come_out_is_said(tmp_path):
    data = encoded(20)
    ref, row = catalogued(str(tmp_path), data)
    index = catalog.packets(ref, row)
    with pytest.raises(packet_decode.Incomplete, match="1 of 2 frames"):
        list(packet_decode.frames(row, index, [(0, 5)], [(0, data)], {0, 1}, skip=False))
