"""Videos for the tests of clip reading: rows of a catalog without an ingest, and the frames that a sequential decode gives."""

import io
from typing import Any

import av
import numpy as np
from conftest import make_frames

from jepa_core.config import ClipConfig
from jepa_core.sampling import Stream, crop_box, generator
from pipelines import catalog, clip_reader, packet_index, sandbox, storage
from pipelines.catalog_schema import CatalogRef
from pipelines.clip_reader import ClipInfo
from pipelines.ingest_config import LimitsConfig
from pipelines.video import Scaler

PATCH = 16


def encoded(num_frames: int = 60, codec: str = "libx264", container: str = "mp4", pix_fmt: str = "yuv420p",
            size: tuple[int, int] = (96, 64), degrees: int = 0, colours: int = 2, pts: list[int] | None = None,
            seed: int = 0, **options: str) -> bytes:  # fmt: skip
    """A video of a moving texture; `pts` in 1/30 s, `degrees` its display rotation, `colours` its matrix as written beside it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=30, options={"threads": "1"} | options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.colorspace = colours
        if degrees:
            stream.set_display_rotation(degrees)
        for index, image in enumerate(make_frames(num_frames, *size, seed=seed)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts = pts[index] if pts else index
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def catalogued(root: str, data: bytes, *, before: bytes = b"", behind: bytes = b"", segment: int = 0, validate: str = "full",
               name: str = "video") -> tuple[CatalogRef, dict[str, Any]]:  # fmt: skip
    """A catalog at `root` and its row of one video, which stands in an object between other bytes.

    `segment` cuts its packet index into segments of so many packets. Raises VideoRefused.
    """
    facts, _ = sandbox.probe(sandbox.Source(len(data), lambda start, stop: data[start:stop]), LimitsConfig(), validate)
    uri, ref = storage.join(root, name), CatalogRef(storage.join(root, "catalog"), 0)
    storage.write_bytes(uri, before + data + behind)
    if segment:
        whole, packet_index.SEGMENT_PACKETS = packet_index.SEGMENT_PACKETS, segment
        try:
            facts["blob"], facts["index_directory"] = packet_index.encode(
                packet_index.decode(facts["blob"], facts["index_directory"])
            )
        finally:
            packet_index.SEGMENT_PACKETS = whole
    pack, packed, (_, at) = packet_index.write_pack([b"another's", facts["blob"]])
    storage.write_bytes(catalog.pack_uri(ref, pack), packed)
    row = {"cuts": None, "motion": None} | facts
    row |= {"id": name, "uri": uri, "offset": len(before), "size": len(data), "etag": storage.stat_many([uri])[uri].etag}
    row |= {"index_pack": pack, "index_offset": at, "index_size": len(facts["blob"])}
    return ref, {column: row[column] for column in (*clip_reader.COLUMNS, "index_size")}


def read(ref: CatalogRef, row: dict[str, Any], clip: ClipConfig, n: int = 0) -> tuple[np.ndarray, ClipInfo]:
    """Clip n of a video: frames uint8 [T, S, S, 3], put together from the tubelets."""
    depth, side = (1 if clip.num_frames == 1 else 2), clip.crop_size // PATCH
    out = np.full((clip.num_frames // depth, side, side, depth, PATCH, PATCH, 3), 77, np.uint8)
    info = clip_reader.read_clip(ref, row, clip, generator(0, Stream.CLIP, n), out)
    return out.transpose(0, 3, 1, 4, 2, 5, 6).reshape(clip.num_frames, clip.crop_size, clip.crop_size, 3), info


def drawn(ref: CatalogRef, row: dict[str, Any], clip: ClipConfig, n: int = 0) -> tuple[np.ndarray, Scaler]:
    """What clip n should show: the times of its frames, and the scaler of its crop."""
    rng = generator(0, Stream.CLIP, n)
    _, pts = clip_reader.clip_packets(ref, row, clip, float(rng.random()))
    crop = crop_box(row["width"], row["height"], clip, rng)
    return pts, Scaler(crop, clip.crop_size, row["rotation"], (row["width"], row["height"]))


def sequential(data: bytes, stream: int) -> dict[int, av.VideoFrame]:
    """All frames by their times, decoded one after another; a damaged packet loses what it loses."""
    found = {}
    with av.open(io.BytesIO(data)) as container:
        container.streams[stream].thread_count = 1
        for packet in container.demux(container.streams[stream]):
            if not packet.size and packet.dts is not None:
                continue  # Theora's repetition of a picture
            try:
                found |= {frame.pts: frame for frame in packet.decode()}
            except av.FFmpegError:
                continue
    return found


def assert_exact(ref: CatalogRef, row: dict[str, Any], data: bytes, clips: list[tuple[ClipConfig, int]]) -> set[str]:
    """Clips equal a sequential decode's frames through the same crop and scaler, bit for bit. Gives the ways they went."""
    frames, ways = sequential(data, row["stream"]), set()
    for clip, n in clips:
        shown, info = read(ref, row, clip, n)
        pts, scaler = drawn(ref, row, clip, n)
        assert (info.first_pts, info.last_pts) == (pts[0], pts[-1])
        for number, time in enumerate(pts.tolist()):
            np.testing.assert_array_equal(shown[number], scaler(frames[time]), err_msg=f"{info.way}, clip {n}, frame {number}")
        ways.add(info.way)
    return ways
