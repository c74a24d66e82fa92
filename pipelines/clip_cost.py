"""What one clip of one video costs, measured: from the source, and from the same seconds normalised."""

import io
import resource
from collections.abc import Callable
from fractions import Fraction
from typing import IO, Any

import av
import numpy as np

from jepa_core.sampling import Crop
from pipelines.transcode import transcode
from pipelines.video import decode_clip, open_container

DECODES = 3
"""Decodes of each clip; the fastest counts, because a first one also warms caches."""

SHORTEST_S = 0.04


def measure(
    file: IO[bytes],
    *,
    stream: int,
    time_base: tuple[int, int],
    width: int,
    pts: list[int],
    last: int,
    crop: tuple[int, int, int, int, bool],
    size: int,
    **settings: Any,
) -> dict[str, float]:
    """CPU seconds and bytes of the clip at times `pts` [T], cropped and scaled to `size` pixels, both ways.

    `crop` (x, y, width, height, flip) is in pixels of the upright source, `width` pixels wide; `settings` are those of
    `transcode`, which is tried on the part from the key frame before the clip to `last`. Raises VideoRefused.
    """
    source_cpu = min(_cpu(file, lambda: decode_clip(file, stream, np.array(pts), Crop(*crop), size)) for _ in range(DECODES))
    started = _cpu_seconds()
    file.seek(0)
    made = transcode(file, stream=stream, span=(pts[0], last), **settings)
    encode_cpu = _cpu_seconds() - started
    result = io.BytesIO(made["data"])
    with av.open(result) as container:
        video = container.streams.video[0]
        ratio, ticks = video.width / width, video.time_base
        times = sorted(packet.pts for packet in container.demux(video) if packet.size)
    moved = [int((p + made["shift"]) * Fraction(*time_base) / ticks) for p in pts]
    side = [max(1, round(number * ratio)) for number in crop[2:4]]
    scaled = Crop(int(crop[0] * ratio), int(crop[1] * ratio), *side, crop[4])
    cpu = min(_cpu(result, lambda: decode_clip(result, 0, np.array(moved), scaled, size)) for _ in range(DECODES))
    seconds = max(SHORTEST_S, float((times[-1] - times[0]) * ticks) * len(times) / max(1, len(times) - 1))
    return {
        "source_clip_cpu_s": source_cpu,
        "source_clip_bytes": float(_clip_bytes(file, stream, pts)),
        "clip_cpu_s": cpu,
        "clip_bytes": float(_clip_bytes(result, 0, moved)),
        "encode_cpu_s": encode_cpu / seconds,
        "bytes_per_s": len(made["data"]) / seconds,
    }


def _cpu(file: IO[bytes], work: Callable[[], Any]) -> float:
    file.seek(0)
    started = _cpu_seconds()
    work()
    return _cpu_seconds() - started


def _cpu_seconds() -> float:
    """CPU time of this process. Under a limit of CPU time, `time.process_time` moves with the kernel's ticks only."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _clip_bytes(file: IO[bytes], stream: int, pts: list[int]) -> int:
    """Bytes of the packets from the key frame before the clip to its last frame, in decode order: one ranged request."""
    file.seek(0)
    wanted, total = set(pts), 0
    with open_container(file) as container:
        video = container.streams[stream]
        if pts[0] > (video.start_time or 0):
            container.seek(pts[0], stream=video, backward=True)
        for packet in container.demux(video):
            total += packet.size
            wanted.discard(packet.pts)
            if not wanted:
                break
    return total
