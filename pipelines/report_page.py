"""The report's page: what sections are made of, numbers as text, and the template that turns them into HTML."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipelines.errors import JepaError
from pipelines.report_figures import Row

TEMPLATE = "report.html.jinja"
TITLES = {
    "pretrain": "Pretraining",
    "sweep": "Mask sweep",
    "post-train": "Post-training",
    "offline": "A world model on held-out episodes",
    "plan": "Planning",
    "evaluate": "Evaluation",
    "questions": "Questions about videos",
    "pictures": "Pictures of features",
}


class Card(NamedTuple):
    """A key number."""

    label: str
    value: str
    hint: str = ""


class Picture(NamedTuple):
    """Pictures with labels, and a caption that says what to look for."""

    parts: list[tuple[str, Markup]]
    caption: str
    wide: bool = False


class Table(NamedTuple):
    """A table; cells are text."""

    columns: Sequence[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass
class Group:
    """A part of a section under its own heading."""

    title: str
    intro: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    legend: bool = False
    """Whether the pictures need the key to mask colours."""


@dataclass
class Section:
    """Everything that the page says about one run."""

    run_dir: str
    kind: str
    config: Row
    name: str = ""
    lead: str = ""
    cards: list[Card] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    provenance: list[tuple[str, str]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What the section is called on the page."""
        return TITLES[self.kind]

    @property
    def config_text(self) -> str:
        """The configuration as YAML."""
        return yaml.safe_dump(self.config, sort_keys=False)

    def attempt(self, what: str, build: Callable[[], None], group: Group | None = None) -> None:
        """Run a builder of a part; for input that is missing or not as expected, a note (or the group's intro) says so."""
        try:
            build()
            return
        except JepaError as error:
            note = f"{what} cannot be shown: {error}."
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            note = f"{what} cannot be shown, the data is not as expected ({type(error).__name__}: {error})."
        if group is None:
            self.notes.append(note)
        else:
            group.intro = note


def render(root: str, sections: Sequence[Section]) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = resources.files("pipelines").joinpath(TEMPLATE).read_text("utf-8")
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return environment.from_string(text).render(root=root, sections=sections, made=made)


def number(value: Any) -> str:
    """Three significant digits, thousands in full."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def percent(value: float | None) -> str:
    """A share as per cent."""
    return "-" if value is None else f"{value:.0%}"


def centimetres(value: float | None) -> str:
    """Metres as centimetres."""
    return "-" if value is None else f"{value * 100:.1f} cm"
