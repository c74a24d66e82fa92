"""jepa report: one self-contained HTML page about a run folder, or about a folder of runs."""

from typing import Any, NamedTuple

import yaml

from pipelines import run_folder, storage
from pipelines.config import ReportConfig
from pipelines.errors import InputRefused
from pipelines.progress import Reporter
from pipelines.report_page import Row, render
from pipelines.report_sections import build_section

PAGE = "report.html"
KINDS = {
    "pretrain": {"model", "clip", "catalog"},
    "sweep": {"masks", "base"},
    "post-train": {"trajectories", "encoder"},
    "offline": {"model", "trajectories", "clips"},
    "plan": {"planner", "model"},
    "evaluate": {"model", "controls"},
    "pictures": {"model", "footage"},
    "questions": {"model", "questions"},
}
"""In order of the page: the options by which a verb's configuration is known."""


class Run(NamedTuple):
    """A run folder and the verb that made it."""

    uri: str
    kind: str
    config: Row


def run(config: ReportConfig, reporter: Reporter) -> dict[str, Any]:
    """Write the page. Returns its URI and the kinds of its sections. Raises InputRefused for a folder without runs."""
    root = storage.normalize(config.run)
    found = find_runs(root)
    out = storage.normalize(config.out) if config.out else storage.join(root, PAGE)
    reporter.start("report", len(found), "sections")
    sections = []
    for item in found:
        sections.append(build_section(item.uri, item.kind, item.config))
        reporter.advance(len(sections))
    storage.write_bytes(out, render(root, sections).encode())
    reporter.stop()
    return {"report": out, "sections": [section.kind for section in sections]}


def find_runs(root: str) -> list[Run]:
    """The run at `root`, or the runs directly below it in order of kind, then name. Raises InputRefused for neither."""
    storage.check_bucket(root)
    if found := _run_at(root):
        return [found]
    if not storage.exists(root):
        raise InputRefused(f"{root} does not exist: check the path")
    configs = [info.uri for info in storage.list_files(root, (f"/{run_folder.CONFIG}",))]
    folders = [uri.rsplit("/", 1)[0] for uri in configs if uri.count("/") == root.count("/") + 2]
    runs = [found for folder in folders if (found := _run_at(folder))]
    if not runs:
        raise InputRefused(f"{root} is neither a run folder nor a folder of runs: give the run.dir of another verb")
    return sorted(runs, key=lambda item: (list(KINDS).index(item.kind), item.uri))


def _run_at(folder: str) -> Run | None:
    try:
        tree = run_folder.read_config(folder)
    except (InputRefused, yaml.YAMLError):
        return None
    keys = set(tree) if isinstance(tree, dict) else set()
    kind = next((kind for kind, needed in KINDS.items() if needed <= keys), None)
    return Run(folder, kind, tree) if kind else None
