"""What the pictures and the label-free numbers rest on: attention weights, colours, decoders, groups of footage, bootstraps."""

import io
import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from jepa_core.attentive import AttentiveClassifier, CrossAttention
from jepa_core.config import AttentiveConfig, ClipConfig, DecoderConfig, HeadGrid
from jepa_core.feature_colours import colours, fit_colours
from jepa_core.pixel_decoder import PixelDecoder, decoded, psnr, squared_errors, train_decoder
from jepa_core.positions import Grid
from jepa_core.probe import r2, retrieval_accuracy, retrieval_hits, ridge_predictions, ridge_r2
from jepa_core.readout import Rows, Splits, attentive_probe
from jepa_core.statistics import bootstrap_interval
from pipelines import (
    attention_maps,
    clip_groups,
    evaluate_decode,
    evaluate_features,
    evaluate_label_free,
    evaluate_robot,
    frame_sheet,
    label_free_rows,
)
from pipelines.clip_groups import BETWEEN, WITHIN, Footage
from pipelines.errors import InputRefused, UsageError
from pipelines.features import Features
from pipelines.presets import load, preset_names
from pipelines.seeing_config import ARROW, RETRIEVAL, SPEED, DecodeConfig, LabelFreeConfig, MaskPicturesConfig

GRID = Grid(2, 3, 3)
PROBE = AttentiveConfig(depth=1, heads=2, num_classes=2)


def footage(number: int, seconds: float = 20.0, shots: list | None = None, fps: int = 25) -> Footage:
    pts = np.arange(round(seconds * fps) + 1) * 1000 // fps
    cut = np.array([[0.0, seconds]] if shots is None else shots)
    return Footage(f"id{number}", f"v{number}.mp4", f"source{number}", pts, 0.001, cut)


# Pure parts


def test_ridge_gives_the_closed_form_with_more_rows_than_features_and_with_fewer():
    rng = torch.Generator().manual_seed(0)
    for rows, width in ((60, 8), (40, 120)):
        weight = torch.randn(width, 3, generator=rng, dtype=torch.float64)
        x, other = (torch.randn(n, width, generator=rng, dtype=torch.float64) for n in (rows, 50))
        y = x @ weight + 0.1 * torch.randn(rows, 3, generator=rng, dtype=torch.float64) + 5
        found = ridge_predictions(x, y, other)
        spread = x.std(0) + 0.01 * x.std(0).mean()
        xs, others = (x - x.mean(0)) / spread, (other - x.mean(0)) / spread
        answers = []
        for strength in [10.0**power for power in range(-1, 6)]:
            gram = xs.T @ xs + strength * torch.eye(width, dtype=torch.float64)
            answers.append(others @ torch.linalg.solve(gram, xs.T @ (y - y.mean(0))) + y.mean(0))
        assert min((found - answer).abs().max() for answer in answers) < 1e-8
        assert ridge_r2(x, y, other, other @ weight + 5) == pytest.approx(r2(found, other @ weight + 5))


def test_retrieval_hits_are_what_the_accuracy_counts():
    rng = torch.Generator().manual_seed(0)
    gallery = torch.randn(20, 8, generator=rng)
    queries = gallery.clone()
    queries[[3, 7]] = gallery[[4, 9]]
    hits = retrieval_hits(queries, gallery)
    assert (~hits).nonzero()[:, 0].tolist() == [3, 7]
    assert retrieval_accuracy(queries, gallery) == pytest.approx(0.9)


def test_a_bootstrap_holds_the_mean_as_often_as_it_says_and_pairs_differences():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        values = rng.normal(2.0, 1.0, 30)
        found = bootstrap_interval(lambda drawn, v=values: float(v[drawn].mean()), 30, draws=300, seed=trial)
        held += found.low <= 2.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99
    base = rng.normal(0, 10, 30)
    apart = bootstrap_interval(lambda drawn: float((base + 1)[drawn].mean() - base[drawn].mean()), 30)
    assert (apart.low, apart.mean, apart.high) == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match="at least 2 units"):
        bootstrap_interval(lambda _: 0.0, 1)
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_interval(lambda _: float("nan"), 5)


def test_attention_weights_are_those_that_the_probe_uses():
    torch.manual_seed(0)
    module = CrossAttention(16, 2)
    queries, tokens = torch.randn(3, 1, 16), torch.randn(3, 10, 16)
    weights = module.weights(queries, tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 2, 1))
    values = module.kv(tokens).unflatten(-1, (2, 2, 8))[:, :, 1].transpose(1, 2)
    torch.testing.assert_close((weights @ values).transpose(1, 2).flatten(2), module(queries, tokens))


def test_the_map_is_bright_where_the_probe_found_the_answer():
    """Token 13 alone says the label; nothing else differs between classes."""
    rng = torch.Generator().manual_seed(0)

    def rows(count: int) -> Rows:
        x = torch.randn(count, GRID.num_tokens, 16, generator=rng)
        labels = torch.randint(2, (count,), generator=rng)
        x[:, 13, :8] = torch.tensor([6.0, -6.0]).repeat(4)  # what it is found by, and what it says
        x[:, 13, 8:] = torch.tensor([4.0, -4.0]).repeat(4) * (2 * labels[:, None] - 1)
        return Rows(x, labels)

    grid = HeadGrid((1e-2,), (0.01,), epochs=20, batch_size=32, warmup_epochs=2)
    test = rows(20)
    readout, state = attentive_probe(Splits(rows(200), rows(50), test, ("a", "b")), PROBE, grid)
    assert readout.test > 0.9
    weights = attention_maps.attention(state, PROBE, test.x)
    torch.testing.assert_close(weights.sum(1), torch.ones(20))
    assert (weights.argmax(1) == 13).float().mean() > 0.9
    frames = np.full((2, 4, 24, 24, 3), 128, np.uint8)
    shown = attention_maps.overlay(frames[0], weights[0], GRID)
    middles = shown[::2, 4::8, 4::8].astype(int).sum(-1)
    assert middles.argmax() == 13
    even = attention_maps.overlay(frames[0], torch.full((18,), 1 / 18), GRID)
    assert len(np.unique(even.reshape(-1, 3), axis=0)) == 1
    png = attention_maps.draw(state, PROBE, test.x[:2], frames, GRID, ["one", "two"])
    assert Image.open(io.BytesIO(png)).size[0] >= 640
    twice, film = test.x[:1].repeat(1, 2, 1), frames[:1]
    two = attention_maps.draw(state, PROBE, twice, film.repeat(2, axis=1), GRID, ["two clips"])
    assert Image.open(io.BytesIO(two)).size[0] > Image.open(io.BytesIO(png)).size[0], "their frames side by side"
    outputs = attention_maps.draw(state, PROBE, twice, film, GRID, ["one"], blocks=2)
    assert outputs == attention_maps.draw(state, PROBE, test.x[:1], film, GRID, ["one"]), "of two equal outputs, summed"
    with pytest.raises(ValueError, match="17 tokens and 4 frames"):
        attention_maps.draw(state, PROBE, test.x[:1, 1:], film, GRID, ["a part"])
    deep = AttentiveClassifier(replace(PROBE, depth=3), 16)
    assert deep.pooler.attention(test.x).shape == (20, 2, 1, 18)


def planted(count: int, seed: int) -> torch.Tensor:
    """Three directions of falling variance in 12 channels, with a little noise."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(99)))[0]
    amounts = torch.tensor([9.0, 4.0, 2.0] + [0.05] * 9)
    return (torch.randn(count, 9, 12, generator=rng) * amounts) @ basis.T + 3


def test_colours_are_a_fixed_basis():
    tokens = planted(40, 0)
    basis = fit_colours(tokens)
    again = fit_colours(tokens.flip(0))
    torch.testing.assert_close(basis.directions, again.directions)
    assert basis.share[0] > basis.share[1] > basis.share[2] > 0.03
    assert sum(basis.share) > 0.99
    largest = basis.directions.gather(0, basis.directions.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(basis.directions.T @ basis.directions, torch.eye(3, dtype=torch.float64))
    shown = colours(basis, tokens)
    assert shown.shape == (40, 9, 3)
    assert shown.min() == 0
    assert shown.max() == 1
    assert ((shown == 0).float().mean() - 0.01).abs() < 0.005
    torch.testing.assert_close(colours(basis, tokens[3:4]), shown[3:4])  # whatever else is shown
    with pytest.raises(ValueError, match="main directions"):
        fit_colours(tokens[:1, :3])


SMALL = DecoderConfig(dim=24, depth=1, heads=2, steps=150, batch_size=8, lr=3e-3)


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a 2x2x2 grid from which pixels follow, and those pixels in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 8, 16, generator=rng)
    way = torch.randn(16, 12, generator=torch.Generator().manual_seed(7))
    return tokens.half(), (0.5 + 0.1 * tokens @ way / 4).clamp(0, 1).half()


def test_a_decoder_begins_at_the_mean_picture_and_paints_what_tokens_say():
    grid = Grid(2, 2, 2)
    (tokens, pixels), (held, wanted) = pictures(64, 0), pictures(16, 1)
    fresh = PixelDecoder(SMALL, 16, 12, grid)
    fresh.fit_statistics(tokens, pixels)
    mean = pixels.double().mean(0)
    torch.testing.assert_close(decoded(fresh, held), mean.float().expand(16, -1, -1), atol=1e-5, rtol=1e-5)
    decoder, losses = train_decoder(SMALL, tokens, pixels, grid, seed=0)
    assert losses[-1] < 0.3 * losses[0]
    ours = squared_errors(decoded(decoder, held), wanted).mean()
    theirs = squared_errors(mean, wanted).mean()
    assert psnr(float(ours)) > psnr(float(theirs)) + 3
    again, _ = train_decoder(replace(SMALL, steps=3), tokens, pixels, grid, seed=4)
    same, _ = train_decoder(replace(SMALL, steps=3), tokens, pixels, grid, seed=4)
    assert torch.equal(decoded(again, held), decoded(same, held))
    with pytest.raises(ValueError, match="not clips of 8 tokens"):
        train_decoder(SMALL, tokens[:, :4], pixels[:, :4], grid, seed=0)


def test_a_decoder_of_tokens_that_say_nothing_is_no_better_than_the_mean_picture():
    grid = Grid(2, 2, 2)
    (tokens, pixels), (_, wanted) = pictures(64, 0), pictures(16, 1)
    nothing = torch.zeros_like(tokens)
    decoder, _ = train_decoder(SMALL, nothing, pixels, grid, seed=0)
    ours = squared_errors(decoded(decoder, nothing[:16]), wanted).mean()
    theirs = squared_errors(pixels.double().mean(0), wanted).mean()
    assert psnr(float(ours)) < psnr(float(theirs)) + 0.2


def test_psnr_by_hand():
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(1.0) == 0
    assert squared_errors(torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.5)).tolist() == [0.25, 0.25]


# Groups of footage


def test_videos_are_the_groups_where_there_are_enough():
    videos = [footage(n) for n in range(9)] + [footage(9, 0.5), footage(3)._replace(video="copy", name="copy.mp4")]
    found = clip_groups.group_footage(videos, 2.0, 1.0, 4, 8)
    assert found.split == BETWEEN
    assert [group.name for group in found.groups] == [f"v{n}.mp4" for n in range(9)]
    assert [(row["name"], row["reason"]) for row in found.left_out] == [("v9.mp4", "too_short"), ("copy.mp4", "duplicate")]


def test_names_tell_videos_apart():
    paths = ["/a/x/1.mp4", "/a/y/1.mp4", "/b/y/1.mp4", "/a/2.mp4", "same", "same"]
    names = clip_groups.short_names(paths)
    assert names == ["x/1.mp4", "a/y/1.mp4", "b/y/1.mp4", "2.mp4", "same (4)", "same (5)"]
    assert clip_groups.short_names(["/a/1.mp4"]) == ["1.mp4"]


def test_few_videos_are_cut_into_pieces_with_a_gap():
    videos = [footage(0, 20.0), footage(1, 20.0, [[0.0, 3.0], [3.04, 12.0], [12.04, 13.0]]), footage(2, 2.0)]
    found = clip_groups.group_footage(videos, 2.0, 1.0, 4, 8)
    assert found.split == WITHIN
    by_video = {name: [g.shots[0] for g in found.groups if g.footage.name == name] for name in ("v0.mp4", "v1.mp4", "v2.mp4")}
    assert {name: len(pieces) for name, pieces in by_video.items()} == {"v0.mp4": 4, "v1.mp4": 4, "v2.mp4": 1}
    for pieces in by_video.values():
        for (_, end), (start, _) in itertools.pairwise(pieces):
            assert start - end >= (1.0 if start != 3.04 else 0.0399)
        assert all(end - start >= 2.0 - 1e-9 for start, end in pieces)
    assert not any(start < 3.0 < end - 1e-9 for start, end in by_video["v1.mp4"])


def test_folds_deal_out_groups_evenly_video_by_video():
    found = clip_groups.group_footage([footage(n) for n in range(3)], 2.0, 1.0, 4, 8)
    dealt = clip_groups.folds(found, 4, 0, "test")
    assert np.bincount(dealt).tolist() == [3, 3, 3, 3]
    for n in range(3):  # every video is in every fold
        assert {int(f) for f, g in zip(dealt, found.groups, strict=True) if g.footage.video == f"id{n}"} == {0, 1, 2, 3}
    assert (dealt == clip_groups.folds(found, 4, 0, "test")).all()
    assert (dealt != clip_groups.folds(found, 4, 1, "test")).any()
    with pytest.raises(InputRefused, match="12 within videos groups are too few for 13 folds"):
        clip_groups.folds(found, 13, 0, "test")


def label_free(*words: str) -> LabelFreeConfig:
    return load(LabelFreeConfig, "evaluate label-free", ["model=m", "catalog=c", "run.dir=r", "footage.moments=3", *words])


CLIP = ClipConfig(num_frames=4, fps=5.0, crop_size=32)


def test_the_questions_and_their_splits():
    config = label_free("folds=3", "seeds=2")
    items, tasks = label_free_rows.plan(config, [footage(n) for n in range(9)], CLIP)
    arrow, speed, retrieval = tasks
    assert (len(arrow.items), len(speed.items), retrieval.items.shape) == (9 * 3 * 2, 9 * 3 * 3, (9, 2))
    assert (arrow.chance, speed.chance, retrieval.chance) == (1 / 2, 1 / 3, 1 / 9)
    for row in range(0, len(arrow.items), 2):
        forward, backward = (items[number] for number in arrow.items[row : row + 2])
        assert (np.diff(forward.pts) == 200).all()
        np.testing.assert_array_equal(forward.pts, backward.pts[::-1])
        assert arrow.labels[row : row + 2].tolist() == [0, 1]
    assert [np.diff(items[number].pts).tolist() for number in speed.items[:3]] == [[200] * 3, [400] * 3, [800] * 3]
    first, last = (items[number].pts for number in retrieval.items[2])
    assert 0 < first.min() < first.max() < 20_000 / 3 < 40_000 / 3 < last.min() < last.max() < 20_000
    x = torch.arange(len(arrow.items))[:, None].float()
    seen = []
    for fold in range(3):
        splits, tested = label_free_rows.fold_splits(arrow, x, 1, fold)
        parts = [set(arrow.groups[part.x[:, 0].long().numpy()].tolist()) for part in splits[:3]]
        assert len(set.union(*parts)) == sum(map(len, parts))
        assert [len(part) for part in parts] == [3, 3, 3]
        assert set(arrow.groups[tested]) == parts[2]
        assert splits.test.labels.tolist() == arrow.labels[tested].tolist()
        seen += tested.tolist()
    assert sorted(seen) == list(range(len(arrow.items)))


def test_a_clip_that_does_not_decode_takes_its_moment_with_it():
    config = label_free("tasks=[speed,retrieval]")
    items, tasks = label_free_rows.plan(config, [footage(n) for n in range(9)], CLIP)
    lost = [4, int(tasks[1].items[2, 1])]
    kept = np.delete(np.arange(len(items)), lost)
    failures = [{"item": n, "video": "v", "reason": "crashed", "detail": "x"} for n in lost]
    with pytest.raises(InputRefused, match=r"2 of 99 clips do not decode, more than max_failed=0.01: first v \(crashed: x\)"):
        label_free_rows.without(tasks, len(items), Features(kept, {}, failures), replace(config, max_failed=0.01))
    speed, retrieval = label_free_rows.without(tasks, len(items), Features(kept, {}, failures), replace(config, max_failed=0.1))
    assert np.bincount(speed.labels).tolist() == [26, 26, 26]
    assert not set(speed.items.tolist()) & {3, 4, 5}
    assert retrieval.groups.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    rows = label_free_rows.rows_of(speed, Features(kept, {}, failures), torch.from_numpy(kept)[:, None])
    assert rows[:, 0].tolist() == speed.items.tolist()


def test_footage_that_is_too_short_is_refused_with_what_it_lacks():
    with pytest.raises(InputRefused, match=r"playback speed: 0 groups .*v0.mp4: 2.40 s are needed, the longest shot has 1.00 s"):
        label_free_rows.plan(label_free("tasks=[speed]"), [footage(0, 1.0)], CLIP)
    with pytest.raises(InputRefused, match="too few for 4 folds"):
        label_free_rows.plan(label_free("tasks=[arrow]"), [footage(0, 1.0)], CLIP)


def test_scores_are_means_over_groups_and_differences_are_paired_by_them():
    unit = evaluate_label_free.Unit
    values = {("trained", 0): [1.0, 0.5, 0.9], ("random", 0): [0.5, 0.0, 0.4], ("random", 1): [0.7, 0.2, 0.6]}
    results = {unit(ARROW, "linear", *key): {"groups": dict(zip("abc", shares, strict=True))} for key, shares in values.items()}
    found = evaluate_label_free.scores(results)
    trained, random = found["arms"]
    assert trained["mean"] == pytest.approx(0.8)
    assert random["mean"] == pytest.approx(0.4)
    assert random["values"] == pytest.approx([0.3, 0.5])
    (line,) = found["differences"]
    assert (line["first"], line["second"], line["mean"]) == ("trained", "random", pytest.approx(0.4))
    assert line["high"] - line["low"] < 1e-9  # 0.4 in every group, whatever else sets groups apart
    assert trained["high"] - trained["low"] > 0.5


def test_decode_scores_are_means_over_groups():
    clips = {"trained": np.array([20.0, 22.0, 30.0]), "mean picture": np.array([15.0, 15.0, 20.0])}
    found = evaluate_decode.scores(clips, ["a", "a", "b"])
    assert [line["mean"] for line in found["arms"]] == [25.5, 17.5]
    assert [line["mean"] for line in found["differences"]] == [8.0]


# Robots


def test_r2_from_sums_of_episodes():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(6, 5, 3))
    predicted = labels + 0.3 * rng.normal(size=labels.shape)
    found = evaluate_robot.sums(predicted, labels)
    for drawn in (np.arange(6), np.array([0, 0, 2, 5])):
        flat = [torch.from_numpy(part[drawn].reshape(-1, 3)) for part in (predicted, labels)]
        assert found.r2(drawn) == pytest.approx(r2(*flat))


def test_coordinates_that_never_change_are_not_asked_for():
    labels = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    labels[..., 2] = 0.025
    assert evaluate_robot.varying(labels).shape == (6, 5, 2)


def test_few_held_out_episodes_have_no_interval():
    rng = np.random.default_rng(0)
    for count, has in ((4, False), (12, True)):
        labels = rng.normal(size=(count, 5, 3))
        one = evaluate_robot.sums(labels + 0.2, labels)
        scores = evaluate_robot.scores({("trained", "hand"): [one], ("random", "hand"): [one, one]})
        assert (scores["arms"][0]["low"] is not None) == has
        assert scores["differences"][0]["mean"] == 0


def test_objects_lie_beside_the_releases_own_tables(tmp_path):
    from pipelines.robot import droid_raw
    from pipelines.robot.panda import SimConfig
    from pipelines.robot.record import record_episode

    episode = record_episode(SimConfig(image_size=32), 3, 0.4)
    uri = droid_raw.write_episode(str(tmp_path), episode)
    found = droid_raw.read_objects(uri)
    assert sorted(found) == ["cube", "cylinder"]
    assert found["cube"].shape == (6, 3)
    np.testing.assert_allclose(found["cube"], episode.objects["cube"])
    assert (np.abs(np.diff(found["cube"], axis=0)) < 1e-3).all()  # the tool never touches them
    assert 0.3 < found["cube"][0, 0] < 0.7
    assert 0.02 < found["cube"][0, 2] < 0.03
    assert droid_raw.read_objects(droid_raw.write_episode(str(tmp_path / "b"), replace(episode, objects={}))) == {}
    with pytest.raises(UsageError, match="5 positions of cube, but 6 states"):
        droid_raw.write_episode(str(tmp_path / "c"), replace(episode, objects={"cube": found["cube"][:5]}))


# Pictures and options


def test_a_sheet_has_every_frame_where_its_row_is():
    frames = np.zeros((3, 28, 28, 3), np.uint8)
    frames[1, :, :, 0] = 255
    png = frame_sheet.draw([frame_sheet.Block("title", [frame_sheet.Row("label", frames)])], "head", side=56)
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    red = (sheet == [255, 0, 0]).all(-1)
    assert red.sum() == 56 * 56
    left = frame_sheet.MARGIN + frame_sheet.LABEL_WIDTH + 56 + frame_sheet.GAP
    assert np.flatnonzero(red.any(0))[0] == left


def test_films_stand_side_by_side():
    parts = {"video": np.full((3, 16, 16, 3), 10, np.uint8), "trained": np.full((3, 64, 64, 3), 200, np.uint8)}
    film = evaluate_features.side_by_side(parts, 64)
    assert film.shape == (3, 64 + evaluate_features.HEADER, 2 * 64 + evaluate_features.GAP, 3)
    assert (film[:, evaluate_features.HEADER :, :64] == 10).all()
    assert (film[:, evaluate_features.HEADER :, -64:] == 200).all()


def test_films_are_consecutive_clips_of_the_longest_shot():
    films, items = evaluate_features.plan([footage(0, 20.0, [[0.0, 1.0], [1.04, 5.0]]), footage(1, 0.2)], CLIP, 3)
    assert [film.items for film in films] == [[0, 1, 2]]
    times = np.concatenate([item.pts for item in items])
    assert (np.diff(times) == 200).all()
    assert 1040 <= times[0] < times[-1] <= 5000
    with pytest.raises(InputRefused, match=r"none of 1 videos has a shot of 0.60 s"):
        evaluate_features.plan([footage(1, 0.2)], CLIP, 3)


def test_masks_take_every_pretraining_preset():
    assert preset_names("evaluate masks") == preset_names("pretrain")
    for preset in preset_names("pretrain"):
        config = load(MaskPicturesConfig, "evaluate masks", [f"preset={preset}", "catalog=c", "run.dir=r"])
        assert config.model.masks


@pytest.mark.parametrize(
    ("schema", "verb", "word", "message"),
    [
        (LabelFreeConfig, "evaluate label-free", "folds=2", "folds=2"),
        (LabelFreeConfig, "evaluate label-free", "speeds=[1,1]", "two different"),
        (LabelFreeConfig, "evaluate label-free", "tasks=[future]", "future is not one of arrow, speed, retrieval"),
        (LabelFreeConfig, "evaluate label-free", "footage.moments=0", "moments"),
        (DecodeConfig, "evaluate decode", "decoder.heads=7", "decoder: dim=192 with heads=7"),
        (DecodeConfig, "evaluate decode", "held_out=1", "held_out=1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(schema, verb, word, message):
    with pytest.raises(UsageError, match=message):
        load(schema, verb, ["model=m", "catalog=c", "run.dir=r", word])


def test_units_of_label_free():
    config = label_free("seeds=2")
    found = evaluate_label_free.units(config)
    assert len({unit.name for unit in found}) == len(found)
    assert sum(unit.task == RETRIEVAL for unit in found) == 5  # random weights twice, the others once
    assert sum(unit.task == SPEED for unit in found) == 4 * 2 * 2


def test_verbs_load_without_ray_whose_token_must_be_set_first():
    verbs = ("label_free", "robot", "decode", "features", "masks")
    load = f"[importlib.import_module('pipelines.evaluate_' + verb) for verb in {verbs}]"
    code = f"import sys, importlib; {load}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
