"""jepa plan-capacity: what a corpus, its training and its robot take, by measured rates, with the arithmetic of every line.

Legend: a `Row` is (what, value, unit, how): how says from which numbers, so that anybody can do it again on paper. `Totals` adds
up what is paid for. Options: capacity_config.CapacityConfig; rates: capacity_rates.Rates. What a run took: capacity_measured.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jepa_core.config import PretrainModelConfig
from jepa_core.encoder import clip_grid
from jepa_core.flops import PEAK_TFLOPS, action_flops, pretraining_flops
from jepa_core.masks import draw_masks
from jepa_core.positions import Grid
from pipelines import presets, storage
from pipelines.capacity_config import CapacityConfig, CorpusConfig, PricesConfig, StageConfig
from pipelines.capacity_rates import Rates
from pipelines.config import PostTrainConfig, PretrainConfig, TrainConfig
from pipelines.errors import UsageError
from pipelines.progress import Reporter, duration

COLUMNS = ("what", "value", "unit", "how")
CLIP_SECONDS = 4.0
"""Of the clips that bytes were measured for."""
NOWHERE, POST_NOWHERE = ["catalog=none", "run.dir=none"], ["trajectories=none", "encoder=none", "run.dir=none"]


class Row(NamedTuple):
    """One line of a plan."""

    what: str
    value: str
    unit: str
    how: str


@dataclass
class Totals:
    """What is paid for, over all stages."""

    wall_s: float = 0.0
    gpu_hours: float = 0.0
    core_hours: float = 0.0
    requests: float = 0.0
    stored_gb: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One table of the plan."""

    name: str
    rows: list[Row] = field(default_factory=list)

    def add(self, what: str, value: float, unit: str, how: str) -> None:
        """One more line."""
        self.rows.append(Row(what, number(value), unit, how))


def run(config: CapacityConfig, reporter: Reporter) -> dict[str, Any]:
    """Print the tables, and write them to `out`; the totals are the result. Raises UsageError for names that nothing has."""
    rates = Rates(config.rates)
    if config.run:
        from pipelines.capacity_measured import measured

        stages, result = measured(config, rates)
    else:
        stages, result = plan(config, rates)
    for stage in stages:
        reporter.table(stage.name, COLUMNS, stage.rows)
    sources = [Row(name, number(rate.value), rate.unit, told(rate.source, rate.assumed)) for name, rate in rates.used.items()]
    reporter.table("rates", COLUMNS, sources)
    if config.out:
        storage.write_bytes(config.out, markdown([*stages, Stage("rates", sources)]).encode())
        result |= {"out": config.out}
    return result


def plan(config: CapacityConfig, rates: Rates) -> tuple[list[Stage], dict[str, Any]]:
    """All stages, and the totals for the result."""
    stages, totals = [], Totals()
    if config.corpus.hours:
        stages.append(_ingest(config, rates, totals))
        if config.corpus.normalise:
            stages.append(_normalise(config, rates, totals))
        stages += [_pretrain(config, stage, rates, totals) for stage in config.stages]
    if config.post_train.hours:
        stages.append(_post_train(config, rates, totals))
    stages.append(_sum(config.prices, totals))
    result = {"wall": duration(totals.wall_s), "gpu_hours": round(totals.gpu_hours), "core_hours": round(totals.core_hours)}
    return stages, result


def _ingest(config: CapacityConfig, rates: Rates, totals: Totals) -> Stage:
    corpus, stage = config.corpus, Stage("ingest")
    videos = corpus.hours * 60 / corpus.video_minutes
    stage.add("videos", videos, "", f"{number(corpus.hours)} h x 60 / {number(corpus.video_minutes)} min")
    stored = corpus.hours * corpus.gb_per_hour
    stage.add("source", stored / 1e3, "TB", f"{number(corpus.hours)} h x {number(corpus.gb_per_hour)} GB/h")
    each = rates["list_requests"] + rates[f"probe_requests_{corpus.validate}"]
    requests = videos * each
    stage.add("requests", requests, "", f"{number(videos)} videos x {number(each)} (list and validate={corpus.validate})")
    if corpus.validate == "full":
        stage.add("fetched", stored / 1e3, "TB", "all of the source")
    else:
        size = rates[f"probe_mb_{corpus.validate}"]
        stage.add("fetched", videos * size / 1e6, "TB", f"{number(videos)} videos x {number(size)} MB")
    by_hour = corpus.validate == "full"
    probe, count = rates[f"probe_cpu_{corpus.validate}"], corpus.hours if by_hour else videos
    hours = (count * probe + videos * rates["list_cpu"]) / 3600
    stage.add(
        "CPU", hours, "core-hours", f"{number(count)} {'h' if by_hour else 'videos'} x {number(probe)} CPU-s / 3600, and listing"
    )
    waits = requests * rates["latency"] / 3600 / config.ingest_cores
    working = hours / config.ingest_cores
    stage.add(
        "wall time",
        working + waits,
        "h",
        f"on {config.ingest_cores:,} cores: {number(working)} h of CPU + {number(waits)} h of waiting for the store",
    )
    stage.add(
        "packet index",
        corpus.hours * rates["index_mb"] / 1e3,
        "GB",
        f"{number(corpus.hours)} h x {number(rates['index_mb'])} MB/h",
    )
    totals.wall_s += (working + waits) * 3600
    totals.core_hours += (working + waits) * config.ingest_cores
    totals.requests += requests
    totals.stored_gb += stored + corpus.hours * rates["index_mb"] / 1e3
    return stage


def _normalise(config: CapacityConfig, rates: Rates, totals: Totals) -> Stage:
    corpus, stage = config.corpus, Stage("normalise")
    hours = corpus.hours * rates["normalise_cpu"] / 3600
    stage.add("CPU", hours, "core-hours", f"{number(corpus.hours)} h x {number(rates['normalise_cpu'])} CPU-s / 3600")
    stage.add("wall time", hours / config.ingest_cores, "h", f"on {config.ingest_cores:,} cores")
    shards = corpus.hours * rates["normalised_gb"]
    stage.add("shards", shards / 1e3, "TB", f"{number(corpus.hours)} h x {number(rates['normalised_gb'])} GB/h")
    totals.wall_s += hours / config.ingest_cores * 3600
    totals.core_hours += hours
    totals.stored_gb += shards
    return stage


def _pretrain(config: CapacityConfig, given: StageConfig, rates: Rates, totals: Totals) -> Stage:
    run = stage_config(given)
    stage = Stage(" ".join(["pretrain", given.preset, *given.overrides]))
    batch, samples = run.train.batch_size, run.train.steps * run.train.batch_size
    stage.add("samples", samples, "clips", f"{number(run.train.steps)} steps x {number(batch)}")
    seconds = run.clip.num_frames / run.clip.fps
    seen = samples * seconds / 3600
    stage.add(
        "epochs", seen / config.corpus.hours, "", f"{number(samples)} x {number(seconds)} s / {number(config.corpus.hours)} h"
    )
    flops = sample_flops(run)
    stage.add(
        "FLOPs of a clip",
        flops / 1e12,
        "TFLOP",
        f"{run.clip.num_frames} frames of {run.clip.crop_size} px: jepa_core.flops, forward and backward",
    )
    speed = _trained(stage, config, rates, run.train, flops, totals)
    _decoded(stage, config, rates, samples, speed, run.clip.num_frames, seconds, totals)
    return stage


def _post_train(config: CapacityConfig, rates: Rates, totals: Totals) -> Stage:
    given = config.post_train
    run = presets.load(PostTrainConfig, "post-train", [f"preset={given.preset}", *POST_NOWHERE, *given.overrides])
    encoder = stage_config(given.encoder).model.encoder
    stage = Stage(" ".join(["post-train", given.preset, *given.overrides]))
    config = replace(config, gpus=given.gpus or config.gpus)
    episodes = given.hours * 3600 / given.episode_seconds
    stage.add("episodes", episodes, "", f"{number(given.hours)} h x 3600 / {number(given.episode_seconds)} s")
    stage.add(
        "source", given.hours * given.gb_per_hour / 1e3, "TB", f"{number(given.hours)} h x {number(given.gb_per_hour)} GB/h"
    )
    samples = run.train.steps * run.train.batch_size
    stage.add("samples", samples, "clips", f"{number(run.train.steps)} steps x {number(run.train.batch_size)}")
    seconds = run.num_frames / run.fps
    stage.add(
        "epochs", samples * seconds / 3600 / given.hours, "", f"{number(samples)} x {number(seconds)} s / {number(given.hours)} h"
    )
    tokens = (given.crop_size // encoder.patch_size) ** 2
    flops = action_flops(encoder, run.predictor, tokens, run.num_frames, run.rollout_steps)
    stage.add(
        "FLOPs of a clip",
        flops / 1e12,
        "TFLOP",
        f"{run.num_frames} frames of {given.crop_size} px through the frozen encoder, the predictor both ways",
    )
    speed = _trained(stage, config, rates, run.train, flops, totals)
    _decoded(stage, config, rates, samples, speed, run.num_frames, seconds, totals, source=True)
    totals.stored_gb += given.hours * given.gb_per_hour
    return stage


def _trained(stage: Stage, config: CapacityConfig, rates: Rates, train: TrainConfig, flops: float, totals: Totals) -> float:
    """Rows of what the devices do; samples/s while they do it. Raises UsageError where a batch does not go round them."""
    parts, devices = max(train.microbatches, train.num_workers, 1), config.gpus
    peak, share, how = device(config, rates)
    if config.gpu != "cpu":  # a core is a part of a worker
        parts = max(parts, config.gpus)
        if train.batch_size % parts:
            raise UsageError(f"gpus={config.gpus}: a batch of {train.batch_size} cannot be dealt to them in equal parts")
        devices = parts / math.ceil(parts / config.gpus)
        turns = f"{parts} microbatches on {config.gpus:,}: turns {math.ceil(parts / config.gpus)}"
        stage.add("devices at work", devices, "", turns)
    able = devices * peak * 1e12 * share / flops
    stage.add("speed of the devices", able, "clips/s", f"{number(devices)} x {how} / {number(flops / 1e12)} TFLOP")
    unit, handed = train.batch_size / parts, rates["unit_cpu"]
    fed = unit / handed
    how = f"{number(unit)} clips a unit / {number(handed)} CPU-s in the one process that hands them out"
    stage.add("speed of the feed", fed, "clips/s", how)
    speed, samples = min(able, fed), train.steps * train.batch_size
    wall = samples / speed / rates["goodput"]
    how = f"{number(samples)} clips / {number(speed)}, the lower speed / goodput {number(rates['goodput'])}"
    stage.add("wall time", wall / 86400, "days", how)
    device_hours = wall / 3600 * config.gpus
    name = "core-hours" if config.gpu == "cpu" else "GPU-hours"
    stage.add("paid for", device_hours, name, f"{config.gpus:,} x {number(wall / 3600)} h")
    totals.wall_s += wall
    if config.gpu == "cpu":
        totals.core_hours += device_hours
    else:
        totals.gpu_hours += device_hours
    return speed


def _decoded(
    stage: Stage, config: CapacityConfig, rates: Rates, samples: float, speed: float, frames: int, seconds: float, totals: Totals,
    *, source: bool = False,
) -> None:  # fmt: skip
    """Rows of what feeding the devices takes."""
    cpu, how = clip_cpu(config.corpus, rates, frames, source=source)
    cores = speed * cpu
    stage.add("cores for decoding", cores, "", f"{number(speed)} clips/s x {number(cpu)} CPU-s ({how})")
    stage.add(
        "decode nodes",
        math.ceil(cores / config.cores_per_node),
        "",
        f"{number(cores)} / {config.cores_per_node} cores a node, rounded up",
    )
    hours = samples * cpu / 3600
    stage.add("CPU", hours, "core-hours", f"{number(samples)} clips x {number(cpu)} CPU-s / 3600")
    requests = samples * rates["clip_requests"]
    stage.add("requests", requests, "", f"{number(samples)} clips x {number(rates['clip_requests'])}")
    name = "shard_mb" if config.corpus.normalise and not source else "clip_mb"
    size = rates[name] * seconds / CLIP_SECONDS
    stage.add(
        "fetched",
        samples * size / 1e6,
        "TB",
        f"{number(samples)} clips x {number(rates[name])} MB x {number(seconds)} s / {number(CLIP_SECONDS)} s",
    )
    totals.core_hours += hours
    totals.requests += requests


def _sum(prices: PricesConfig, totals: Totals) -> Stage:
    stage = Stage("all of it")
    stage.add("wall time", totals.wall_s / 86400, "days", "one stage after the other")
    bought = [
        ("GPU-hours", totals.gpu_hours, "h", prices.gpu_hour),
        ("core-hours", totals.core_hours, "h", prices.core_hour),
        ("requests", totals.requests / 1e6, "million", prices.million_requests),
        ("stored", totals.stored_gb, "GB", prices.gb_month * totals.wall_s / 86400 / 30),
    ]
    money = 0.0
    for what, amount, unit, price in bought:
        stage.add(what, amount, unit, "sum of the stages")
        if price:
            whence = "over the wall time, " if what == "stored" else ""
            stage.add(f"cost of {what}", amount * price, prices.currency, f"x {number(price)}, {whence}prices of {prices.date}")
            money += amount * price
    if money:
        stage.add("cost", money, prices.currency, f"sum, at the prices given for {prices.date}")
    return stage


def stage_config(given: StageConfig) -> PretrainConfig:
    """The run that a stage means. Raises UsageError as `jepa pretrain` does."""
    return presets.load(PretrainConfig, "pretrain", [f"preset={given.preset}", *NOWHERE, *given.overrides])


def sample_flops(run: PretrainConfig) -> float:
    """Operations for one clip of a pretraining run, with masks as it draws them."""
    grid = clip_grid(run.clip, run.model.encoder)
    return pretraining_flops(run.model, grid, kept_tokens(run.model, grid, run.seed))


def kept_tokens(model: PretrainModelConfig, grid: Grid, seed: int = 0) -> list[tuple[float, float]]:
    """Tokens of context and target of each mask: means over 16 batches of 16 drawn samples."""
    steps = range(16)
    kept = []
    for index, mask in enumerate(model.masks):
        drawn = [draw_masks(mask, index, grid, seed, step, range(16 * step, 16 * step + 16), model.mask_policy) for step in steps]
        ratios = [masks.ratios(grid) for masks in drawn]
        kept.append(tuple(sum(ratio[part] for ratio in ratios) / len(ratios) * grid.num_tokens for part in (0, 1)))
    return kept


def device(config: CapacityConfig, rates: Rates) -> tuple[float, float, str]:
    """(peak TFLOP/s of one device, share of it that a run gets, both as text). Raises UsageError for an unknown device."""
    if config.gpu == "cpu":
        return rates["cpu_tflops"], 1.0, f"{number(rates['cpu_tflops'])} TFLOP/s a core"
    if config.gpu not in PEAK_TFLOPS:
        raise UsageError(f"gpu={config.gpu} is unknown: choose from {', '.join(PEAK_TFLOPS)}, or cpu")
    peak = PEAK_TFLOPS[config.gpu]
    return peak, rates["mfu"], f"{number(peak)} TFLOP/s of one {config.gpu} x MFU {number(rates['mfu'])}"


def clip_cpu(corpus: CorpusConfig, rates: Rates, frames: int, *, source: bool = False) -> tuple[float, str]:
    """CPU seconds of a clip through Ray, and of what: a line through what 16 and 64 frames take, from 8 frames on."""
    low, high = rates["clip_cpu_16"], rates["clip_cpu_64"]
    cost = low + (high - low) * (max(8, frames) - 16) / 48
    told = f"{max(8, frames)} frames"
    if corpus.normalise and not source:
        cost *= rates["shard_cpu_16"] / low
        told += " of a shard"
    return cost + rates["feed_cpu"], told


def number(value: float) -> str:
    """Three digits that count: `1,600,000`, `0.224`, `12.5`."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{round(value, digits):,.{min(digits, 8)}f}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def told(source: str, assumed: bool) -> str:
    """Where a rate comes from."""
    return f"ASSUMED: {source}" if assumed else source


def markdown(stages: list[Stage]) -> str:
    """The tables for a page."""
    parts = []
    for stage in stages:
        lines = [f"| {' | '.join((stage.name, *COLUMNS[1:]))} |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in stage.rows]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
