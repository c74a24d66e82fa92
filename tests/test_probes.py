"""Probes and their statistics: known answers, chance where there is nothing to read, many heads equal to each one alone."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jepa_core.attentive import AttentiveClassifier
from jepa_core.config import LINEAR_GRID, AttentiveConfig, HeadGrid
from jepa_core.heads import AttentiveHeads, HeadTrainer, LinearHeads, probabilities, train_heads
from jepa_core.probe import standardise
from jepa_core.readout import (
    Choice,
    Rows,
    Splits,
    _head_bytes,
    attentive_probe,
    best_choice,
    check_splits,
    few_labels,
    knn_probe,
    knn_votes,
    linear_probe,
    stratified_subset,
    top_k_accuracy,
    views_accuracy,
)
from jepa_core.statistics import mean_interval, paired_difference, sign_flip_p, t_cdf, t_quantile, wilson_interval
from jepa_core.temporal_tasks import arrow_of_time, playback_speed

NAMES = ("apple", "bear", "cup", "drum")
SMALL = AttentiveConfig(depth=1, heads=2)


def features(rows: int, seed: int, signal: float, dim: int = 16) -> Rows:
    """Rows around one centre a class; the centres are the same for all seeds."""
    centres = torch.randn(len(NAMES), dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % len(NAMES)
    return Rows(signal * centres[labels] + torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), labels)


def splits(signal: float, sizes: tuple[int, int, int] = (200, 100, 400)) -> Splits:
    return Splits(*(features(size, seed, signal) for seed, size in enumerate(sizes)), NAMES)


def token_rows(rows: int, seed: int, tokens: int = 12, dim: int = 16) -> Rows:
    """One token of each row, at a random place, tells the class: it lies along +c, all others along -c / (tokens - 1).

    So the mean of the tokens says nothing.
    """
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(NAMES), dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(rows) % len(NAMES)
    x = torch.randn(rows, tokens, dim, generator=rng)
    x -= 4 / (tokens - 1) * centres[labels][:, None]
    x[torch.arange(rows), torch.randint(tokens, (rows,), generator=rng)] += (4 + 4 / (tokens - 1)) * centres[labels]
    return Rows(x, labels)


def random_classifier(config: AttentiveConfig, dim: int) -> AttentiveClassifier:
    model = AttentiveClassifier(config, dim)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_separable_classes_are_read_by_all_probes():
    easy = splits(4.0)
    for readout in (linear_probe(easy), knn_probe(easy)):
        assert readout.test == readout.test_top5 == readout.chosen.validation == 1
        assert readout.num_test == 400


def test_random_labels_give_chance():
    """Within four standard errors of 1/4; every head has the chance to be the lucky one on validation, not on test."""
    noise = splits(0.0)
    error = math.sqrt(0.25 * 0.75 / 400)
    for readout in (linear_probe(noise), knn_probe(noise)):
        assert abs(readout.test - 0.25) < 4 * error
        assert readout.test_top5 == 1  # of four classes


def test_the_linear_probe_comes_near_the_best_possible():
    """Between equal round Gaussians nothing beats the nearest centre; 400 rows of training lose a little."""
    data = splits(0.5, (400, 400, 4000))
    centres = 0.5 * torch.randn(len(NAMES), 16, generator=torch.Generator().manual_seed(99))
    best = top_k_accuracy(-torch.cdist(data.test.x, centres), data.test.labels)
    assert 0.6 < best < 0.95
    assert best - 0.04 < linear_probe(data).test < best + 0.01


def test_the_scale_and_offset_of_features_do_not_matter():
    data = splits(0.7)
    scale, offset = torch.logspace(-0.5, 0.5, 16), torch.linspace(-1e4, 1e4, 16)
    moved = Splits(*(rows._replace(x=rows.x.double() * scale + offset) for rows in data[:3]), NAMES)
    assert linear_probe(moved).test == pytest.approx(linear_probe(data).test, abs=0.01)


def test_channels_that_never_move_are_harmless():
    first, second = standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[2.0, 5.0]]))
    assert first.isfinite().all()
    assert second.tolist() == [[0.0, 0.0]]
    assert standardise(torch.ones(4, 3))[0].abs().max() == 0


@pytest.mark.parametrize("batch_size", [0, 64])
def test_linear_heads_together_equal_each_alone(batch_size):
    """And a head that diverges spoils no other. Not 200 rows: AdamW would scale up the rounding of zero gradients."""
    rows = features(198, 0, 0.5)
    grid = HeadGrid((1e30, 0.1, 0.01), (0.0, 1.0), epochs=10, batch_size=batch_size)
    together = LinearHeads(16, 4, 6)
    train_heads(together, *rows, grid, seed=3)
    for index, (lr, decay) in enumerate(grid.heads[2:], start=2):
        alone = LinearHeads(16, 4, 1)
        train_heads(alone, *rows, replace(grid, lrs=(lr,), weight_decays=(decay,)), seed=3)
        torch.testing.assert_close(together.heads[index].state_dict(), alone.heads[0].state_dict(), rtol=1e-4, atol=1e-5)


def test_the_seed_decides_the_order_of_rows():
    rows, grid = features(200, 0, 0.5), replace(LINEAR_GRID, epochs=2, batch_size=32)

    def trained(seed):
        heads = LinearHeads(16, 4, len(grid.heads))
        train_heads(heads, *rows, grid, seed)
        return heads.heads[0].weight

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attentive_heads_of_depth_one_give_the_official_logits_and_gradients(heads):
    torch.manual_seed(0)
    config = AttentiveConfig(depth=1, heads=heads, num_classes=5)
    together = AttentiveHeads(config, 32, 3)
    for index in range(3):
        together.heads[index].load_state_dict(random_classifier(config, 32).state_dict())
    x, target = torch.randn(6, 20, 32), torch.randn(3, 6, 5)
    logits = together(x, [0, 1, 2])
    (logits * target).sum().backward()
    ours = {name: p.grad.clone() for name, p in together.named_parameters()}
    together.zero_grad()
    alone = torch.stack([head(x) for head in together.heads])
    torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
    (alone * target).sum().backward()
    torch.testing.assert_close(ours, {name: p.grad for name, p in together.named_parameters()}, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("depth", "pass_bytes"), [(1, 20_000), (3, 300_000)])
def test_attentive_heads_together_equal_the_official_module_trained_alone(depth, pass_bytes, monkeypatch):
    """Ten steps of plain AdamW on a plain AttentiveClassifier, rate by the published cosine; gradients in several passes here."""
    monkeypatch.setattr("jepa_core.heads.PASS_BYTES", pass_bytes)
    config = replace(SMALL, depth=depth, num_classes=4)
    grid = HeadGrid((3e-3, 1e-3), (0.01, 0.4), epochs=10, batch_size=0)
    rows = token_rows(24, 0)
    together = AttentiveHeads(config, 16, 4, seed=5)
    assert 2 < pass_bytes // together.row_bytes((12, 16)) < 12  # of 24 rows: the last pass is a part of one
    start = {name: value.clone() for name, value in together.heads[0].state_dict().items()}
    train_heads(together, *rows, grid, seed=0)
    for index, (lr, decay) in enumerate(grid.heads):
        alone = AttentiveClassifier(config, 16)
        alone.load_state_dict(start)
        optimizer = torch.optim.AdamW(alone.parameters(), lr=lr, weight_decay=decay)
        for step in range(1, 11):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / 10))
            F.cross_entropy(alone(rows.x), rows.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(together.heads[index](rows.x), alone(rows.x), rtol=1e-3, atol=1e-4)
        assert (together.heads[index](rows.x) - together.heads[index - 2](rows.x)).abs().max() > 1e-2  # of the other rate


def test_an_attentive_probe_finds_the_token_that_tells_and_exports_it():
    data = Splits(token_rows(200, 0), token_rows(100, 1), token_rows(200, 2), NAMES)
    grid = HeadGrid((1e-2, 1e-9), (0.01,), epochs=15, batch_size=32, warmup_epochs=2)
    readout, state = attentive_probe(data, SMALL, grid, seed=1)
    assert readout.test > 0.9
    assert readout.chosen == readout.table[0]
    assert readout.table[1].validation < 0.6  # the rate of nothing
    pooled = Splits(*(Rows(rows.x.mean(1), rows.labels) for rows in data[:3]), NAMES)
    assert linear_probe(pooled).test < 0.4
    model = AttentiveClassifier(replace(SMALL, num_classes=4), 16)
    model.load_state_dict(state)
    assert top_k_accuracy(model(data.test.x), data.test.labels) == readout.test


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_a_grid_that_is_too_large_is_trained_in_parts_with_the_same_heads(heads, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    rows = [Rows(torch.randn(24, 5, 12, generator=generator), torch.arange(24) % 3) for _ in range(3)]
    splits, config = Splits(*rows, ["a", "b", "c"]), AttentiveConfig(depth=1, heads=2)
    grid = HeadGrid((3e-2, 3e-3), (0.01, 0.1, 0.5), epochs=3, batch_size=8)
    whole, state = attentive_probe(splits, config, grid)
    monkeypatch.setattr("jepa_core.readout.HEADS_BYTES", heads * _head_bytes(config, 12, 3))
    parts, same = attentive_probe(splits, config, grid)
    assert [choice.settings for choice in parts.table] == [choice.settings for choice in whole.table]
    assert parts.chosen.settings == whole.chosen.settings
    assert parts.predicted == whole.predicted
    for name, value in state.items():
        torch.testing.assert_close(same[name], value, rtol=1e-4, atol=1e-6)


def test_held_out_views_are_averaged_after_the_softmax():
    torch.manual_seed(0)
    heads = AttentiveHeads(replace(SMALL, num_classes=4), 16, 2)
    heads.heads[1].load_state_dict(random_classifier(heads.config, 16).state_dict())
    x = torch.randn(5, 3, 12, 16)
    ((rows, found),) = probabilities(heads, x, [0, 1])
    expected = torch.stack([heads.heads[1](x[:, view]).softmax(-1) for view in range(3)]).mean(0)
    assert rows.start == 0
    torch.testing.assert_close(found[1], expected)
    logits = torch.stack([heads.heads[1](x[:, view]) for view in range(3)], dim=1)
    labels = expected.argmax(1)
    assert views_accuracy(logits, labels) == 1


def test_views_vote_with_probabilities_not_with_logits():
    """One view shouts with a logit of 100, two speak for the other class: the mean of logits would follow the one."""
    logits = torch.tensor([[[100.0, 0.0, -9.0], [0.0, 2.0, -9.0], [0.0, 2.0, -9.0]]])
    assert views_accuracy(logits, torch.tensor([1])) == 1
    assert views_accuracy(logits, torch.tensor([0])) == 0
    assert views_accuracy(logits, torch.tensor([0]), k=2) == 1
    assert views_accuracy(logits, torch.tensor([2]), k=2) == 0
    assert views_accuracy(logits, torch.tensor([2]), k=5) == 1


def test_views_reach_the_readout():
    data = Splits(token_rows(100, 0), token_rows(40, 1), token_rows(40, 2), NAMES)
    both = torch.stack([data.test.x, token_rows(40, 3).x], dim=1)
    grid = HeadGrid((1e-2,), (0.01,), epochs=3, batch_size=32)
    readout, state = attentive_probe(data._replace(test=Rows(both, data.test.labels)), SMALL, grid)
    model = AttentiveClassifier(replace(SMALL, num_classes=4), 16)
    model.load_state_dict(state)
    logits = torch.stack([model(both[:, view]) for view in range(2)], dim=1)
    assert readout.test == views_accuracy(logits, data.test.labels)


def test_ties_go_to_the_smaller_rate():
    table = [Choice({"lr": lr, "weight_decay": 0.1}, accuracy) for lr, accuracy in ((0.1, 0.8), (0.01, 0.8), (0.001, 0.7))]
    assert best_choice(table) == 1
    assert best_choice(table[::-1]) == 1


def test_the_chosen_head_is_the_best_on_validation_whatever_the_test_says():
    data = splits(0.6)
    readout = linear_probe(data)
    assert readout.chosen.validation == max(choice.validation for choice in readout.table)
    assert [(c.settings["lr"], c.settings["weight_decay"]) for c in readout.table] == LINEAR_GRID.heads
    upside_down = Rows(data.test.x, (data.test.labels + 1) % 4)
    assert linear_probe(data._replace(test=upside_down)).chosen == readout.chosen


@pytest.mark.parametrize("k", [1, 5, 500])
def test_knn_against_a_direct_loop(k):
    data = splits(0.3, (60, 40, 40))
    votes = knn_votes(data.train, data.test.x, k, 0.07, 4)
    for query, found in zip(data.test.x, votes, strict=True):
        cosines = [(float(query @ row / (query.norm() * row.norm())), int(label)) for row, label in zip(*data.train, strict=True)]
        expected = np.zeros(4)
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            expected[label] += math.exp(cosine / 0.07)
        np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-3, atol=1e-6)


def test_few_labels_are_stratified_nested_and_decided_by_the_seed():
    labels = np.repeat([0, 1, 2], [600, 300, 3])
    small, large = stratified_subset(labels, 30, 7), stratified_subset(labels, 300, 7)
    assert len(np.unique(small)) == 30
    assert set(small) < set(large)
    np.testing.assert_array_equal(small, stratified_subset(labels, 30, 7))
    assert set(small) != set(stratified_subset(labels, 30, 8))
    np.testing.assert_allclose(np.bincount(labels[large]), [199, 100, 1], atol=1)
    assert np.bincount(labels[stratified_subset(labels, 3, 0)]).tolist() == [1, 1, 1]
    times_taken = np.bincount(np.concatenate([stratified_subset(labels, 90, seed) for seed in range(200)]), minlength=903)
    assert times_taken[:900].min() > 0  # no row is left out for ever
    for count in (2, 904):
        with pytest.raises(ValueError, match=f"{count} labels cannot be chosen from 903 rows of 3 classes"):
            stratified_subset(labels, count, 0)
    low = few_labels(splits(4.0), 8, 0)
    assert np.bincount(low.train.labels).tolist() == [2, 2, 2, 2]
    assert linear_probe(low).test > 0.9


def refused(message: str, **changes) -> None:
    with pytest.raises(ValueError, match=message):
        check_splits(splits(1.0)._replace(**changes), row_axes=1)


def test_what_a_probe_cannot_answer_is_refused_with_names_and_numbers():
    good = splits(1.0)
    check_splits(good, row_axes=1)
    refused(r"test: 400 rows, but labels \[399\]", test=Rows(good.test.x, good.test.labels[1:]))
    refused("one int64 a row", train=Rows(good.train.x, good.train.labels.float()))
    refused(r"validation: labels \[4, 7\] are none of the 4 classes",
            validation=Rows(good.validation.x[:4], torch.tensor([0, 4, 7, 1])))  # fmt: skip
    refused(r"train: labels \[-1\]", train=Rows(good.train.x[:2], torch.tensor([0, -1])))
    without = good.test.labels != 2
    refused("test: 1 of 4 classes are missing: cup", test=Rows(good.test.x[without], good.test.labels[without]))
    refused("2 of 6 classes have no rows: egg, fig", names=(*NAMES, "egg", "fig"))
    refused("and 5 more", names=(*NAMES, *"abcdefghij"))
    for value in (math.nan, math.inf):
        bad = good.validation.x.clone()
        bad[[17, 60], 3] = value
        refused("validation: 2 of 100 rows .* NaN or infinite, first row 17", validation=Rows(bad, good.validation.labels))
    refused(r"train: features of shape \[200, 1, 16\]", train=Rows(good.train.x[:, None], good.train.labels))
    refused(r"test: rows of shape \[400, 15\], train has \[200, 16\]", test=Rows(good.test.x[:, 1:], good.test.labels))
    with pytest.raises(ValueError, match="num_queries=1, not 3"):
        AttentiveHeads(replace(SMALL, num_queries=3), 16, 1)
    with pytest.raises(ValueError, match="2 heads, but the grid has 20"):
        HeadTrainer(LinearHeads(4, 2, 2), HeadGrid(), 1)
    with pytest.raises(ValueError, match="k-NN has no probabilities"):
        knn_probe(good._replace(test=Rows(good.test.x[:, None], good.test.labels)))


def test_the_published_grid():
    assert len(HeadGrid().heads) == 20
    assert HeadGrid().heads[0] == (5e-3, 0.01)
    assert len(set(HeadGrid().heads)) == 20


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (4, 2.7764451), (5, 2.5705818), (9, 2.2621572), (10, 2.2281389),
     (29, 2.0452296), (30, 2.0422725), (1000, 1.9623391)],
)  # fmt: skip
def test_student_against_the_printed_table(freedom, quantile):
    assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=1e-6)
    assert t_quantile(0.025, freedom) == pytest.approx(-quantile, abs=1e-6)
    assert t_cdf(quantile, freedom) == pytest.approx(0.975, abs=1e-8)
    assert t_cdf(0, freedom) == 0.5


def test_intervals_by_hand():
    """Mean 3, deviation sqrt(2.5), t of 4 degrees of freedom 2.7764: 3 -+ 1.9632. 81 of 263: Newcombe 1998, method 3."""
    interval = mean_interval([1, 2, 3, 4, 5])
    assert (interval.mean, interval.n) == (3, 5)
    assert interval.high - 3 == pytest.approx(1.963243, abs=1e-5)
    assert 3 - interval.low == pytest.approx(1.963243, abs=1e-5)
    wilson = wilson_interval(81, 263)
    assert (wilson.low, wilson.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson_interval(0, 10).low == pytest.approx(0, abs=1e-12)
    assert wilson_interval(0, 10).high == pytest.approx(0.2775, abs=5e-5)
    assert wilson_interval(10, 10).high == pytest.approx(1)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.normal(2.0, 3.0, 4)) for _ in range(2000)]
    held = np.mean([interval.low <= 2 <= interval.high for interval in intervals])
    assert abs(held - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


def test_paired_differences_by_hand():
    """Student's sleep data (1908): mean 1.58, t = 4.0621 on 9 degrees of freedom, p = 0.002833, interval 0.7001 to 2.4599."""
    first = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    second = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == (pytest.approx(0.7001142, abs=1e-6), pytest.approx(2.4598858, abs=1e-6))
    assert found.p_t == pytest.approx(0.002833, abs=1e-6)
    assert found.p_sign_flip == 4 / 1024  # nine of one sign, and a zero either way: 2 * 2 of 2**10
    assert paired_difference(second, first).mean == pytest.approx(-1.58)
    assert paired_difference(second, first).p_t == pytest.approx(found.p_t)
    assert paired_difference([1, 2, 3], [0, 1, 2]).p_t == 0
    assert paired_difference([1, 2], [1, 2]).p_t == 1
    assert paired_difference(range(30), [0] * 30).p_sign_flip is None


def test_sign_flips_against_all_of_them():
    differences = np.random.default_rng(1).normal(0.4, 1.0, 7).round(2)
    signs = np.array(list(itertools.product([1, -1], repeat=7)))
    expected = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()
    assert sign_flip_p(differences) == expected
    assert sign_flip_p([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip_p([0.0, 0.0]) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([1.0]), "at least 2 finite values"),
        (lambda: mean_interval([1.0, math.nan]), "at least 2 finite values"),
        (lambda: paired_difference([1, 2], [1, 2, 3]), "2 and 3"),
        (lambda: sign_flip_p([1.0] * 21), "21 pairs"),
        (lambda: wilson_interval(3, 2), "3 correct of 2"),
        (lambda: t_cdf(1.0, 0), "at least 1 degree"),
        (lambda: t_quantile(1.0, 3), r"in \(0, 1\)"),
    ],
)
def test_statistics_refuse_what_has_no_answer(call, message):
    with pytest.raises(ValueError, match=message):
        call()


PTS = np.arange(0, 20, 1 / 24)
"""20 seconds of 24 frames each."""


def test_the_arrow_of_time_shows_the_same_frames_both_ways():
    frames, labels = arrow_of_time(PTS, 8, 4.0, seed=0, item=3)
    assert labels.tolist() == [0, 1]
    np.testing.assert_array_equal(frames[1], frames[0][::-1])
    np.testing.assert_array_equal(np.diff(frames[0]), [6] * 7)
    again = arrow_of_time(PTS, 8, 4.0, seed=0, item=3).frames
    np.testing.assert_array_equal(frames, again)
    starts = [arrow_of_time(PTS, 8, 4.0, seed, item).frames[0, 0] for seed in range(5) for item in range(40)]
    assert len(set(starts)) > 100
    assert min(starts) < 40 < 380 < max(starts)


@pytest.mark.parametrize("item", range(20))
def test_speeds_are_shown_around_the_same_moment(item):
    frames, labels = playback_speed(PTS, 8, 4.0, seed=0, item=item)
    assert labels.tolist() == [0, 1, 2]
    for row, speed in zip(frames, (1, 2, 4), strict=True):
        np.testing.assert_allclose(np.diff(PTS[row]), speed / 4, atol=1 / 24 + 1e-9)
        assert PTS[row[-1]] - PTS[row[0]] == pytest.approx(7 * speed / 4, abs=1 / 24 + 1e-9)
    middles = PTS[frames].mean(1)
    np.testing.assert_allclose(middles, middles[0], atol=1 / 24 + 1e-9)


def test_clips_keep_within_a_shot():
    shots = np.array([[0.0, 2.0], [2.5, 11.0], [11.5, 19.9]])
    seen = set()
    for item in range(60):
        for frames in (playback_speed(PTS, 8, 4.0, 0, item, shots).frames, arrow_of_time(PTS, 8, 1.0, 0, item, shots).frames):
            inside = [low - 1 / 24 <= PTS[frames].min() and PTS[frames].max() <= high for low, high in shots]
            assert sum(inside) == 1
            seen.add(inside.index(True))
    assert seen == {1, 2}


def test_videos_that_would_give_the_answer_away_are_refused():
    with pytest.raises(ValueError, match=r"8 frames at 1 fps lasts 7\.00 s, the longest shot 1\.96 s"):
        playback_speed(PTS[:48], 8, 4.0, 0, 0)
    with pytest.raises(ValueError, match=r"lasts 1\.75 s, the longest shot 0\.96 s"):
        arrow_of_time(PTS[:24], 8, 4.0, 0, 0)
    slow = np.arange(0, 20, 0.5)
    with pytest.raises(ValueError, match=r"frames 0\.250 s apart repeat"):
        playback_speed(slow, 8, 4.0, 0, 0)
    with pytest.raises(ValueError, match=r"frames 0\.250 s apart repeat"):
        arrow_of_time(slow, 8, 4.0, 0, 0)
