"""Readers of trajectories: the layouts' traps, damaged files, units, parity with the reference where the header counts."""

import io
import json
import math
import os

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import robot_files as files
import torch
from robot_files import read_rows as read
from robot_files import states_of
from scipy.spatial.transform import Rotation
from tensorboardX.crc32c import crc32c as crc32c_in_python

from jepa_core.poses import deltas as torch_deltas
from pipelines import storage, trajectories
from pipelines.errors import InputRefused, UsageError
from pipelines.robot import mapping as mapping_module
from pipelines.robot.crc32c import crc32c
from pipelines.robot.refusals import REASONS, EpisodeRefused
from pipelines.robot.tfrecord import example, records
from pipelines.trajectories_config import (
    EpisodeChoice,
    GripperConfig,
    MappingConfig,
    PositionConfig,
    RotationConfig,
    TrajectoriesConfig,
)
from pipelines.video import VideoRefused

pytestmark = pytest.mark.robot


def reasons(table) -> dict[str, str]:
    return {row["camera"]: row["reason"] for row in table.to_pylist() if row["reason"]}


# DROID raw


def test_droid_raw_every_camera_by_the_metadata(tmp_path):
    files.write_droid(tmp_path, seed=1)
    files.write_droid(tmp_path, seed=2, success=False)
    table = read(tmp_path)
    assert table["camera"].to_pylist() == ["left", "right", "wrist"] * 2  # failures sort first
    assert table["success"].to_pylist() == [False] * 3 + [True] * 3
    assert not reasons(table)
    for row, serial in zip(table.to_pylist(), ("ext1", "ext2", "wrist") * 2, strict=True):
        assert row["video_uri"].endswith(f"/{files.SERIALS[serial]}.mp4")
        assert (row["layout"], row["robot"], row["task"]) == ("droid_raw", "franka", "Put the cup on the plate")
        np.testing.assert_array_equal(states_of(row), files.poses(40, 1 if row["success"] else 2))
        assert row["num_frames"] == 40
        assert row["seconds_per_frame"] == pytest.approx(1 / 15, abs=0.004)
    assert "Sun_Aug__6_22:13:01" in table["uri"][3].as_py()
    assert len(set(table["id"].to_pylist())) == 6


def test_the_header_lies_by_a_factor_of_four(tmp_path):
    files.write_droid(tmp_path, 130)
    physical, header = read(tmp_path).slice(0, 1), read(tmp_path, time_base="header").slice(0, 1)
    assert header["seconds_per_frame"][0].as_py() == pytest.approx(1 / 60)
    _, frames = trajectories.sample_trajectory(physical, 0, 8, 4.0, 0)
    times = physical["times"][0].values.to_numpy()
    assert times[frames[-1]] - times[frames[0]] == pytest.approx(1.75, abs=0.07)
    _, frames = trajectories.sample_trajectory(header, 0, 8, 4.0, 0)
    assert np.diff(frames).tolist() == [15] * 7
    assert times[frames[-1]] - times[frames[0]] == pytest.approx(7.0, abs=0.07)  # what the public recipe takes for 1.75 s


@pytest.mark.parametrize(("lost", "kept"), [(1, 39), (2, 38)])
def test_videos_that_end_a_frame_early_are_clipped(tmp_path, lost, kept):
    files.write_droid(tmp_path, lost=lost)
    table = read(tmp_path)
    assert table["num_frames"].to_pylist() == [kept] * 3
    images, states = trajectories.read_frames(table, 0, np.array([0, kept - 1]), 32)
    assert [files.number_of(image) for image in images] == [0, kept - 1]
    np.testing.assert_array_equal(states, files.poses(40)[[0, kept - 1]].astype(np.float32))


def change_metadata(**values):
    def damage(folder):
        path = next(folder.glob("metadata_*.json"))
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def change_h5(key, change):
    def damage(folder):
        with h5py.File(folder / "trajectory.h5", "r+") as file:
            values = change(file[key][...])
            del file[key]
            if values is not None:
                file[key] = values

    return damage


def nan(values):
    values[7, 2] = np.nan
    return values


POSE, GRIP = "observation/robot_state/cartesian_position", "observation/robot_state/gripper_position"
ARRIVED = f"observation/timestamp/cameras/{files.SERIALS['ext1']}_frame_received"
DEGREES = np.array([1, 1, 1, *[180 / np.pi] * 3])
DROID_DAMAGE = {
    "two metadata files": (lambda f: (f / "metadata_b.json").write_text("{}"), {"": "missing_metadata"}),
    "no metadata": (lambda f: next(f.glob("metadata_*")).unlink(), {"": "missing_metadata"}),
    "metadata that is cut": (lambda f: next(f.glob("metadata_*")).write_text('{"uuid": '), {"": "missing_metadata"}),
    "no right video": (
        lambda f: (f / f"recordings/MP4/{files.SERIALS['ext2']}.mp4").unlink(),
        {"right": "missing_camera"},
    ),
    "no left camera named": (change_metadata(left_mp4_path=""), {"left": "missing_camera"}),
    "truncated HDF5": (lambda f: os.truncate(f / "trajectory.h5", 3000), {"": "unreadable_h5"}),
    "no pose": (change_h5(POSE, lambda v: None), {"": "unreadable_h5"}),
    "NaN": (change_h5(POSE, nan), {"": "non_finite_state"}),
    "millimetres": (change_h5(POSE, lambda v: v * [1000, 1000, 1000, 1, 1, 1]), {"": "bad_units"}),
    "degrees": (change_h5(POSE, lambda v: v * DEGREES), {"": "bad_units"}),
    "gripper in percent": (change_h5(GRIP, lambda v: v * 100), {"": "bad_units"}),
    "truncated video": (
        lambda f: os.truncate(f / f"recordings/MP4/{files.SERIALS['wrist']}.mp4", 900),
        {"wrist": "unreadable_video"},
    ),
    "no arrival times": (change_h5(ARRIVED, lambda v: None), {"left": "bad_time_base"}),
    "a time twice": (change_h5(ARRIVED, lambda v: np.concatenate([v[:5], v[4:-1]])), {"left": "bad_time_base"}),
}


@pytest.mark.parametrize("damage", DROID_DAMAGE)
def test_damaged_droid_episodes_are_rows_with_reasons(tmp_path, damage):
    change, expected = DROID_DAMAGE[damage]
    change(files.write_droid(tmp_path))
    table = read(tmp_path)
    assert reasons(table) == expected
    assert set(expected.values()) <= set(REASONS)
    refused = [row for row in table.to_pylist() if row["reason"]]
    assert all(row["detail"] for row in refused)
    assert table.num_rows == (1 if "" in expected else 3)
    if damage in ("degrees", "millimetres"):
        assert "declare mapping." in refused[0]["detail"]


def test_more_states_than_pictures_is_refused(tmp_path):
    files.write_droid(tmp_path, lost=3)
    assert reasons(read(tmp_path)) == dict.fromkeys(("left", "right", "wrist"), "length_mismatch")


def test_which_external_camera_is_left_follows_from_their_places(tmp_path):
    folder = files.write_droid(tmp_path)
    places = {"ext1_cam_extrinsics": [0.2, -0.5, 0.4, 0, 0, 0], "ext2_cam_extrinsics": [0.2, 0.5, 0.4, 0, 0, 0]}
    change_metadata(left_mp4_path=None, right_mp4_path=None, **places)(folder)
    rows = {row["camera"]: row["video_uri"] for row in read(tmp_path).to_pylist()}
    assert rows["left"].endswith(f"{files.SERIALS['ext2']}.mp4")
    assert rows["right"].endswith(f"{files.SERIALS['ext1']}.mp4")


def test_success_falls_back_to_the_folder(tmp_path):
    change_metadata(success=None)(files.write_droid(tmp_path, success=False))
    assert read(tmp_path)["success"].to_pylist() == [False] * 3


# Parity with the reference, which trusts the header. Restated from app/vjepa_droid/droid.py (docs/trajectories.md).


def reference_indices(count, rate, num_frames, fps, end):
    step = math.ceil(rate / fps)
    window = num_frames * step
    if count <= window:
        raise ValueError("the reference draws an end from an empty range")
    return np.arange(end - window, end, step)


@pytest.mark.parametrize(("count", "rate", "fps"), [(130, 60, 4), (301, 60, 4), (90, 15, 4), (200, 29.97, 5), (64, 15, 5)])
def test_frames_by_the_header_are_the_references(count, rate, fps):
    window = 8 * math.ceil(rate / fps)
    ends = set()
    for u in np.linspace(0, 1, 200, endpoint=False):
        frames = trajectories.header_frames(count, rate, 8, fps, u)
        end = int(frames[0]) + window
        assert window <= end < count  # np.random.randint(nframes, vlen)
        np.testing.assert_array_equal(frames, reference_indices(count, rate, 8, fps, end))
        ends.add(end)
    if count - window <= 200:
        assert len(ends) == count - window
    whole = trajectories.header_frames(window, rate, 8, fps, 0.9)  # where the reference fails
    assert whole.tolist() == list(range(0, window, window // 8))


def test_states_and_actions_by_the_header_are_the_references(tmp_path):
    folder = files.write_droid(tmp_path, 130)
    table = read(tmp_path, time_base="header").slice(0, 1)
    _, frames = trajectories.sample_trajectory(table, 5, 8, 4.0, 0)
    _, states = trajectories.read_frames(table, 0, frames, 32)
    with h5py.File(folder / "trajectory.h5") as file:
        expected = np.concatenate([file[POSE][...], file[GRIP][...][:, None]], axis=1)[frames]
    np.testing.assert_array_equal(states, expected.astype(np.float32))
    xyz, euler = np.diff(expected[:, :3], axis=0), []
    for before, after in zip(expected[:-1, 3:6], expected[1:, 3:6], strict=True):  # poses_to_diffs
        turn = Rotation.from_euler("xyz", after).as_matrix() @ Rotation.from_euler("xyz", before).as_matrix().T
        euler.append(Rotation.from_matrix(turn).as_euler("xyz"))
    actions = np.concatenate([xyz, np.array(euler), np.diff(expected[:, 6:], axis=0)], axis=1)
    assert np.abs(np.diff(expected[:, 3])).max() > 6  # the roll wraps, the actions do not
    assert np.abs(actions[:, 3:6]).max() < 1
    np.testing.assert_allclose(torch_deltas(torch.from_numpy(states)).numpy(), actions, atol=2e-6)
    np.testing.assert_allclose(mapping_module.deltas(expected), actions, atol=1e-12)


def reference_crop(width, height, scale=1.777, ratio=(0.75, 1.35)):
    """(x, y, w, h) of torchvision's RandomResizedCrop as the reference calls it; its ten tries never fit at this scale."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        area = height * width * scale
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        assert round(math.sqrt(area * aspect)) > width or round(math.sqrt(area / aspect)) > height
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return ((width - w) // 2, (height - h) // 2, w, h)


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (320, 180), (640, 480), (256, 256), (96, 54), (480, 640), (300, 640)])
def test_crops_by_the_header_are_the_references(width, height):
    row = {"width": width, "height": height, "seconds_per_frame": 1 / 60}
    header, physical = (pa.Table.from_pylist([row | {"time_base": base}]) for base in ("header", "physical"))
    assert trajectories._crop(header, 0)[:4] == reference_crop(width, height)
    side = min(width, height)
    assert trajectories._crop(physical, 0)[2:4] == (side, side)
    if (width, height) == (1280, 720):
        assert trajectories._crop(header, 0)[:4] == (154, 0, 972, 720)


# RLDS


def test_crc32c_is_the_one_of_tfrecord():
    assert crc32c(b"123456789") == 0xE3069283
    rng = np.random.default_rng(0)
    for size in (0, 1, 3, 15, 16, 63, 64, 65, 1000, 4097):
        data = rng.bytes(size)
        assert crc32c(data) == crc32c_in_python(data)


def test_an_example_with_every_kind_of_value():
    ints = [0, 1, 127, 128, 300, -1, 2**62]
    unpacked = files.field(
        1, files.field(1, files.field(1, b"u") + files.field(2, files.field(2, b"\x0d" + np.float32(2.5).tobytes())))
    )
    data = files.example({"ints": ints, "floats": [1.5, -2.0], "bytes": [b"", b"abc"], "none": []}) + unpacked
    found = example(data + b"foot")
    assert found["ints"].tolist() == ints
    assert found["floats"].tolist() == [1.5, -2.0]
    assert [data[a : a + n] for a, n in zip(*found["bytes"], strict=True)] == [b"", b"abc"]
    assert found["u"].tolist() == [2.5]
    for cut in (1, 5, len(data) - 2):
        with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
            example(data[:cut] + b"foot")


def test_rlds_every_camera_of_every_episode(tmp_path):
    episodes = [files.rlds_episode(30, 0), files.rlds_episode(25, 1, success=False), files.rlds_episode(20, 2)]
    files.write_rlds(tmp_path, [episodes[:2], episodes[2:]])
    table = read(tmp_path)
    assert table["camera"].to_pylist() == ["exterior_1", "exterior_2", "wrist"] * 3
    assert table["num_frames"].to_pylist() == [30] * 3 + [25] * 3 + [20] * 3
    assert table["success"].to_pylist() == [True] * 3 + [False] * 3 + [True] * 3
    assert set(table["task"].to_pylist()) == {"put the cup on the plate"}
    assert table["seconds_per_frame"][0].as_py() == pytest.approx(1 / 15)
    for number, row in enumerate(table.to_pylist()):
        np.testing.assert_allclose(states_of(row), files.poses(row["num_frames"], number // 3), atol=1e-6)  # float32 in TFDS
    frames = np.array([3, 7, 7, 11])
    storage.reset_counters()
    images, states = trajectories.read_frames(table, 3, frames, 48)
    sizes = table["sizes"][3].values.to_numpy()
    assert storage.counters()["requests"] == 1
    assert storage.counters()["bytes_read"] < 1.2 * sizes[3:12].sum()
    assert [files.number_of(image) for image in images] == frames.tolist()
    np.testing.assert_allclose(states, files.poses(25, 1)[frames], atol=1e-6)
    with pytest.raises(UsageError, match="time_base=physical"):
        read(tmp_path, time_base="header")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damaged_shards_are_rows_with_reasons(tmp_path):
    one = {"exterior_1": files.CAMERAS["exterior_1"]}
    episodes = [files.rlds_episode(12, seed, cameras=one) for seed in range(3)]
    lengths = [len(files.record(files.example(features))) for features in episodes]
    path = files.write_rlds(tmp_path, [episodes])[0]
    whole = path.read_bytes()
    found = lambda: [row["reason"] for row in read(tmp_path).to_pylist()]  # noqa: E731
    assert found() == [None, None, None]
    flip(path, lengths[0] + 5000)  # within the second record: the third is still found
    assert found() == [None, "wrong_crc", None]
    path.write_bytes(whole)
    flip(path, lengths[0] + 2)  # the second one's length: where the third begins cannot be known
    assert found() == [None, "wrong_crc"]
    path.write_bytes(whole[: sum(lengths[:2]) + 1000])
    assert found() == [None, None, "truncated"]
    path.write_bytes(whole[: sum(lengths[:2]) + 5])
    assert found() == [None, None, "truncated"]
    path.write_bytes(b"")
    assert found() == ["truncated"]
    path.write_bytes(whole[: lengths[0]] + files.record(b"no protobuf \xff\xff") + whole[lengths[0] :])
    assert found() == [None, "unreadable_record", None, None]


def test_damaged_rlds_episodes_are_rows_with_reasons(tmp_path):
    camera = f"{files.OBSERVATION}{files.CAMERAS['wrist']}"
    pose = f"{files.OBSERVATION}cartesian_position"
    good = files.rlds_episode(12)
    radians = np.array(good[pose]).reshape(-1, 6)
    changed = {
        "missing_camera": {camera: [b""] * 12},
        "length_mismatch": {camera: good[camera][:-3]},
        "unreadable_video": {camera: [b"\xff\xd8 no JPEG"] * 12},
        "non_finite_state": {pose: [float("nan"), *good[pose][1:]]},
        "unreadable_record": {pose: good[pose][:-1]},
        "bad_units": {pose: (radians * DEGREES).ravel().tolist()},
        "bad_mapping": {pose: []},
    }
    files.write_rlds(tmp_path, [[good | change for change in changed.values()]])
    by_episode = {}
    for row in read(tmp_path).to_pylist():
        by_episode.setdefault(row["uri"], set()).add(row["reason"])
    # A pose that lacks is an empty list of integers, of which no rows can be made.
    expected = list(changed)
    expected[-1] = "unreadable_record"
    assert [found - {None} for _, found in sorted(by_episode.items())] == [{reason} for reason in expected]


def test_a_record_is_streamed_with_the_memory_of_one():
    reads = []

    class File(io.BytesIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    data = b"".join(files.record(bytes(1000)) for _ in range(5))
    assert [len(one.data) for one in records(File(data), len(data))] == [1004] * 5
    assert max(reads) == 1004


def test_training_reads_jpegs_by_units(tmp_path):
    from pipelines import post_train_data, units

    files.write_rlds(tmp_path, [[files.rlds_episode(20, seed) for seed in range(2)]])
    table = trajectories._chosen(read(tmp_path), EpisodeChoice())
    clips = post_train_data.Clips(3, 4.0, 7, "any", "auto", 32, 16)
    names = (post_train_data.PATCHES, post_train_data.STATES)
    unit = units.unit_of(post_train_data._unit(1, 0, {}, table, clips, 2, names, None))
    assert unit.samples.tolist() == [2, 3]
    states, patches = unit.array(names[1], np.float32, (2, 3, 7)), unit.array(names[0], np.uint8, (2, 3 * 4, 768))
    for place, n in enumerate(unit.samples.tolist()):
        row, frames = trajectories.sample_trajectory(table, n, 3, 4.0, 7)
        np.testing.assert_allclose(states[place], files.poses(20, row)[frames], atol=1e-6)
        assert [files.number_of(image) for image in patches[place].reshape(3, -1)] == frames.tolist()


def test_a_jpeg_that_does_not_decode_is_refused_when_it_is_read(tmp_path):
    files.write_rlds(tmp_path, [[files.rlds_episode(6)]])
    table = read(tmp_path)
    at = table.schema.get_field_index("sizes")
    table = table.set_column(at, "sizes", pa.array([[40] * 6] * len(table), pa.list_(pa.int32())))
    with pytest.raises(VideoRefused, match="undecodable"):
        trajectories.read_frames(table, 0, np.array([0, 1]), 32)


# LeRobot


def droid_columns(count, seed=0):
    states = files.poses(count, seed)
    return {
        "observation.state.cartesian_position": states[:, :6],
        "observation.state.gripper_position": states[:, 6:],
        "is_episode_successful": np.full(count, seed == 0),
    }


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_lerobot_frames_are_found_in_videos_of_many_episodes(tmp_path, codec):
    drift = {"exterior_1_left": [0.0, 0.0101, -0.012], "wrist_left": [0.02, -0.02, 0.03]}  # seconds; a frame is 0.067
    lengths = (20, 17, 12)
    columns = [droid_columns(count, seed) for seed, count in enumerate(lengths)]
    files.write_lerobot(tmp_path / "d", columns, drift, codec=codec)
    table = read(tmp_path / "d")
    assert not reasons(table)
    assert table["camera"].to_pylist() == ["exterior_1", "wrist"] * 3
    assert table["num_frames"].to_pylist() == [20, 20, 17, 17, 12, 12]
    assert table["success"].to_pylist() == [True, True, False, False, False, False]
    assert set(table["task"].to_pylist()) == {"stack the cubes"}
    assert set(table["robot"].to_pylist()) == {"panda"}
    for row, entry in enumerate(table.to_pylist()):
        count, seed = lengths[row // 2], row // 2
        np.testing.assert_allclose(states_of(entry), files.poses(count, seed), atol=1e-6)
        np.testing.assert_allclose(entry["times"], np.arange(count) / 15, atol=1e-6)
        frames = np.array([0, 5, count - 1])
        images, _ = trajectories.read_frames(table, row, frames, 48)
        assert [files.number_of(image) for image in images] == frames.tolist()
    assert read(tmp_path / "d", time_base="header")["seconds_per_frame"][0].as_py() == pytest.approx(1 / 15)


def test_lerobot_times_that_miss_their_frames_are_refused(tmp_path):
    columns = [droid_columns(20, 0), droid_columns(20, 1)]
    files.write_lerobot(tmp_path / "late", columns, {"left": [0.0, 5.0]})
    assert [row["reason"] for row in read(tmp_path / "late").to_pylist()] == [None, "bad_timestamps"]
    files.write_lerobot(tmp_path / "rate", columns, {"left": [0.0, 0.0]}, rate=10)
    assert set(read(tmp_path / "rate")["reason"].to_pylist()) == {"bad_timestamps"}
    files.write_lerobot(tmp_path / "short", columns, {"left": [0.0, 0.0]}, video_frames=38)
    table = read(tmp_path / "short")
    assert not reasons(table)
    assert table["num_frames"].to_pylist() == [20, 18]


def test_damaged_lerobot_datasets(tmp_path):
    root = files.write_lerobot(tmp_path / "d", [droid_columns(15), droid_columns(15, 1)], {"left": [0, 0], "right": [0, 0]})
    data, episodes = root / "data/chunk-000/file-000.parquet", root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(data)
    pq.write_table(rows.slice(0, 25), data)
    assert [row["reason"] for row in read(root).to_pylist()] == [None, None, "length_mismatch"]
    values = rows["observation.state.cartesian_position"].to_pylist()
    values[3] = [float("nan")] * 6
    pq.write_table(rows.set_column(0, "observation.state.cartesian_position", pa.array(values)), data)
    assert reasons(read(root)) == {"": "non_finite_state"}
    pq.write_table(rows, data)
    (root / "videos/observation.images.right/chunk-000/file-000.mp4").unlink()
    assert reasons(read(root)) == {"right": "missing_camera"}
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    assert reasons(read(root)) == {"": "unreadable_parquet"}
    episodes.write_bytes(b"")
    with pytest.raises(InputRefused, match="repair the dataset"):
        read(root)


def test_other_datasets_say_what_to_do(tmp_path):
    files.write_lerobot(tmp_path / "old", [droid_columns(5)], {"left": [0]}, version="v2.1")
    with pytest.raises(InputRefused, match="convert_dataset_v21_to_v30"):
        read(tmp_path / "old")
    files.write_lerobot(tmp_path / "arm", [{"observation.state": files.poses(5)}], {"left": [0]})
    with pytest.raises(InputRefused, match="ur5e_lerobot"):
        read(tmp_path / "arm")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputRefused, match="no episodes below"):
        read(tmp_path / "nothing")


# Other robots


def ur5e(count, seed=0):
    """A UR5e's columns, as its preset declares them: mm, rotation vector, opening of the gripper in mm."""
    states = files.poses(count, seed)
    rotvec = Rotation.from_euler("xyz", states[:, 3:6]).as_rotvec()
    tcp = np.concatenate([rotvec, 1000 * states[:, :3]], axis=1)
    return {"observation.tcp_pose": tcp, "observation.gripper_width": 85 * (1 - states[:, 6:]), "action": tcp}


def test_a_six_axis_arm_by_its_preset(tmp_path):
    from pipelines import presets

    files.write_lerobot(tmp_path / "d", [ur5e(20)], {"front": [0.0], "hand": [0.0]}, robot="ur5e")
    config = presets.load(TrajectoriesConfig, "ingest trajectories", ["preset=ur5e_lerobot", f"source={tmp_path}/d", "catalog=c"])
    table = read(tmp_path / "d", mapping=config.mapping)
    assert not reasons(table)
    assert table["camera"].to_pylist() == ["left", "wrist"]
    assert set(table["robot"].to_pylist()) == {"ur5e"}
    states, expected = states_of(table.to_pylist()[0]), files.poses(20)
    np.testing.assert_allclose(states[:, [0, 1, 2, 6]], expected[:, [0, 1, 2, 6]], atol=1e-5)
    turn = Rotation.from_euler("xyz", states[:, 3:6]) * Rotation.from_euler("xyz", expected[:, 3:6]).inv()
    assert turn.magnitude().max() < 1e-4
    wrong = MappingConfig(
        "ur5e", PositionConfig("observation.tcp_pose", [3, 4, 5]), config.mapping.rotation, config.mapping.gripper
    )
    assert "mapping.position.unit=mm" in read(tmp_path / "d", mapping=wrong)["detail"][0].as_py()


@pytest.mark.parametrize("form", ["xyz", "XYZ", "zyx", "ZYX", "rotvec", "quaternion_xyzw", "quaternion_wxyz"])
@pytest.mark.parametrize("unit", ["rad", "deg"])
def test_every_form_of_rotation(form, unit):
    expected = files.poses(30)
    turn = Rotation.from_euler("xyz", expected[:, 3:6])
    if form.startswith("quaternion"):
        stored = turn.as_quat() if form.endswith("xyzw") else np.roll(turn.as_quat(), 1, axis=1)
    else:
        stored = turn.as_rotvec() if form == "rotvec" else turn.as_euler(form)
        stored = np.degrees(stored) if unit == "deg" else stored
    columns = {"p": expected[:, :3] * 100, "r": stored, "g": 1 - expected[:, 6:]}
    dims = list(range(stored.shape[1]))
    declared = MappingConfig(
        "arm", PositionConfig("p", [0, 1, 2], "cm"), RotationConfig("r", dims, form, unit), GripperConfig("g", 0, 1.0, 0.0)
    )
    declared.check()
    states = mapping_module.states(declared, columns.__getitem__)
    np.testing.assert_allclose(states[:, [0, 1, 2, 6]], expected[:, [0, 1, 2, 6]], atol=1e-12)
    assert (Rotation.from_euler("xyz", states[:, 3:6]) * turn.inv()).magnitude().max() < 1e-7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c | {"p": c["p"] * 1000}, "millimetres"),
        (lambda c: c | {"r": np.degrees(c["r"])}, "degrees"),
        (lambda c: c | {"g": c["g"] * 255}, "mapping.gripper.open"),
    ],
)
def test_units_that_cannot_be_are_refused_with_the_fix(change, words):
    states = files.poses(30)
    declared = MappingConfig("arm", PositionConfig("p"), RotationConfig("r", [0, 1, 2]), GripperConfig("g"))
    columns = {"p": states[:, :3], "r": states[:, 3:6], "g": states[:, 6]}
    mapping_module.states(declared, columns.__getitem__)
    with pytest.raises(EpisodeRefused, match=words) as refused:
        mapping_module.states(declared, change(columns).__getitem__)
    assert refused.value.reason == "bad_units"


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        (MappingConfig(rotation=RotationConfig(form="xYz")), "rotation.form"),
        (MappingConfig(rotation=RotationConfig(form="quaternion_xyzw")), "name 4 columns"),
        (MappingConfig(position=PositionConfig(dims=[0, 1])), "name 3 columns"),
        (MappingConfig(gripper=GripperConfig(open=1.0)), "both 1"),
        (MappingConfig(position=PositionConfig("p")), "a column each"),
    ],
)
def test_mappings_that_cannot_be_followed(mapping, words):
    with pytest.raises(UsageError, match=words):
        mapping.check()


# Choosing


def test_choosing_episodes(tmp_path):
    files.write_droid(tmp_path, seed=1)
    files.write_droid(tmp_path, 20, seed=2, success=False)
    table = read(tmp_path)
    chosen = lambda **options: trajectories._chosen(table, EpisodeChoice(**options))  # noqa: E731
    assert chosen()["camera"].to_pylist() == ["left"] * 2
    assert chosen(camera="all").num_rows == 6
    assert chosen(camera="wrist", success_only=True)["camera"].to_pylist() == ["wrist"]
    assert chosen(robot="ur5e").num_rows == 0
    with pytest.raises(UsageError, match="choose one of left, right, wrist"):
        chosen(camera="top")
    short = trajectories._shortened(table, 2.0)
    assert short["reason"].to_pylist() == ["too_short"] * 3 + [None] * 3
    assert "1.2" in short["detail"][0].as_py()
