"""Ways to read one clip, for bench_data: ours, and what others do. All show the same frames through the same crop.

Legend: T frames of a clip, S crop size in pixels.
"""

import os
import resource
import shutil
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F

from jepa_core.config import PATCH_SIZE, TUBELET_SIZE, ClipConfig
from jepa_core.sampling import Crop, Stream, crop_box, generator
from pipelines import catalog, clip_reader
from pipelines.catalog_schema import CatalogRef
from pipelines.packet_index import shown
from pipelines.video import Scaler

SEED = 0
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1) * 255
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1) * 255
NONREF = "NONREF"


class Video(NamedTuple):
    """A video as the catalog knows it, and as a plain file for readers that want one."""

    ref: CatalogRef
    row: dict[str, Any]
    path: str


class Work(NamedTuple):
    """One clip to read: its sample number, the times of its frames (pts, and frame numbers) [T], the crop in the picture."""

    n: int
    pts: np.ndarray
    numbers: np.ndarray
    crop: Crop


class Read(NamedTuple):
    """What a variant gives: its array in its own layout, and the time of each frame in seconds."""

    array: Any
    seconds: list[float]


class Variant(NamedTuple):
    """A name, the reading that is measured, and how its array becomes float32 [T, S, S, 3] afterwards."""

    name: str
    read: Callable[[Video, ClipConfig, Work], Read]
    pictures: Callable[[Any, ClipConfig], np.ndarray]


def works(video: Video, clip: ClipConfig, count: int) -> list[Work]:
    """Clips 0 to count - 1 of a video, drawn as training draws them."""
    row = video.row
    times = shown(catalog.packets(video.ref, row))
    found = []
    for n in range(count):
        rng = generator(SEED, Stream.CLIP, n)
        _, pts = clip_reader.clip_packets(video.ref, row, clip, float(rng.random()))
        crop = crop_box(row["width"], row["height"], clip, rng)
        found.append(Work(n, pts, np.searchsorted(times, pts), crop))
    return found


def cpu_s() -> float:
    """User and system time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# ---- ours


def ours(video: Video, clip: ClipConfig, work: Work) -> Read:
    """As a decode task reads it, into the tubelets that the encoder takes."""
    side = clip.crop_size // PATCH_SIZE
    out = np.empty((clip.num_frames // TUBELET_SIZE, side, side, TUBELET_SIZE, PATCH_SIZE, PATCH_SIZE, 3), np.uint8)
    info = clip_reader.read_clip(video.ref, video.row, clip, generator(SEED, Stream.CLIP, work.n), out)
    assert (info.first_pts, info.last_pts, info.way) == (work.pts[0], work.pts[-1], clip_reader.PACKETS)
    return Read(out, (work.pts * video.row["time_base_num"] / video.row["time_base_den"]).tolist())


def untiled(out: np.ndarray, clip: ClipConfig) -> np.ndarray:
    """Tubelets back to frames: uint8 [T, S, S, 3]."""
    return out.transpose(0, 3, 1, 4, 2, 5, 6).reshape(clip.num_frames, clip.crop_size, clip.crop_size, 3)


def sequential(video: Video, clip: ClipConfig, wanted: list[Work]) -> list[np.ndarray]:
    """The clips as a decode of the whole file from its start gives them, scaled as ours: uint8 [T, S, S, 3] each."""
    row = video.row
    scalers = [Scaler(work.crop, clip.crop_size, row["rotation"], (row["width"], row["height"])) for work in wanted]
    places = [{int(p): place for place, p in enumerate(work.pts)} for work in wanted]
    found = [np.zeros((clip.num_frames, clip.crop_size, clip.crop_size, 3), np.uint8) for _ in wanted]
    with av.open(video.path) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        stream.codec_context.colorspace, stream.codec_context.color_range = 2, 0  # what the coded frames say, as ours
        for frame in container.decode(stream):
            for scaler, place, out in zip(scalers, places, found, strict=True):
                if frame.pts in place:
                    out[place[frame.pts]] = scaler(frame)
    return found


# ---- others


def pyav(video: Video, clip: ClipConfig, work: Work) -> Read:
    """The usual loop: seek to the key frame, decode everything up to the last frame, full-size RGB of the wanted ones."""
    places = {int(p): place for place, p in enumerate(work.pts)}
    frames, seconds = [None] * len(places), [0.0] * len(places)
    with av.open(video.path) as container:
        stream = container.streams.video[0]
        container.seek(int(work.pts[0]), stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts in places:
                frames[places[frame.pts]] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                seconds[places[frame.pts]] = frame.time
            if frame.pts >= work.pts[-1]:
                break
    return Read(_resized(torch.stack(frames), clip, work.crop), seconds)


def decord_reference(video: Video, clip: ClipConfig, work: Work) -> Read:
    """V-JEPA 2's loader: all threads, frames at full size, everything to float32, then crop, resize, flip and normalise."""
    buffer, seconds = _decord(video, work)
    frames = torch.tensor(buffer, dtype=torch.float).permute(3, 0, 1, 2)
    box = work.crop
    frames = frames[:, :, box.y : box.y + box.height, box.x : box.x + box.width]
    frames = F.interpolate(frames, (clip.crop_size, clip.crop_size), mode="bilinear", align_corners=False)
    frames = frames.flip(-1) if box.flip else frames
    return Read(frames.sub_(MEAN).div_(STD), seconds)


def decord_lean(video: Video, clip: ClipConfig, work: Work) -> Read:
    """The same call of decord, but only the crop is made float."""
    buffer, seconds = _decord(video, work)
    return Read(_resized(torch.from_numpy(buffer), clip, work.crop, antialias=False), seconds)


def _decord(video: Video, work: Work) -> tuple[np.ndarray, list[float]]:
    from decord import VideoReader, cpu

    reader = VideoReader(video.path, num_threads=-1, ctx=cpu(0))
    reader.get_avg_fps()
    reader.seek(0)
    buffer = reader.get_batch(work.numbers).asnumpy()
    return buffer, [float(reader.get_frame_timestamp(int(n))[0]) for n in work.numbers]


def torchcodec(mode: str) -> Callable[[Video, ClipConfig, Work], Read]:
    """One thread, crop and resize in the decoder."""

    def read(video: Video, clip: ClipConfig, work: Work) -> Read:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import RandomCrop, Resize

        class Box(RandomCrop):
            """The decoder crops where it is told to; its public classes choose the place at random."""

            def _make_transform_spec(self, input_dims: tuple[int | None, int | None]) -> str:
                return f"crop, {work.crop.height}, {work.crop.width}, {work.crop.x}, {work.crop.y}"

        transforms = [Box((work.crop.height, work.crop.width)), Resize((clip.crop_size, clip.crop_size))]
        decoder = VideoDecoder(video.path, seek_mode=mode, transforms=transforms)
        batch = decoder.get_frames_at(work.numbers.tolist())
        return Read(batch.data.flip(-1) if work.crop.flip else batch.data, batch.pts_seconds.tolist())

    return read


def _resized(frames: torch.Tensor, clip: ClipConfig, box: Crop, *, antialias: bool = True) -> torch.Tensor:
    """uint8 [T, H, W, 3] -> uint8 [T, 3, S, S]."""
    cropped = frames[:, box.y : box.y + box.height, box.x : box.x + box.width].permute(0, 3, 1, 2).float()
    size = (clip.crop_size, clip.crop_size)
    small = F.interpolate(cropped, size, mode="bilinear", align_corners=False, antialias=antialias)
    small = small.flip(-1) if box.flip else small
    return small.round_().clamp_(0, 255).to(torch.uint8)


def _channels_last(array: torch.Tensor, _: ClipConfig) -> np.ndarray:
    return array.permute(0, 2, 3, 1).numpy()


def _denormalised(array: torch.Tensor, _: ClipConfig) -> np.ndarray:
    return (array * STD + MEAN).permute(1, 2, 3, 0).numpy()


OURS, NAIVE, DECORD, DECORD_LEAN = "ours", "PyAV, the usual loop", "decord, V-JEPA 2's loader", "decord, only the crop to float"
EXACT, APPROXIMATE = "torchcodec exact", "torchcodec approximate"
VARIANTS = {
    OURS: Variant(OURS, ours, untiled),
    NAIVE: Variant(NAIVE, pyav, _channels_last),
    DECORD: Variant(DECORD, decord_reference, _denormalised),
    DECORD_LEAN: Variant(DECORD_LEAN, decord_lean, _channels_last),
    EXACT: Variant(EXACT, torchcodec("exact"), _channels_last),
    APPROXIMATE: Variant(APPROXIMATE, torchcodec("approximate"), _channels_last),
}


def missing() -> dict[str, str]:
    """{variant that cannot run here: why}."""
    found = {}
    for names, package in (((DECORD, DECORD_LEAN), "decord"), ((EXACT, APPROXIMATE), "torchcodec.decoders")):
        try:
            __import__(package)
        except (ImportError, OSError, RuntimeError) as error:
            found |= dict.fromkeys(names, f"{package.partition('.')[0]} does not load: {str(error).strip().splitlines()[0]}")
    return found


# ---- the floor


class Rates(NamedTuple):
    """CPU seconds: of a packet where non-reference frames are skipped, of a decoded non-reference frame, of scaling a frame."""

    packet: float
    nonref: float
    scale: float


class Floor:
    """What `ffmpeg -threads 1` alone would take for a clip: each packet from the governing key frames to the last wanted frame of
    their GOP at the rate of a decode that skips non-reference frames, the wanted non-reference frames, and T times scaling.

    Rates are of the whole file: decoded, decoded with skipping, decoded with crop and scale, each less what starting takes.
    """

    def __init__(self, video: Video, clip: ClipConfig, wanted: list[Work]) -> None:
        self.path = video.path
        areas = [work.crop.width * work.crop.height for work in wanted]
        box = wanted[areas.index(statistics.median_high(areas))].crop
        self.filter = (
            f"crop={box.width}:{box.height}:{box.x}:{box.y},scale={clip.crop_size}:{clip.crop_size}:flags=bilinear,format=rgb24"
        )
        with av.open(self.path) as container:
            packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
        with av.open(self.path) as container:
            stream = container.streams.video[0]
            stream.codec_context.skip_frame = NONREF
            kept = {frame.pts for frame in container.decode(stream)}
        self.packets, self.nonref = len(packets), len(packets) - len(kept)
        self.clips = {work.n: self._packets(packets, kept, work.pts) for work in wanted}

    @staticmethod
    def _packets(packets: list[tuple[int, bool]], kept: set[int], pts: np.ndarray) -> tuple[int, int, int]:
        """(packets sent, wanted frames that nothing refers to, frames)."""
        wanted, sent, open_packets = set(pts.tolist()), 0, 0
        for time, key in packets:
            open_packets = 1 if key else open_packets + 1
            if time in wanted:
                sent, open_packets = sent + open_packets, 0
        return sent, len(wanted - kept), len(pts)

    def rates(self) -> Rates:
        """Measured now."""
        start = self._cpu_s("-c", "copy", "-frames:v", "1")
        plain = self._cpu_s() - start
        skipped = self._cpu_s(before=("-skip_frame", "noref")) - start
        scaled = self._cpu_s("-vf", self.filter, "-pix_fmt", "rgb24") - start
        return Rates(skipped / self.packets, max(0.0, plain - skipped) / max(1, self.nonref), (scaled - plain) / self.packets)

    def cpu_s(self, rates: Rates, work: Work) -> float:
        """Of one clip."""
        sent, nonref, frames = self.clips[work.n]
        return sent * rates.packet + nonref * rates.nonref + frames * rates.scale

    def _cpu_s(self, *options: str, before: tuple[str, ...] = ()) -> float:
        command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-filter_threads", "1", *before, "-i", self.path]
        command += ["-an", "-fps_mode", "passthrough", *options, "-f", "null", "-"]
        child = os.posix_spawnp("ffmpeg", command, os.environ)
        _, status, used = os.wait4(child, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed")
        return used.ru_utime + used.ru_stime


def has_ffmpeg() -> bool:
    """The floor is measured with the program itself."""
    return bool(shutil.which("ffmpeg"))
