"""Episodes of DROID raw 1.0.1 as recordings: every camera that the metadata name, their states read once.

What an episode holds is what its metadata_*.json says; names of folders (colons, double underscores, dates that disagree with
the uuid) mean nothing, and stereo and SVO files are never looked at.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipelines import storage
from pipelines.robot import droid_raw
from pipelines.robot.mapping import resolved
from pipelines.robot.recording import Item, Reading, Recording, Refused
from pipelines.robot.refusals import EpisodeRefused

CAMERAS = {"left": "left_mp4_path", "right": "right_mp4_path", "wrist": "wrist_mp4_path"}
"""Our names of the cameras, and the metadata's keys of their videos."""


def items(root: str) -> Iterator[Item]:
    """One item for each folder with a trajectory.h5, in order of URI."""
    folders: dict[str, list[tuple[str, int, str]]] = {}
    found = set()
    for info in storage.list_files(root):
        folder, _, name = info.uri.rpartition("/")
        if name == droid_raw.TRAJECTORY_FILE:
            found.add(folder)
        is_video = name.endswith(".mp4") and not name.endswith("-stereo.mp4")
        if is_video and folder.endswith(f"/{droid_raw.VIDEO_FOLDER}"):
            folder = folder.removesuffix(f"/{droid_raw.VIDEO_FOLDER}")
        elif name != droid_raw.TRAJECTORY_FILE and not name.endswith(".json"):
            continue
        folders.setdefault(folder, []).append((info.uri, info.size, info.etag))
    for folder in sorted(found):
        told = hashlib.blake2b(json.dumps(folders[folder]).encode(), digest_size=16)
        yield Item(folder, told.hexdigest(), {"files": {uri: etag for uri, _, etag in folders[folder]}})


def read(item: Item, reading: Reading) -> Iterator[Recording | Refused]:
    """The recordings of one folder: a camera that is named but not there is refused, and so is an absent left one."""
    uri, etags = item.uri, item.payload["files"]
    files = list(etags)
    declared = resolved(reading.mapping, droid_raw.POSE)
    name, facts = uri.rpartition("/")[2], {"robot": declared.robot}
    try:
        metadata = droid_raw.read_metadata(uri, files)
        name = str(metadata.get("uuid") or name)
        facts |= {"task": str(metadata.get("current_task") or ""), "success": droid_raw.outcome(uri, metadata)}
        states, arrivals = droid_raw.read_steps(uri, files, declared)
    except EpisodeRefused as refusal:
        yield Refused(uri, name, "", refusal, **facts)
        return
    paths = camera_paths(metadata, declared.cameras)
    for camera, path in paths.items():
        if not path and camera != "left" and any(paths.values()):
            continue  # not recorded with: simulated episodes have one camera as a rule
        try:
            video = droid_raw.find_video(uri, files, path, f"video of the camera {camera}")
        except EpisodeRefused as refusal:
            yield Refused(uri, name, camera, refusal, **facts)
            continue
        arrived = arrivals.get(droid_raw.serial_of(video))
        times = None if arrived is None or arrived.ndim != 1 else arrived / 1000.0
        yield Recording(uri, name, camera, states, video, etags[video], times, **facts)


def camera_paths(metadata: dict[str, Any], declared: dict[str, str]) -> dict[str, str]:
    """Name of each camera -> the path of its video by the metadata, "" where they name none.

    Where they do not say which external camera is the left one, it is the one with the larger y (+y is the robot's left).
    """
    paths = {camera: str(metadata.get(key) or "") for camera, key in (declared or CAMERAS).items()}
    if declared or paths["left"] or paths["right"]:
        return paths
    sides = []
    for role in ("ext1", "ext2"):
        pose = np.asarray(metadata.get(f"{role}_cam_extrinsics") or [], object)
        if metadata.get(f"{role}_mp4_path") and len(pose) == 6:
            sides.append((float(pose[1]), str(metadata[f"{role}_mp4_path"])))
    if len(sides) == 2:
        paths["right"], paths["left"] = (path for _, path in sorted(sides))
    return paths
