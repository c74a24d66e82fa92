"""jepa ask: a question about one video, answered on the terminal, with the frames that were looked at as a picture on request.

The file is probed in the sandbox, as ingestion does, and its frames are read as those of a catalog are; no catalog is needed.

Legend: T frames, S side of what is shown in pixels, N tubelets, V values of one.
"""

from typing import Any

import av
import numpy as np
import torch

from pipelines import align_media, frame_sheet, packet_index, sandbox, storage, vidqa_scoring
from pipelines.clip_items import square_crop
from pipelines.errors import InputRefused
from pipelines.ingest_config import LimitsConfig
from pipelines.language_model import Answerer, Prompt, load_video_language_model
from pipelines.progress import Reporter
from pipelines.video import VideoRefused, decode_clip, tubelets
from pipelines.vidqa_config import AskConfig

SHEET_FRAMES = 16
"""Frames of a picture at most."""


def run(config: AskConfig, reporter: Reporter) -> dict[str, Any]:
    """Answer. Returns the answer, and what was asked for besides.

    Raises InputRefused for a file that holds no video that can be used, and for what is no run of jepa align.
    """
    model = load_video_language_model(config.model, config.device)
    shown, seconds = frames(config, model)
    still, encoder = len(shown) == 1, model.encoder.config
    cut = tubelets(shown, 1 if still else encoder.tubelet_size, encoder.patch_size)
    visual = model.encode(torch.from_numpy(cut)[None])[0]
    turns = [("user", vidqa_scoring.plain(config.question))]
    result: dict[str, Any] = {"answer": model.generate([Prompt(turns, visual)], config.max_new_tokens)[0]}
    if config.blind:
        result["blind"] = model.generate([Prompt(turns, None)], config.max_new_tokens)[0]
    if config.options:
        ways = {"video": visual, "blind": None} if config.blind else {"video": visual}
        scores = {way: model.score([Prompt(turns, seen)], [config.options])[0].total for way, seen in ways.items()}
        rows = [(option, *(f"{scores[way][n]:.2f}" for way in ways)) for n, option in enumerate(config.options)]
        reporter.table("log-likelihood of each option", ("option", *ways), rows)
        result["likeliest"] = config.options[int(np.argmax(scores["video"]))]
    if config.frames:
        storage.write_bytes(storage.normalize(config.frames), sheet(config, result["answer"], shown, seconds))
        result["frames"] = config.frames
    return result


def frames(config: AskConfig, model: Answerer) -> tuple[np.ndarray, np.ndarray]:
    """(what the model is shown, uint8 [T, S, S, 3]; when it is on screen, in seconds after the first frame, [T])."""
    uri = storage.normalize(config.video)
    info = storage.stat_many([uri])[uri]
    if info is None:
        raise InputRefused(f"{config.video} does not exist: give the path of a video")
    try:
        facts, _ = sandbox.probe(sandbox.item_source(uri, 0, info.size, info.etag), LimitsConfig(), validate="none")
        pts = packet_index.shown(packet_index.decode(facts["blob"], facts["index_directory"]))
        unit = facts["time_base_num"] / facts["time_base_den"]
        if config.start is not None and config.start > (pts[-1] - pts[0]) * unit:
            raise InputRefused(f"start={config.start:g}: {config.video} ends after {(pts[-1] - pts[0]) * unit:.2f} s")
        clip = model.clip
        wanted = align_media.spread(pts, unit, 1 if len(pts) == 1 else clip.num_frames, config.start, config.end)
        crop = square_crop(facts["width"], facts["height"], 0, 1)
        with storage.open_file(uri, offset=0, size=info.size, etag=info.etag) as file:
            shown = decode_clip(file, facts["stream"], wanted, crop, clip.crop_size)
    except VideoRefused as refusal:
        raise InputRefused(f"{config.video} cannot be shown: {refusal.reason} ({refusal.detail})") from refusal
    except av.FFmpegError as error:
        raise InputRefused(f"{config.video} does not decode: {error}") from error
    return shown, (wanted - pts[0]) * unit


def sheet(config: AskConfig, answer: str, shown: np.ndarray, seconds: np.ndarray) -> bytes:
    """PNG of the frames [T, S, S, 3] with their times, the question and the answer."""
    chosen = frame_sheet.picked(len(shown), SHEET_FRAMES)
    half = -(-len(chosen) // 2) if len(chosen) > 8 else len(chosen)
    rows = [
        frame_sheet.Row(f"{seconds[part[0]]:.2f} to {seconds[part[-1]]:.2f} s", shown[part])
        for part in (chosen[:half], chosen[half:])
        if len(part)
    ]
    return frame_sheet.draw([frame_sheet.Block(f"answer: {answer}", rows)], config.question)
