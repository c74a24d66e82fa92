"""The report's section about an evaluation: what its result.json says, and the pictures beside it.

A result has `task`, `lead`, `arms` and `differences` (evaluate_table.py), and maybe `splits`, `failures`, `list`, and `pictures`,
file and caption of each.
"""

from pipelines import evaluate_table, evaluate_vidqa_table, run_folder, storage
from pipelines import report_figures as figures
from pipelines.report_page import Card, Group, Picture, Row, Section, Table

NOT_YET = "Not there yet: the evaluation has no result; the command that began it does what is missing."


def evaluation(section: Section) -> None:
    """Lay out one evaluation."""
    result = _result(section, "What frozen features know.")
    if result is None:
        return
    trained = [line for line in result["arms"] if line["arm"] == "trained"]
    section.cards += [Card(line["probe"], evaluate_table.shown(line), "trained, %") for line in trained]
    section.cards += [Card(f"{split} rows", f"{count:,}") for split, count in result.get("splits", {}).items()]
    section.notes += _notes(result)
    group = Group(str(result["task"]).capitalize())
    section.groups.append(group)
    by = {line["by"] for line in result["arms"]} - {None}
    caption = f"In %, with intervals at 95 % over {' or '.join(sorted(by))}." if by else "In %."
    columns, rows = evaluate_table.accuracy_table(result)
    group.tables.append(Table(columns, [list(row) for row in rows], caption))
    columns, rows = evaluate_table.difference_table(result)
    if rows:
        by = {line["by"] for line in result["differences"]} - {None}
        over = f", with intervals at 95 % over {' or '.join(sorted(by))}" if by else ""
        tested = any(line["p_t"] is not None for line in result["differences"])
        caption = f"In points, paired{over}{'; p of the paired t test' if tested else ''}."
        group.tables.append(Table(columns, [list(row) for row in rows], caption))
    _pictures(section, group, result)


def questions(section: Section) -> None:
    """Lay out `jepa evaluate vidqa`: as any evaluation, and its table by category."""
    evaluation(section)
    result = run_folder.read_json(section.run_dir, run_folder.RESULT)
    if not isinstance(result, dict):
        return
    seen = [line for line in result["arms"] if line["arm"] == evaluate_vidqa_table.VIDEO]
    section.cards += [Card(line["probe"], evaluate_table.shown(line), "with the video, %") for line in seen]
    columns, rows = evaluate_vidqa_table.category_table(result)
    caption = "In %, by category; the last two columns in points, paired by question or by model."
    section.groups[-1].tables.append(Table(columns, [[str(cell) for cell in row] for row in rows], caption))


def pictures(section: Section) -> None:
    """Lay out `jepa evaluate decode` or `features`: their pictures, and PSNR where there is one."""
    result = _result(section, "What frozen features look like.")
    if result is None:
        return
    section.cards += [Card(line["arm"], f"{line['mean']:.1f} dB", "PSNR, held-out clips") for line in result.get("arms", [])]
    section.notes += _notes({"differences": []} | result)
    group = Group(str(result["task"]).capitalize())
    section.groups.append(group)
    _pictures(section, group, result)


def offline(section: Section) -> None:
    """Lay out `jepa evaluate rollout`, `energy` or `action-score`: its table and its pictures."""
    result = _result(section, "A world model on held-out episodes.")
    if result is None:
        return
    section.cards += [Card(name.replace("_", " "), f"{value:.3g}", result["task"]) for name, value in result["summary"].items()]
    group = Group(str(result["task"]).capitalize())
    section.groups.append(group)
    caption = f"{result['title'].capitalize()}; intervals at 95 %, a bootstrap."
    group.tables.append(Table(result["columns"], [list(row) for row in result["rows"]], caption))
    _pictures(section, group, result)


def _result(section: Section, lead: str) -> Row | None:
    """What result.json says, its lead told; None, with a note and `lead`, where there is none yet."""
    result = run_folder.read_json(section.run_dir, run_folder.RESULT)
    if not isinstance(result, dict):
        section.lead = lead
        section.notes.append(NOT_YET)
        return None
    section.lead = result["lead"]
    return result


def _pictures(section: Section, group: Group, result: Row) -> None:
    for picture in result.get("pictures", []):
        section.attempt(picture["file"], lambda picture=picture: _picture(section, group, picture))


def _picture(section: Section, group: Group, picture: Row) -> None:
    png = storage.read_bytes(storage.join(section.run_dir, picture["file"]))
    group.pictures.append(Picture([("", figures.image(png, picture["caption"]))], picture["caption"], wide=True))


def _notes(result: Row) -> list[str]:
    notes = []
    failures, told = result.get("failures") or {"count": 0}, result.get("list") or {}
    if failures["count"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in failures["reasons"].items())
        notes.append(f"{failures['count']} samples did not come out: {reasons}.")
    if told.get("missing"):
        notes.append(f"{told['missing']} of {told['rows']} rows name no video of the catalog, first {told['missing_names'][0]}.")
    beaten = [line for line in result["differences"] if line["mean"] <= 0]
    notes += [
        f"{line.get('probe', result['task'])}: the trained features are not better than {line['second'].replace('_', ' ')}."
        for line in beaten
    ]
    return notes
