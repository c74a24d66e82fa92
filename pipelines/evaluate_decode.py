"""jepa evaluate decode: a small decoder paints pixels from frozen features, of clips that it was not trained on.

Its error is told as PSNR beside that of the mean picture of the training clips, which needs no features, and beside the same
decoder on a randomly initialised encoder, which shows how much of the picture any encoder lets through. Intervals are
Student's over held-out groups of footage (clip_groups.py).

    run.dir/features/        tokens and pixels, by features.py
    run.dir/results/         decoder and numbers of each arm and seed
    run.dir/result.json, decoded.png

Legend: R clips, N tokens, D width of the encoder, P values of a tubelet.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jepa_core.config import ClipConfig
from jepa_core.encoder import clip_grid
from jepa_core.pixel_decoder import PixelDecoder, decoded, psnr, squared_errors, train_decoder
from jepa_core.positions import Grid
from jepa_core.sampling import Stream, clip_times, generator
from jepa_core.statistics import mean_interval, paired_difference
from pipelines import (
    catalog,
    clip_groups,
    evaluate_arms,
    features,
    frame_sheet,
    model_folder,
    run_folder,
    storage,
)
from pipelines.clip_groups import Groups
from pipelines.errors import InputRefused
from pipelines.evaluate_arms import PIXELS, RANDOM, TRAINED, Compared
from pipelines.evaluate_config import models
from pipelines.features import Cache, Item
from pipelines.frame_sheet import Block, Row
from pipelines.progress import Reporter
from pipelines.report_figures import clip_frames
from pipelines.seeing_config import DecodeConfig

MEAN_PICTURE = "mean picture"
PICTURE = "decoded.png"
COLUMNS = 8
LOSSES_TOLD = 50
HEAD = (
    "Held-out clips as they are, and as a small decoder paints them from frozen features. PSNR in dB, higher is nearer to the "
    "original; the mean picture of the training clips needs no features."
)


class Unit(NamedTuple):
    """One decoder: on the features of one seed of an arm."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{self.arm.replace(' ', '-')}-s{self.seed}"


class Shared(NamedTuple):
    """What every task needs. Rows are numbers among the clips that came out, int64."""

    config: DecodeConfig
    run_dir: str
    compared: Compared
    cache: Cache
    train: np.ndarray
    test: np.ndarray
    test_groups: list[str]
    """Name of the group of each test row."""
    split: str

    @property
    def grid(self) -> Grid:
        """Of a clip."""
        return clip_grid(self.compared.clip, self.compared.arms[f"{TRAINED}-0"].encoder)


def run(config: DecodeConfig, reporter: Reporter) -> dict[str, Any]:
    """Choose clips, encode, train decoders; what is finished is kept. Returns the PSNR of each arm.

    Raises UsageError and InputRefused as the modules that it calls do.
    """
    config, work = evaluate_arms.opened(config, units)
    run_dir, ref, result = work.run_dir, catalog.parse_ref(config.catalog), work.result
    if result is None:
        shown = config.footage
        size = ClipConfig(num_frames=shown.num_frames, fps=shown.fps, crop_size=shown.crop_size)
        compared = evaluate_arms.compared(config.model, (RANDOM, PIXELS), config.seeds, size)
        footage = clip_groups.read_footage(ref, shown.only, shown.max_videos)
        span = (compared.clip.num_frames - 1) / compared.clip.fps
        groups = clip_groups.group_footage(footage, span, shown.gap, shown.pieces, shown.least_videos)
        dealt = clip_groups.folds(groups, max(2, round(1 / config.held_out)), 0, "decoding")
        items = _items(config, groups, compared.clip)
        with evaluate_arms.session(config):
            evaluate_arms.check_size(compared.arms, compared.clip, len(items), config.max_gb)
            folder = storage.join(run_dir, evaluate_arms.FEATURES)
            cache = features.fill(ref, items, compared.arms, compared.clip, "tokens", folder, reporter, num_gpus=config.gpus)
            shared, failures = _split(config, run_dir, compared, cache, groups, dealt)
            evaluate_arms.run_tasks(_decode, [(unit,) for unit in work.missing], shared, config, reporter, len(work.missing))
            result = _finish(shared, work.results(), failures)
    told = f"PSNR in dB, {result['split']}, {result['held_out']} held-out groups"
    rows = [(line["arm"], _shown(line)) for line in result["arms"]]
    rows += [(f"{line['first']} - {line['second']}", _shown(line)) for line in result["differences"]]
    reporter.table(told, ("decoded from", "PSNR"), rows)
    return {"run": run_dir, **{f"{line['arm'].replace(' ', '_')}_db": line["mean"] for line in result["arms"]}}


def units(config: DecodeConfig) -> list[Unit]:
    """Every unit."""
    return [Unit(arm, seed) for seed in range(config.seeds) for arm in (TRAINED, RANDOM)] + [Unit(MEAN_PICTURE, 0)]


def _items(config: DecodeConfig, groups: Groups, clip: ClipConfig) -> list[Item]:
    """`moments` clips of every group, one after the other, at places drawn by number."""
    items = []
    for number in range(len(groups.groups) * config.footage.moments):
        group = groups.groups[number // config.footage.moments]
        u = float(generator(0, Stream.PROBE, number).random())
        times = clip_times(group.shots, clip.num_frames, clip.fps, u)
        items.append(Item(group.footage.video, group.footage.clip(times)))
    return items


def _split(
    config: DecodeConfig, run_dir: str, compared: Compared, cache: Cache, groups: Groups, dealt: np.ndarray
) -> tuple[Shared, list[dict[str, Any]]]:
    """The clips that came out, fold 0 held out. Raises InputRefused where too few did."""
    found = features.read(cache, ())
    total = len(groups.groups) * config.footage.moments
    of_group = found.kept // config.footage.moments
    held_out = dealt[of_group] == 0
    if len(found.failures) > config.max_failed * total or held_out.all() or not held_out.any():
        first = found.failures[0] if found.failures else {"video": "none", "reason": "no clip"}
        raise InputRefused(
            f"{len(found.failures)} of {total} clips do not decode, more than max_failed={config.max_failed:g}: first "
            f"{first['video']} ({first['reason']})"
        )
    names = [groups.groups[group].name for group in of_group[held_out]]
    rows = np.arange(len(found.kept))
    return Shared(config, run_dir, compared, cache, rows[~held_out], rows[held_out], names, groups.split), found.failures


def _rows(shared: Shared, name: str) -> Tensor:
    return features.read(shared.cache, [name]).x[name]


def _decode(unit: Unit, shared: Shared) -> list[str]:
    """Train one decoder and measure it; the mean picture needs no training."""
    torch.set_num_threads(1)
    began, pixels = time.perf_counter(), _rows(shared, PIXELS)
    train, test = torch.from_numpy(shared.train), torch.from_numpy(shared.test)
    told: dict[str, Any] = {}
    if unit.arm == MEAN_PICTURE:
        painted = _mean_picture(shared, pixels)[None].expand(len(test), -1, -1)
    else:
        tokens = _rows(shared, shared.compared.features_of(unit.arm, unit.seed))
        device = evaluate_arms.device(shared.config.gpus)
        decoder, losses = train_decoder(shared.config.decoder, tokens[train], pixels[train], shared.grid, unit.seed, device)
        painted = decoded(decoder, tokens[test])
        model_folder.save_tensors(_weights(shared, unit), {name: value.cpu() for name, value in decoder.state_dict().items()})
        every = max(1, len(losses) // LOSSES_TOLD)
        told = {"losses": losses[::every], "training_db": psnr(float(np.mean(losses[-every:]))),
                "parameters": sum(p.numel() for p in decoder.parameters())}  # fmt: skip
    values = [psnr(error) for error in squared_errors(painted, pixels[test]).tolist()]
    told |= {"clips": values, "seconds": time.perf_counter() - began}
    evaluate_arms.write_unit(shared.run_dir, unit.name, unit._asdict() | told)
    return [unit.name]


def _mean_picture(shared: Shared, pixels: Tensor) -> Tensor:
    """[R, N, P] -> float64 [N, P] of the training rows."""
    total = torch.zeros(pixels.shape[1:], dtype=torch.float64)
    for rows in torch.from_numpy(shared.train).split(64):
        total += pixels[rows].double().sum(0)
    return total / len(shared.train)


def _weights(shared: Shared, unit: Unit) -> str:
    return storage.join(shared.run_dir, evaluate_arms.RESULTS, f"{unit.name}.safetensors")


def _finish(shared: Shared, results: dict[Unit, dict[str, Any]], failures: list[dict[str, Any]]) -> dict[str, Any]:
    config = shared.config
    by_arm = {
        arm: np.mean([results[unit]["clips"] for unit in same], axis=0)
        for arm, same in evaluate_arms.grouped(list(results), lambda unit: unit.arm)
    }
    result = {
        "task": "decode",
        "lead": f"What frozen features keep of the picture, tested {shared.split}.",
        "catalog": config.catalog,
        "models": models(config.model),
        "seeds": config.seeds,
        "clip": {key: asdict(shared.compared.clip)[key] for key in ("num_frames", "fps", "crop_size")},
        "split": shared.split,
        "held_out": len(set(shared.test_groups)),
        "training_clips": len(shared.train),
        "held_out_clips": len(shared.test),
        "decoder": asdict(config.decoder),
        "failures": evaluate_arms.failures_told(failures),
        **scores(by_arm, shared.test_groups),
        "pictures": [
            {"file": PICTURE, "caption": "Held-out clips, and what a small decoder paints from frozen features of them."}
        ],
        "runs": [{key: value for key, value in result.items() if key != "clips"} for result in results.values()],
    }
    storage.write_bytes(storage.join(shared.run_dir, PICTURE), _sheet(shared, results))
    run_folder.write_json(shared.run_dir, run_folder.RESULT, result)
    return result


def scores(clips: dict[str, np.ndarray], groups: Sequence[str]) -> dict[str, Any]:
    """{arms, differences} in dB from PSNR float64 [R] of clips and their groups: means over groups, paired differences."""
    names = list(dict.fromkeys(groups))
    of = np.array([names.index(group) for group in groups])
    means = {arm: [float(values[of == number].mean()) for number in range(len(names))] for arm, values in clips.items()}

    def told(values: Sequence[float]) -> dict[str, Any]:
        found = mean_interval(values) if len(values) > 1 else None
        ends = {"low": found.low, "high": found.high} if found else {"low": None, "high": None}
        return {"mean": float(np.mean(values)), **ends, "by": "groups", "n": len(values)}

    apart = []
    for arm, values in means.items():
        if arm != TRAINED:
            line = told([a - b for a, b in zip(means[TRAINED], values, strict=True)])
            tests = paired_difference(means[TRAINED], values) if len(values) > 1 else None
            chances = {"p_t": tests.p_t if tests else None, "p_sign_flip": tests.p_sign_flip if tests else None}
            apart.append({"first": TRAINED, "second": arm, **line, **chances})
    return {"arms": [{"arm": arm, **told(values)} for arm, values in means.items()], "differences": apart}


def _sheet(shared: Shared, results: dict[Unit, dict[str, Any]]) -> bytes:
    """Held-out clips of as many groups as are to be shown: as they are, decoded from both encoders, and the mean picture."""
    first = [shared.test_groups.index(name) for name in dict.fromkeys(shared.test_groups)]
    chosen = [first[place] for place in frame_sheet.picked(len(first), shared.config.shown)]
    rows = torch.from_numpy(shared.test[chosen])
    pixels = _rows(shared, PIXELS)
    pictures = {"original": pixels[rows].float()}
    for unit in (Unit(TRAINED, 0), Unit(RANDOM, 0)):
        tokens = _rows(shared, shared.compared.features_of(*unit))[rows]
        decoder = PixelDecoder(shared.config.decoder, tokens.shape[2], pixels.shape[2], shared.grid)
        decoder.load_state_dict(model_folder.load_tensors(_weights(shared, unit)))
        pictures[unit.arm] = decoded(decoder.eval(), tokens)
    pictures[MEAN_PICTURE] = _mean_picture(shared, pixels)[None].expand(len(rows), -1, -1)
    patch = shared.compared.arms[f"{TRAINED}-0"].encoder.patch_size
    columns, blocks = frame_sheet.picked(shared.compared.clip.num_frames, COLUMNS), []
    for place, row in enumerate(chosen):
        lines = []
        for name, painted in pictures.items():
            cut = (painted[place] * 255).round().to(torch.uint8).numpy()
            quality = "" if name == "original" else f"\n{results[Unit(name, 0)]['clips'][row]:.1f} dB"
            label = {TRAINED: "from the trained encoder", RANDOM: "from a random encoder"}.get(name, name)
            lines.append(Row(label + quality, clip_frames(cut, shared.grid, patch)[columns]))
        blocks.append(Block(shared.test_groups[row], lines))
    return frame_sheet.draw(blocks, HEAD)


def _shown(line: dict[str, Any]) -> str:
    text = f"{line['mean']:.2f}"
    return text if line["low"] is None else f"{text} [{line['low']:.2f}, {line['high']:.2f}]"
