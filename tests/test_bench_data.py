"""`make bench-data` and `make soak`: that they run, and that they notice what they are for."""

import os
import subprocess
import sys
import time

import bench_data
import data_decoders as decoders
import data_tree
import numpy as np
import pytest
import soak
from clip_files import catalogued, encoded

from jepa_core.config import ClipConfig

CLIP = ClipConfig(num_frames=4, fps=10.0, crop_size=32)


@pytest.fixture
def video(tmp_path):
    """A video with B-frames, as the bench sees one."""
    ref, row = catalogued(str(tmp_path), encoded(60, g="12", bf="3"))
    return decoders.Video(ref, row, row["uri"])


def test_all_variants_show_the_same_times_and_ours_the_same_frames(video):
    works = decoders.works(video, CLIP, 3)
    truth = decoders.sequential(video, CLIP, works)
    for name in set(decoders.VARIANTS) - decoders.missing().keys():
        apart = bench_data._checked(name, video, CLIP, works, truth)
        assert (apart == 0) if name == decoders.OURS else (0 < apart < 30)


@pytest.mark.parametrize("name", [decoders.OURS, decoders.NAIVE])
def test_another_frame_or_another_time_ends_the_bench(video, monkeypatch, name):
    works = decoders.works(video, CLIP, 1)
    truth = decoders.sequential(video, CLIP, works)
    variant = decoders.VARIANTS[name]
    late = variant._replace(read=lambda *args: (read := variant.read(*args))._replace(seconds=[s + 1 / 30 for s in read.seconds]))
    monkeypatch.setitem(decoders.VARIANTS, name, late)
    with pytest.raises(SystemExit, match="other times"):
        bench_data._checked(name, video, CLIP, works, truth)
    monkeypatch.setitem(decoders.VARIANTS, name, variant)
    with pytest.raises(SystemExit, match="other frames"):
        bench_data._checked(name, video, CLIP, works, [frames[::-1] for frames in truth])


def test_the_floor_counts_the_packets_that_a_clip_needs(video):
    """Of packets K . a . | K b . c with a, b and c wanted: 3 + 4, the tail of the first GOP is not sent."""
    packets = [(0, True), (20, False), (10, False), (30, False), (40, True), (50, False), (70, False), (60, False)]
    kept = {0, 10, 40, 50}
    assert decoders.Floor._packets(packets, kept, np.array([10, 50, 60])) == (3 + 4, 1, 3)
    assert decoders.Floor._packets(packets, kept, np.array([40])) == (1, 0, 1)
    if decoders.has_ffmpeg():
        works = decoders.works(video, CLIP, 2)
        floor = decoders.Floor(video, CLIP, works)
        assert floor.packets == 60
        assert 0 < floor.nonref < 45
        assert all(1 <= sent <= 60 and frames == 4 for sent, _, frames in floor.clips.values())


def test_quick_bench_runs(tmp_path):
    command = [sys.executable, bench_data.__file__, "--quick", "--only", "decode,requests", "--folder", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ours |")]
    assert len(rows) == len(bench_data.BLOCKS)
    claims = [line for line in result.stdout.partition("| claim |")[2].splitlines()[2:] if line.startswith("| ")]
    assert len(claims) == 5
    assert all(line.endswith("| yes |") for line in claims)


def samples(mb_a_minute: float, files_a_minute: float, minutes: float = 10.0) -> list[soak.Sample]:
    """A tree that takes 1000 MB in its first two minutes and then grows evenly, with noise."""
    rng = np.random.default_rng(0)
    times = np.arange(0, minutes, 1 / 30)
    return [
        soak.Sample(t, 500 * min(t, 2) + mb_a_minute * t + rng.normal(0, 2), 300, 50, int(100 + files_a_minute * t), 9)
        for t in times
    ]


def test_growth_is_told_from_noise():
    flat = soak.growth_of(samples(0.0, 0.0))
    assert abs(flat.mb_a_minute) < 0.5 < soak.MB_A_MINUTE
    assert flat.files == 0
    leak = soak.growth_of(samples(3.0, 4.0))
    assert leak.mb_a_minute == pytest.approx(3.0, abs=0.5)
    assert leak.error < 0.5
    assert leak.files > soak.SPARE_FILES


def test_usage_counts_children_memory_and_files(tmp_path):
    code = "import sys, time; a = bytearray(64 << 20); f = [open(__file__) for _ in range(9)]; print(flush=True); time.sleep(60)"
    script = tmp_path / "child.py"
    script.write_text(code)
    before, _ = data_tree.usage(os.getpid())
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        during, own = data_tree.usage(os.getpid())
        began = time.process_time()
        assert data_tree.cpu_s(os.getpid()) >= began
        child.kill()
    assert child.pid not in data_tree.processes(os.getpid())
    assert during.processes == before.processes + 1
    assert during.own_mb - before.own_mb > 60
    assert own[child.pid][0].endswith("child.py")
    assert during.files - before.files >= 9
