"""Settings of a sweep: which masks are compared, what they are called, and how much of a clip they leave and hide.

Settings of a grid and random ones are a pure function of the configuration: (search_seed, number) for the latter. Optuna's depend
on results, so they are recorded; each comes from a fresh sampler of its own seed that is told all results known, and there is no
state to restore.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from jepa_core.config import MaskConfig
from jepa_core.encoder import clip_grid
from jepa_core.masks import draw_masks
from pipelines.config import PretrainConfig
from pipelines.errors import UsageError
from pipelines.sweep_config import DEFAULT, FAMILIES, SpaceConfig, SweepConfig, axes_of

DRAWS = 200
"""Batches of masks that expected ratios are measured on."""
DIGITS = 4
"""Of values that are drawn: names and tables stay readable, and a preset says what was trained."""
SHORT_NAMES = {"spatial_scale": "area", "num_blocks": "blocks", "aspect_ratio": "aspect", "temporal_scale": "length"}


@dataclass(frozen=True)
class Setting:
    """One choice of masks."""

    name: str
    masks: list[MaskConfig]
    values: dict[str, float] = field(default_factory=dict)
    """Of the swept axes; empty for settings by name."""

    def tree(self) -> dict[str, Any]:
        """As JSON."""
        masks = [{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(mask).items()} for mask in self.masks]
        return {"name": self.name, "masks": masks, "values": self.values}


def from_tree(tree: dict[str, Any]) -> Setting:
    """What `Setting.tree` made."""
    masks = [MaskConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in mask.items()}) for mask in tree["masks"]]
    return Setting(tree["name"], masks, tree["values"])


def settings(config: SweepConfig, base: Sequence[MaskConfig], recorded: Sequence[Setting] = ()) -> tuple[list[Setting], str]:
    """(the settings known before anything is trained, the name of the one that others are compared with).

    `base`: the base preset's masks. `recorded`: settings that Optuna chose before. Raises UsageError for a `default` that is none
    of them, for two of one name, and for axes of masks that the base does not have.
    """
    found = [Setting(name, list(masks)) for name, masks in config.masks.items()]
    if axes := axes_of(config.space):
        if config.search == "grid":
            found += [_named(dict(zip(axes, point, strict=True)), base) for point in itertools.product(*axes.values())]
        elif config.search == "random":
            found += [random_setting(config, number, base) for number in range(config.num_settings)]
        else:
            with_values({name: values[0] for name, values in axes.items()}, base)  # refuses axes of masks that are not there
            found += [setting for setting in recorded if setting.values]
    names = [setting.name for setting in found]
    if len(set(names)) < len(names):
        raise UsageError("two settings of the sweep have one name: rename one of masks")
    if config.default is not None:
        if config.default not in names:
            raise UsageError(f"default={config.default} is no setting of the sweep: choose from {', '.join(names)}")
        return found, config.default
    same = next((setting.name for setting in found if setting.masks == list(base)), None)
    return ([*found] if same else [Setting(DEFAULT, list(base)), *found]), same or DEFAULT


def with_values(values: dict[str, float], base: Sequence[MaskConfig]) -> list[MaskConfig]:
    """The base's masks with other values of some axes. Raises UsageError for an axis of a mask that the base does not have."""
    masks = list(base)
    for name, value in values.items():
        family, _, axis = name.partition(".")
        index = FAMILIES.index(family)
        if index >= len(masks):
            raise UsageError(f"space.{name}: the base preset has {len(masks)} masks, and {family} is number {index + 1}")
        changed: Any = (value, value)
        if axis == "num_blocks":
            changed = int(value)
        elif axis == "aspect_ratio":
            changed = (1 / value, value)
        masks[index] = replace(masks[index], **{axis: changed})
    return masks


def random_setting(config: SweepConfig, number: int, base: Sequence[MaskConfig]) -> Setting:
    """Random setting `number`: the same for the same search_seed, space and number, whatever was drawn before."""
    values = {}
    for index, (name, (low, high)) in enumerate(axes_of(config.space).items()):
        rng = np.random.default_rng([config.search_seed, number, index])
        whole = name.endswith("num_blocks")
        values[name] = int(rng.integers(low, high + 1)) if whole else round(float(rng.uniform(low, high)), DIGITS)
    return Setting(f"random-{number:03}", with_values(values, base), values)


def optuna_setting(
    config: SweepConfig, number: int, base: Sequence[MaskConfig], known: Sequence[tuple[Setting, float]], search: Any = None
) -> Setting:
    """Setting `number` of Optuna's TPE, from all results known. `search` stands in for Ray Tune's OptunaSearch in tests."""
    if search is None:
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch(seed=int(np.random.default_rng([config.search_seed, number]).integers(2**31)))
    search.set_search_properties("score", "max", tune_space(config.space))
    for setting, score in known:
        search.add_evaluated_point(setting.values, score)
    chosen = search.suggest(f"{number}")
    values = {name: value if isinstance(value, int) else round(float(value), DIGITS) for name, value in chosen.items()}
    return Setting(f"optuna-{number:03}", with_values(values, base), values)


def tune_space(space: SpaceConfig) -> dict[str, Any]:
    """The ranges as Ray Tune's search spaces."""
    from ray import tune

    return {
        name: tune.randint(int(low), int(high) + 1) if name.endswith("num_blocks") else tune.uniform(low, high)
        for name, (low, high) in axes_of(space).items()
    }


def _named(values: dict[str, float], base: Sequence[MaskConfig]) -> Setting:
    """A setting of the grid, by what it changes: `short-area0.1_long-area0.5-blocks1`."""
    words: dict[str, str] = {}
    for name, value in values.items():
        family, _, axis = name.partition(".")
        words[family] = words.get(family, family) + f"-{SHORT_NAMES[axis]}{value:g}"
    return Setting("_".join(words.values()), with_values(values, base), values)


def expected_ratios(config: PretrainConfig, masks: Sequence[MaskConfig], draws: int = DRAWS) -> list[tuple[float, float]]:
    """(context, target) share of the clip for each mask, averaged over batches as training draws them.

    Raises ValueError where blocks cannot be placed on the grid.
    """
    grid = clip_grid(config.clip, config.model.encoder)
    batch = config.train.batch_size // max(1, config.train.microbatches or config.train.num_workers)
    found = []
    for index, mask in enumerate(masks):
        drawn = [
            draw_masks(mask, index, grid, config.seed, n, range(n * batch, (n + 1) * batch), config.model.mask_policy).ratios(
                grid
            )
            for n in range(draws)
        ]
        context, target = zip(*drawn, strict=True)
        found.append((statistics.fmean(context), statistics.fmean(target)))
    return found
