"""The report's section about a sweep: what its result.json says (sweep_table.py), and the pictures beside it."""

from typing import Any

from pipelines import report_figures as figures
from pipelines import run_folder, storage, sweep_table
from pipelines.errors import InputRefused
from pipelines.report_page import Card, Group, Picture, Row, Section, Table, number, percent

NOT_YET = "Not there yet: the sweep has no result; the command that began it runs the missing trials."
PICTURES = (
    ("heat_map.png", "Mean score by mask setting, in the swept axes where there are two, else by what context and target hold."),
    ("curves.png", "Score against samples and against compute, with intervals at 95 % over seeds. Masks that leave a smaller "
                   "context cost less, so that the two orders may differ."),
)  # fmt: skip


def sweep(section: Section) -> None:
    """Lay out one sweep."""
    tree = section.config
    seeds = "one seed" if len(tree["seeds"]) == 1 else f"{len(tree['seeds'])} seeds"
    result = _result(section)
    count = len(result["settings"]) if result else len(tree["masks"])
    section.lead = f"The same pretraining under {count} mask settings, {seeds} each."
    if result is None:
        section.notes.append(NOT_YET)
        return
    metric, ranking, rows, controls = result["probe"]["metric"], result["ranking"], result["rows"], result["controls"]
    section.lead += " Ranked by the frozen probe: losses under different masks are not comparable, a harder mask costs more."
    section.cards.append(Card("winner", str(result["winner"] or "none yet")))
    if ranking:
        section.cards.append(Card("its score", sweep_table.shown(ranking[0]), metric))
    section.cards += [Card(name, number(value), "control") for name, value in controls.items()]
    section.cards.append(Card("trials", str(len(rows)), f"{len(ranking)} mask settings"))
    section.notes += result["verdict"]
    section.notes += [_failure(row) for row in result["failures"]]
    failures = (run_folder.read_json(section.run_dir, run_folder.PROBE) or {}).get("failures")
    if failures:
        reasons = ", ".join(f"{reason} {count}" for reason, count in failures["reasons"].items())
        section.notes.append(f"The probe leaves {failures['count']} videos out: {reasons}.")
    if result["missing"]:
        section.notes.append(f"Not there yet: {len(result['missing'])} trials; the command that began the sweep runs them.")
    group = Group("Ranking")
    section.groups.append(group)
    lines = {f"{name} {number(value)}": value for name, value in controls.items()}
    scores = {entry["name"]: [row["score"] for row in rows if row["name"] == entry["name"]] for entry in ranking}
    caption = "Each dot is one seed, each bar a mean. Trust an order only where the dots of two settings do not mix, and only "\
        "right of the dashed controls."  # fmt: skip
    group.pictures.append(Picture([("", figures.dots(scores, lines, metric, "probe score by mask setting"))], caption))
    drawn = figures.score_against_ratio(rows, list(scores), metric, "probe score against target ratio")
    caption = "Whether the score follows the share that is hidden, or the shape of the mask. Ratios are as trained, averaged "\
        "over the masks of a trial."  # fmt: skip
    group.pictures.append(Picture([("", drawn)], caption))
    columns, cells = sweep_table.table(result)
    caption = "With intervals at 95 % over seeds. The difference is of pairs of equal seed, p of the paired t test, adjusted "\
        "for the number of settings (Holm)."  # fmt: skip
    group.tables.append(Table(columns, [list(row) for row in cells], caption))
    group.tables.append(_masks_table(ranking))
    for name, caption in PICTURES:
        section.attempt(name, lambda name=name, caption=caption: _picture(section, group, name, caption))


def _result(section: Section) -> Row | None:
    try:
        result = run_folder.read_json(section.run_dir, run_folder.RESULT)
    except ValueError as error:
        raise InputRefused(f"{run_folder.RESULT} is not JSON ({error})") from error
    return result if isinstance(result, dict) else None


def _failure(row: Row) -> str:
    seed = "" if row["seed"] is None else f", seed {row['seed']}"
    return f"Failed: {row['name']}{seed}: {row['reason']}"


def _masks_table(ranking: list[Row]) -> Table:
    """Ratios by mask as expected before training, and losses, which do not rank."""

    def pairs(values: Any) -> str:
        return "; ".join(f"{context:.0%}, {target:.0%}" for context, target in values or []) or "-"

    cells = [
        [entry["name"], pairs(entry["expected"]), percent(entry["context_ratio"]), percent(entry["target_ratio"]),
         number(entry["loss"]), number(entry["trivial"])]
        for entry in ranking
    ]  # fmt: skip
    columns = ("masks", "context, target expected of each mask", "context, as trained", "target", "loss", "mean predictor")
    return Table(columns, cells, "Loss and mean predictor are the last of each trial: for reading, not for ranking.")


def _picture(section: Section, group: Group, name: str, caption: str) -> None:
    uri = storage.join(section.run_dir, name)
    if storage.exists(uri):
        group.pictures.append(Picture([("", figures.image(storage.read_bytes(uri), caption))], caption, wide=True))
