"""MB/s of reading RLDS on one core: records, checksums, Examples, rows. `make bench-rlds ARGS="--mb 512"` or `--shard FILE`.

Without a shard it writes one as TFDS does for `droid_100`: episodes of 300 steps with three 180 x 320 JPEGs each. The file is
read once before it counts, so that the disk does not.
"""

import argparse
import io
import resource
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines import storage
from pipelines.robot import rlds
from pipelines.robot.crc32c import masked
from pipelines.robot.recording import Reading
from pipelines.robot.tfrecord import example, records
from pipelines.trajectories_config import MappingConfig
from pipelines.trajectories_rows import rows_of

STEPS = 300


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=512)
    parser.add_argument("--shard")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shard = options.shard or str(write(Path(folder) / "made-train.tfrecord-00000-of-00001", options.mb))
        measure(shard, options.repeats)


def measure(shard: str, repeats: int) -> None:
    """Best of some repeats, by CPU time and by the clock."""
    (item,) = rlds.items(shard)
    size = item.payload["size"]
    ways = {"records and checksums": only_records, "+ Examples": with_examples, "+ rows of the table": with_rows}
    print(f"{shard}: {size / 1e6:.0f} MB\n{'':24} {'MB per CPU second':>18} {'MB/s':>8}")
    with open(shard, "rb") as file:
        while file.read(1 << 24):
            pass
    for name, way in ways.items():
        best_cpu = best = float("inf")
        for _ in range(repeats):
            cpu, wall = time.process_time(), time.perf_counter()
            way(item)
            best_cpu, best = min(best_cpu, time.process_time() - cpu), min(best, time.perf_counter() - wall)
        print(f"{name:24} {size / 1e6 / best_cpu:18,.0f} {size / 1e6 / best:8,.0f}")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def only_records(item: rlds.Item) -> None:
    """Frames of the file and their checksums."""
    with storage.open_file(item.uri) as file:
        assert all(record.refusal is None for record in records(file, item.payload["size"]))


def with_examples(item: rlds.Item) -> None:
    """Also the places of all values."""
    with storage.open_file(item.uri) as file:
        assert all(example(record.data) for record in records(file, item.payload["size"]))


def with_rows(item: rlds.Item) -> None:
    """All that ingestion does in its task: states, statistics, the places of the pictures."""
    reading = Reading("physical", MappingConfig(), 15.0)
    rows = rows_of(item, rlds.read(item, reading), "rlds", "physical")
    assert rows
    assert not any(row.get("reason") for row in rows)


def write(path: Path, megabytes: int) -> Path:
    """A shard of at least so many MB, from 40 different pictures."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (40, 23, 40, 3), dtype=np.uint8)
    jpegs = []
    for picture in coarse:
        buffer = io.BytesIO()
        image = Image.fromarray(picture).resize((320, 180), Image.Resampling.BICUBIC)
        image = Image.fromarray(np.clip(np.asarray(image, int) + rng.integers(-12, 13, (180, 320, 3)), 0, 255).astype(np.uint8))
        image.save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    number = 0
    with open(path, "wb") as file:
        while file.tell() < megabytes * 1e6:
            data = _episode(jpegs, number)
            header = struct.pack("<Q", len(data))
            file.write(header + struct.pack("<I", masked(header)) + data + struct.pack("<I", masked(data)))
            number += 1
    return path


def _episode(jpegs: list[bytes], number: int) -> bytes:
    t = np.arange(STEPS) / 15
    pose = np.stack([0.5 + 0.1 * np.sin(t + number), 0.1 * t / 20, 0.3 + 0 * t, 3 + 0 * t, 0.1 * np.sin(t), 0 * t], axis=1)
    features = {
        "episode_metadata/file_path": [b"/data/IRIS/success/2023-08-06/x/trajectory.h5"],
        "steps/is_first": np.arange(STEPS) == 0,
        "steps/language_instruction": [b"put the cup on the plate"] * STEPS,
        "steps/observation/cartesian_position": pose.astype("<f4"),
        "steps/observation/gripper_position": np.clip(np.sin(t), 0, 1).astype("<f4"),
        "steps/action": np.zeros((STEPS, 7), "<f4"),
    }
    for camera, name in enumerate(("wrist_image_left", "exterior_image_1_left", "exterior_image_2_left")):
        features[f"steps/observation/{name}"] = [jpegs[(k + 7 * camera + number) % len(jpegs)] for k in range(STEPS)]
    entries = []
    for name, values in features.items():
        if isinstance(values, list):
            kind, packed = 1, b"".join(_field(1, value) for value in values)
        else:
            kind = 3 if values.dtype == bool else 2
            packed = _field(1, values.astype(np.uint8).tobytes() if kind == 3 else values.tobytes())
        entries.append(_field(1, _field(1, name.encode()) + _field(2, _field(kind, packed))))
    return _field(1, b"".join(entries))


def _field(number: int, data: bytes) -> bytes:
    size, length = len(data), b""
    while size >= 0x80:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


if __name__ == "__main__":
    main()
