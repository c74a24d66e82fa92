"""Features of exact clips: their pixels, their controls, the cache that a killed job continues from, and what fails."""

import numpy as np
import pytest
import torch
from clip_files import catalogued, encoded, sequential

from jepa_core.config import ClipConfig, EncoderConfig
from jepa_core.encoder import VisionTransformer, clip_grid
from pipelines import catalog, clip_items, clip_reader, features, storage
from pipelines.errors import InputRefused
from pipelines.features import Arm, Item
from pipelines.video import Scaler, VideoRefused, tubelets

SMALL = EncoderConfig(dim=32, depth=2, heads=2, patch_size=16, native_grid=(2, 2, 2))
CLIP = ClipConfig(num_frames=4, fps=10.0, crop_size=32)


def out(num_frames: int, size: int) -> np.ndarray:
    return np.zeros((num_frames, 1, 1, 1, size, size, 3), np.uint8)


def test_exact_times_in_any_order_give_the_frames_of_a_sequential_decode(tmp_path):
    data = encoded(40, size=(96, 64))
    ref, row = catalogued(str(tmp_path), data)
    frames, pts = sequential(data, row["stream"]), catalog.frame_times(ref, row)
    for order in (pts[5:9], pts[5:9][::-1], pts[[30, 2, 2, 17]], pts[[0]], pts[[39]]):
        for view in range(3):
            crop = clip_items.square_crop(96, 64, view, 3)
            got = out(len(order), 32)
            clip_reader.read_frames(ref, row, order, crop, got)
            scaler = Scaler(crop, 32, row["rotation"], (96, 64))
            for number, time in enumerate(order.tolist()):
                np.testing.assert_array_equal(got[number, 0, 0, 0], scaler(frames[time]))


@pytest.mark.parametrize("shift", [1, -(10**9), 10**9])
def test_a_time_that_is_no_frames_is_refused(tmp_path, shift):
    ref, row = catalogued(str(tmp_path), encoded(20))
    pts = catalog.frame_times(ref, row)[2:6].copy()
    pts[1] += shift
    with pytest.raises(VideoRefused, match="frames_missing"):
        clip_reader.read_frames(ref, row, pts, clip_items.square_crop(96, 64, 0, 1), out(4, 32))


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (64, 64)])
def test_views_lie_along_the_longer_side(width, height):
    boxes = [clip_items.square_crop(width, height, view, 3) for view in range(3)]
    assert {(box.width, box.height) for box in boxes} == {(64, 64)}
    assert [max(box.x, box.y) for box in boxes] == [0, (max(width, height) - 64) // 2, max(width, height) - 64]
    assert clip_items.square_crop(width, height, 0, 1) == boxes[1]


def test_what_an_arm_gives_and_what_names_it():
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 32, 32, 3), dtype=np.uint8)
    module = VisionTransformer(SMALL).eval()
    trained = Arm("trained", SMALL, dict(module.state_dict()))
    tokens = features.encode(trained, frames, "tokens")
    cut = torch.from_numpy(np.stack([tubelets(one) for one in frames]))
    with torch.inference_mode():
        torch.testing.assert_close(tokens.float(), module(cut, clip_grid(CLIP, SMALL)), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(features.encode(trained, frames, "mean"), tokens.float().mean(1), atol=2e-3, rtol=2e-3)
    first, again, other = (features.encode(Arm("random", SMALL, seed=seed), frames, "mean") for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other).abs().max() > 0.1
    two = features.encode(Arm("random", SMALL, blocks=(0, 1)), frames, "tokens")
    assert two.shape == (3, 16, 32)
    torch.testing.assert_close(two[:, 8:], features.encode(Arm("random", SMALL), frames, "tokens"), rtol=0, atol=1e-3)
    names = {arm.digest for arm in (trained, Arm("random", SMALL), Arm("random", SMALL, seed=1), Arm("pixels", SMALL))}
    assert len(names | {Arm("random", SMALL, blocks=(1,)).digest}) == 5


def test_controls_without_an_encoder_see_what_they_should():
    still = np.full((1, 4, 32, 32, 3), 51, np.uint8)
    assert features.encode(Arm("pixels", SMALL), still, "mean").shape == (1, 4 * 12 * 12 * 3)
    assert torch.allclose(features.encode(Arm("pixels", SMALL), still, "mean"), torch.tensor(0.2))
    for keep in ("mean", "tokens"):
        assert not features.encode(Arm("frame_difference", SMALL), still, keep).any()
    rising = still + np.arange(4, dtype=np.uint8).reshape(1, 4, 1, 1, 1) * 10
    forward, backward = (features.encode(Arm("frame_difference", SMALL), x, "mean") for x in (rising, rising[:, ::-1].copy()))
    assert torch.allclose(forward, torch.tensor(10 / 255))
    assert torch.allclose(backward, -forward)
    assert features.encode(Arm("pixels", SMALL), still, "tokens").shape == (1, 8, 2 * 16 * 16 * 3)


@pytest.mark.ray
def test_features_are_cached_by_block_and_arm_and_failures_are_rows(catalog_uri, ray_session, reporter, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BLOCK_ITEMS", 2)
    ref = catalog.pin(catalog.parse_ref(catalog_uri))
    rows = catalog.read_videos(ref).to_pylist()[:3]
    times = [catalog.frame_times(ref, row) for row in rows]
    items = [Item(row["id"], pts[8 * n : 8 * n + 4]) for row, pts in zip(rows, times, strict=True) for n in range(2)]
    items[3] = items[3]._replace(pts=items[3].pts + 1)  # no frames have these times
    arms = {"random": Arm("random", SMALL), "pixels": Arm("pixels", SMALL)}
    found = features.extract(ref, items, arms, CLIP, "tokens", str(tmp_path), reporter)
    assert found.kept.tolist() == [0, 1, 2, 4, 5]
    assert [(row["item"], row["video"], row["reason"]) for row in found.failures] == [(3, items[3].video, "frames_missing")]
    frames = out(4, 32)
    clip_reader.read_frames(ref, rows[2], items[4].pts, clip_items.square_crop(96, 64, 0, 1), frames)
    for name, arm in arms.items():
        assert found.x[name].dtype == torch.float16
        torch.testing.assert_close(found.x[name][3:4], features.encode(arm, frames[None, :, 0, 0, 0], "tokens"))

    before = {info.uri: info.modified for info in storage.list_files(str(tmp_path))}
    assert len(before) == 2 * 2 * 3
    gone = sorted(uri for uri in before if uri.endswith(features.DONE))[1]
    storage.delete([gone])
    again = features.extract(ref, items, arms | {"more": Arm("random", SMALL, seed=7)}, CLIP, "tokens", str(tmp_path), reporter)
    after = {info.uri: info.modified for info in storage.list_files(str(tmp_path))}
    assert {uri for uri in before if after[uri] == before[uri]} == set(before) - {
        gone,
        gone.replace(features.DONE, features.DATA),
    }
    assert len(after) == 2 * 9
    assert all(torch.equal(again.x[name], found.x[name]) for name in arms)
    assert not torch.equal(again.x["more"], again.x["random"])
    with pytest.raises(InputRefused, match="nobody"):
        features.extract(ref, [Item("nobody", items[0].pts)], arms, CLIP, "mean", str(tmp_path), reporter)


@pytest.mark.ray
def test_the_actor_that_encodes_gives_what_the_tasks_give(catalog_uri, ray_session, reporter, tmp_path):
    """The stage for GPUs, on this machine's device: decoding and encoding apart."""
    import ray

    ref = catalog.pin(catalog.parse_ref(catalog_uri))
    row = catalog.read_videos(ref).to_pylist()[0]
    pts = catalog.frame_times(ref, row)
    items = [Item(row["id"], pts[n : n + 4]) for n in range(3)]
    arms = {"pixels": Arm("pixels", SMALL), "random": Arm("random", SMALL)}
    wanted = features.extract(ref, items, arms, CLIP, "mean", f"{tmp_path}/tasks", reporter)
    folders = {name: f"{tmp_path}/actor/{name}" for name in arms}
    entries = clip_items.entries_of(ref, items, CLIP)
    job = features._Job(ref, CLIP, "mean", folders, ray.put(arms), ray.put(entries))
    table = features._decode(features._plan(0, list(arms), range(3), items, {row["id"]: 0}), job)
    features._Encoder(job)(table)
    found = features.read(features.Cache(folders, 1))
    assert found.kept.tolist() == wanted.kept.tolist() == [0, 1, 2]
    for name in arms:
        torch.testing.assert_close(found.x[name], wanted.x[name], atol=0.02, rtol=0.02)
