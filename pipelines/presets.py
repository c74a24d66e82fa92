"""From presets and `key=value` words to a frozen, checked configuration.

This module imports neither torch nor ray, so that `jepa --help` and any mistake in a configuration answer at once.
"""

import difflib
from collections.abc import Sequence
from datetime import date
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pipelines.errors import InputRefused, UsageError

T = TypeVar("T")
BORROWED = {"evaluate masks": "pretrain"}
"""Verbs that take the presets of another one."""


def load(schema: type[T], verb: str, overrides: Sequence[str]) -> T:
    """Merge schema defaults, a preset, its smoke twin, and `key=value` overrides into a frozen, checked config.

    Raises UsageError naming the key and the fix.
    """
    chosen, settings, smoke = _split(overrides)
    tree = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(schema)))
    preset = read_preset(verb, chosen) if chosen else {}
    twin = preset.pop("smoke", None)
    if smoke and twin is None:
        raise UsageError(f"smoke=true needs a preset with a smoke twin; preset={chosen} has none")
    for part in (preset, twin if smoke else {}):
        tree = OmegaConf.merge(tree, part or {})
    for key, value in settings.items():
        try:
            if OmegaConf.is_dict(OmegaConf.select(tree, key)) and not isinstance(value, dict):
                raise UsageError(f"{key}={value}: {key} is a group of options, set one of them as {key}.NAME=VALUE")
            OmegaConf.update(tree, key, value, merge=True)
        except (OmegaConfBaseException, AssertionError, IndexError, TypeError, ValueError) as error:
            raise UsageError(f"{key}={value}: {_first_line(error)}") from error
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    except OmegaConfBaseException as error:
        raise UsageError(_explain(error, schema)) from error
    if hasattr(config, "check"):
        try:
            config.check()
        except ValueError as error:  # jepa_core knows no UsageError
            raise UsageError(str(error)) from error
    return config


def from_tree(schema: type[T], tree: Any, what: str) -> T:
    """A configuration that was saved before. Raises InputRefused, "`what`: ...", where the tree is none of this schema."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), tree))
    except (OmegaConfBaseException, ValueError) as error:
        raise InputRefused(f"{what}: {_first_line(error)}") from error


def read_preset(verb: str, name: str) -> dict[str, Any]:
    """The YAML tree of configs/<verb>/<name>.yaml, each word of a verb a folder, or of a path to a YAML file of the user's."""
    if name.endswith((".yaml", ".yml")):
        try:
            with open(name, encoding="utf-8") as file:
                return yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UsageError(f"preset={name}: {error}") from error
    known = preset_names(verb)
    if name not in known:
        raise UsageError(f"preset={name} does not exist for {verb}: choose from {', '.join(known) or 'none'}{_near(name, known)}")
    return yaml.safe_load(_folder(verb).joinpath(f"{name}.yaml").read_text("utf-8")) or {}


def preset_names(verb: str) -> list[str]:
    """Names of the presets that ship for a verb."""
    folder = _folder(verb)
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml")) if folder.is_dir() else []


def _folder(verb: str) -> Traversable:
    """Where a verb's presets lie; those of a verb of two words in a folder of the first one."""
    return resources.files("configs").joinpath(*BORROWED.get(verb, verb).split())


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _split(overrides: Sequence[str]) -> tuple[str | None, dict[str, Any], bool]:
    settings: dict[str, Any] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"{item!r} is not key=value: write for example train.steps=100")
        try:
            parsed = yaml.safe_load(value) if value else value
            settings[key] = value if isinstance(parsed, date) else parsed  # 2026-11-22 is the name of a window, not a day
        except yaml.YAMLError as error:
            raise UsageError(f"{item!r}: the value is not valid YAML ({_first_line(error)})") from error
    preset, smoke = settings.pop("preset", None), settings.pop("smoke", False)
    return preset, settings, bool(smoke)


def _explain(error: OmegaConfBaseException, schema: type) -> str:
    key = str(error.full_key or "")
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is missing: give {key}=VALUE on the command line or in a preset"
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return f"unknown key {key}{_near(key, _keys(schema))}: run with --help to see all keys"
    return f"{key}: {_first_line(error)}"


def _keys(schema: type) -> list[str]:
    def walk(tree: Any, prefix: str) -> list[str]:
        if not isinstance(tree, dict):
            return [prefix]
        return [key for name, value in tree.items() for key in walk(value, f"{prefix}.{name}" if prefix else str(name))]

    return walk(OmegaConf.to_container(OmegaConf.structured(schema)), "")


def _near(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
