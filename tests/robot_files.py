"""Files of robots in exactly the public layouts, written by tests: DROID raw 1.0.1, RLDS as TFDS stores it, LeRobot v3."""

import io
import json
import struct
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import encode
from PIL import Image
from tensorboardX.record_writer import masked_crc32c

from pipelines import trajectories_layouts
from pipelines.robot.recording import Reading
from pipelines.trajectories_config import MappingConfig
from pipelines.trajectories_rows import rows_of
from pipelines.trajectories_schema import TRAJECTORY_SCHEMA

SERIALS = {"wrist": "13062452", "ext1": "20103212", "ext2": "23404442"}
OBSERVATION = "steps/observation/"
CAMERAS = {"wrist": "wrist_image_left", "exterior_1": "exterior_image_1_left", "exterior_2": "exterior_image_2_left"}


def poses(count: int, seed: int = 0) -> np.ndarray:
    """States float64 [F, 7] of a smooth motion of a gripper that points down: its roll wraps at +-pi."""
    t = np.arange(count) / 15 + seed
    roll = np.pi + 0.1 * np.sin(2 * t)
    roll = (roll + np.pi) % (2 * np.pi) - np.pi
    columns = [0.5 + 0.1 * np.sin(t), 0.2 * np.cos(t), 0.3 + 0.05 * np.sin(3 * t), roll, 0.1 * np.cos(t), 0.3 * np.sin(t)]
    return np.stack([*columns, np.clip(np.sin(t), 0, 1)], axis=1)


def pictures(count: int, seed: int = 0, width: int = 96, height: int = 54) -> np.ndarray:
    """Frames uint8 [F, H, W, 3]; the brightness of each tells its number, below 59."""
    noise = np.random.default_rng(seed).integers(0, 3, (height, width, 3), dtype=np.uint8)
    return np.stack([noise + np.uint8(16 + 4 * (k % 59)) for k in range(count)])


def number_of(image: np.ndarray) -> int:
    """Which of `pictures` a decoded frame is."""
    return round((float(image.mean()) - 17.0) / 4)


def write_droid(root: Path, count: int = 40, seed: int = 0, *, success: bool = True, header_fps: int = 60, lost: int = 0,
                jitter: bool = True) -> Path:  # fmt: skip
    """One episode folder of a lab. `lost` frames lack at the end of the videos. Gives the folder."""
    folder = root / "IRIS" / ("success" if success else "failure") / "2023-08-06" / f"Sun_Aug__6_22:13:{seed:02d}_2023"
    videos = folder / "recordings" / "MP4"
    videos.mkdir(parents=True)
    (folder / "recordings" / "SVO").mkdir()
    relative = folder.relative_to(root / "IRIS").as_posix().replace("2023-08-06", "2023-08-05")  # filed under another date
    uuid = f"IRIS+7dfa2da3+2023-08-05-22h-13m-{seed:02d}s"
    metadata = {"uuid": uuid, "lab": "IRIS", "success": success, "current_task": "Put the cup on the plate",
                "hdf5_path": f"{relative}/trajectory.h5", "trajectory_length": count,
                "left_mp4_path": f"{relative}/recordings/MP4/{SERIALS['ext1']}.mp4",
                "right_mp4_path": f"{relative}/recordings/MP4/{SERIALS['ext2']}.mp4"}  # fmt: skip
    for number, (role, serial) in enumerate(SERIALS.items()):
        (videos / f"{serial}.mp4").write_bytes(
            encode(pictures(count - lost, seed + number), rate=header_fps, options={"bf": "0", "crf": "8"})
        )
        metadata[f"{role}_cam_serial"] = serial
        metadata[f"{role}_mp4_path"] = f"{relative}/recordings/MP4/{serial}.mp4"
        metadata[f"{role}_svo_path"] = f"{relative}/recordings/SVO/{serial}.svo"
    (videos / f"{SERIALS['ext1']}-stereo.mp4").write_bytes(b"side by side")
    (folder / "recordings" / "SVO" / f"{SERIALS['ext1']}.svo").write_bytes(b"svo")
    (folder / f"metadata_{uuid}.json").write_text(json.dumps(metadata))
    (folder / "a_timestamps.json").write_text("{}")  # the first *.json of the folder, which is not the metadata
    rng = np.random.default_rng(seed)
    late = rng.integers(-3, 4, count) if jitter else np.zeros(count, int)
    arrived = 1691352780000 + np.rint(np.arange(count) * 1000 / 15).astype(np.int64) + late
    states = poses(count, seed)
    with h5py.File(folder / "trajectory.h5", "w") as file:
        file["observation/robot_state/cartesian_position"] = states[:, :6]
        file["observation/robot_state/gripper_position"] = states[:, 6]
        file["observation/robot_state/joint_positions"] = np.zeros((count, 7))
        file["action/cartesian_position"] = states[:, :6]
        for serial in (*SERIALS.values(), "99999999"):  # calibrated cameras that were not recorded are there as well
            file[f"observation/camera_extrinsics/{serial}_left"] = np.zeros((count, 6))
            for name in ("read_start", "read_end", "frame_received", "estimated_capture"):
                file[f"observation/timestamp/cameras/{serial}_{name}"] = arrived
    return folder


def record(data: bytes) -> bytes:
    """One record of a TFRecord file; its checksums are tensorboardX's."""
    header = struct.pack("<Q", len(data))
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))


def varint(value: int) -> bytes:
    out = b""
    value &= (1 << 64) - 1
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(features: dict[str, list]) -> bytes:
    """tf.train.Example of lists of bytes, floats (packed) or ints (packed)."""
    entries = b""
    for name, values in features.items():
        if values and isinstance(values[0], bytes):
            feature = field(1, b"".join(field(1, value) for value in values))
        elif values and isinstance(values[0], float):
            feature = field(2, field(1, struct.pack(f"<{len(values)}f", *values)))
        else:
            feature = field(3, field(1, b"".join(varint(value) for value in values)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def rlds_episode(count: int = 30, seed: int = 0, *, success: bool = True, cameras: dict[str, str] = CAMERAS) -> dict[str, list]:
    """Features of one episode of `droid`, by name."""
    states = poses(count, seed)
    folder = f"/nfs/kun2/datasets/r2d2/IRIS/{'success' if success else 'failure'}/2023-08-06/episode{seed}"
    features = {
        "episode_metadata/file_path": [f"{folder}/trajectory.h5".encode()],
        "episode_metadata/recording_folderpath": [f"{folder}/recordings/MP4".encode()],
        "steps/is_first": [int(k == 0) for k in range(count)],
        "steps/is_last": [int(k == count - 1) for k in range(count)],
        "steps/is_terminal": [int(k == count - 1) for k in range(count)],
        "steps/discount": [1.0] * count,
        "steps/reward": [0.0] * (count - 1) + [1.0],
        "steps/language_instruction": [b"put the cup on the plate"] * count,
        "steps/language_instruction_2": [b""] * count,
        "steps/action": [0.0] * (7 * count),
        "steps/action_dict/gripper_velocity": [0.0] * count,
        f"{OBSERVATION}cartesian_position": states[:, :6].ravel().tolist(),
        f"{OBSERVATION}gripper_position": states[:, 6].tolist(),
        f"{OBSERVATION}joint_position": [0.0] * (7 * count),
    }
    for number, name in enumerate(cameras.values()):
        features[f"{OBSERVATION}{name}"] = [jpeg(image) for image in pictures(count, seed + number)]
    return features


def write_rlds(root: Path, shards: list[list[dict[str, list]]]) -> list[Path]:
    """A TFDS folder `droid_100/1.0.0` with these episodes in each shard."""
    folder = root / "droid_100" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "features.json").write_text("{}")
    paths = []
    for number, episodes in enumerate(shards):
        paths.append(folder / f"r2d2_faceblur-train.tfrecord-{number:05d}-of-{len(shards):05d}")
        paths[-1].write_bytes(b"".join(record(example(features)) for features in episodes))
    return paths


def write_lerobot(root: Path, columns: list[dict[str, np.ndarray]], cameras: dict[str, list[float]], *, fps: int = 15,
                  codec: str = "libx264", gap: int = 0, version: str = "v3.0", robot: str = "panda", rate: int = 0,
                  video_frames: int = 0) -> Path:  # fmt: skip
    """A v3 dataset of one Parquet file: `columns` of each episode; `cameras` gives each one's drift of from_timestamp in seconds.

    All episodes of a camera lie in one video, `gap` frames apart; the second camera begins with three frames of nobody's.
    """
    features = {name: {"dtype": "float32", "shape": list(values.shape[1:]), "names": None} for name, values in columns[0].items()}
    tables, episodes, row = [], [], 0
    for number, values in enumerate(columns):
        count = len(next(iter(values.values())))
        frame = np.arange(count)
        data = {name: list(array.astype(np.float32)) if array.ndim > 1 else array for name, array in values.items()}
        steps = {"timestamp": (frame / fps).astype(np.float32), "frame_index": frame, "episode_index": np.full(count, number),
                 "index": row + frame, "task_index": np.zeros(count, int)}  # fmt: skip
        tables.append(pa.table({**data, **steps}))
        episodes.append({"episode_index": number, "tasks": ["stack the cubes"], "length": count, "dataset_from_index": row,
                         "dataset_to_index": row + count, "data/chunk_index": 0, "data/file_index": 0})  # fmt: skip
        row += count
    for place, (camera, drift) in enumerate(cameras.items()):
        key, images, at = f"observation.images.{camera}", [pictures(3, 9)] if place else [], 3 if place else 0
        for number, episode in enumerate(episodes):
            length = episode["length"]
            images += [pictures(length, number), *([pictures(gap, 7)] if gap else [])]
            episode |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0,
                        f"videos/{key}/from_timestamp": at / fps + drift[number],
                        f"videos/{key}/to_timestamp": (at + length) / fps + drift[number]}  # fmt: skip
            at += length + gap
        features[key] = {"dtype": "video", "shape": [54, 96, 3], "names": ["height", "width", "channels"],
                         "info": {"video.fps": fps, "video.codec": "av1"}}  # fmt: skip
        path = root / "videos" / key / "chunk-000" / "file-000.mp4"
        path.parent.mkdir(parents=True)
        frames = np.concatenate(images)
        options = {"preset": "12", "crf": "20"} if codec == "libsvtav1" else {"crf": "12"}
        path.write_bytes(encode(frames[: video_frames or None], codec, rate=rate or fps, options={**options, "g": "2"}))
    info = {"codebase_version": version, "robot_type": robot, "total_episodes": len(columns), "total_frames": row, "fps": fps,
            "features": features, "splits": {"train": f"0:{len(columns)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}  # fmt: skip
    for name in ("data/chunk-000", "meta/episodes/chunk-000"):
        (root / name).mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.Table.from_pylist(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    return root


def read_rows(root, layout="auto", time_base="physical", mapping=None) -> pa.Table:
    """All rows below a folder, without Ray."""
    root = str(root)
    found = trajectories_layouts.detect(root, layout)
    reading = Reading(time_base, mapping or MappingConfig(), 15.0)
    rows = []
    for item in trajectories_layouts.items(root, found, reading):
        rows += rows_of(item, trajectories_layouts.READERS[found](item, reading), found, time_base)
    return pa.Table.from_pylist(rows, TRAJECTORY_SCHEMA).sort_by([("uri", "ascending"), ("camera", "ascending")])


def states_of(row) -> np.ndarray:
    """float64 [F, 7] of a row."""
    return np.array(row["states"]).reshape(-1, 7)
