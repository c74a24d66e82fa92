"""What one unit of work costs, with the command that measured it: configs/rates.yaml, and a file of the user's on top."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from pipelines import storage
from pipelines.errors import UsageError


@dataclass(frozen=True)
class Rate:
    """A number, its unit, and where it comes from."""

    value: float
    unit: str
    source: str
    assumed: bool = False
    """Nothing has measured it."""


class Rates:
    """Rates by name; which of them were asked for is remembered, so that a plan can list its sources."""

    def __init__(self, own: str | None = None) -> None:
        self._rates = {name: Rate(**rate) for name, rate in _shipped().items()}
        self.used: dict[str, Rate] = {}
        if own:
            self._rates |= _own(own, self._rates)

    def __getitem__(self, name: str) -> float:
        self.used[name] = self._rates[name]
        return self._rates[name].value


def _shipped() -> dict[str, Any]:
    return yaml.safe_load(resources.files("configs").joinpath("rates.yaml").read_text("utf-8"))


def _own(uri: str, known: dict[str, Rate]) -> dict[str, Rate]:
    """Raises UsageError naming what is wrong with the user's file; InputRefused where it does not exist."""
    try:
        tree = yaml.safe_load(storage.read_bytes(uri))
    except yaml.YAMLError as error:
        raise UsageError(f"rates={uri}: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"rates={uri}: write NAME: {{value: NUMBER, source: WHO MEASURED IT}}")
    rates = {}
    for name, rate in tree.items():
        if name not in known:
            raise UsageError(f"rates={uri}: unknown rate {name}: choose from {', '.join(known)}")
        if not isinstance(rate, dict) or set(rate) - {"value", "unit", "source", "assumed"} or not rate.get("source"):
            raise UsageError(f"rates={uri}: {name} needs value and source, {{value: NUMBER, source: WHO MEASURED IT}}")
        value = rate.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise UsageError(f"rates={uri}: {name}.value={value!r} must be a number, 0 or more")
        rates[name] = Rate(float(value), known[name].unit, str(rate["source"]), bool(rate.get("assumed")))
    return rates
