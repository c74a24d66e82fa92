"""What the report says about each kind of run: key numbers, plots, tables, and what is missing.

A report must come out of any run, finished or not: a part that is missing or unreadable becomes a sentence on the page.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from pipelines import catalog, run_folder, storage
from pipelines import report_figures as figures
from pipelines.errors import InputRefused
from pipelines.report_evaluate import evaluation, offline, pictures, questions
from pipelines.report_figures import BLUE, GREEN, MUTED, ORANGE, PURPLE, Series
from pipelines.report_page import Card, Group, Picture, Row, Section, Table, centimetres, number, percent
from pipelines.report_sweep import sweep

EPISODES = "episodes"
AGENTS = ("planner", "random", "no-op", "oracle")
SAMPLES_SHOWN = 4
ROWS_SHOWN = 40
EPISODES_SHOWN = 6
MAX_INLINE_BYTES = 8 << 20
NOT_YET = "Not there yet:"
SPEED = (
    [Series("clips_per_s", "clips per second", BLUE)],
    [Series("data_wait", "share of time waiting for data", ORANGE)],
)
SKILL = ([Series("loss_over_trivial", "over the mean"), Series("loss_over_position", "over the mean at each position", ORANGE)],)
SKILL_CAPTION = "The loss relative to those of two predictors that know nothing about the clip: they answer the mean of all "\
    "targets, or the mean at each position. Below 1 something about the clip is known."  # fmt: skip
HEALTH = (
    [Series("feature_std", "feature std", GREEN), Series("target_std", "targets"), Series("context_std", "context", ORANGE)],
    [Series("rank_me", "RankMe of tokens", PURPLE), Series("rank_me_clip", "of clips", ORANGE)],
    [Series("participation", "participation ratio of tokens", PURPLE), Series("participation_clip", "of clips", ORANGE)],
    [Series("target_cosine", "mean cosine between targets", BLUE)],
)
HEALTH_CAPTION = "Spread and effective rank of the target encoder's features, over tokens and over clips. One of them falling "\
    "towards zero, or the cosine rising towards one, means that the features collapse, however well the loss looks."  # fmt: skip
PREDICTED = (
    [Series("loss_over_copy", "teacher forcing over a copied frame", BLUE)],
    [Series("feature_std", "predicted tokens", GREEN), Series("target_std", "true tokens")],
    [Series("rank_me", "RankMe of predicted tokens", PURPLE), Series("rank_me_clip", "of clips", ORANGE)],
)
PREDICTED_CAPTION = "Skill over copying, and spread and rank of what is predicted. A rank that falls means that the predictor "\
    "answers the same whatever the clip shows."  # fmt: skip
GRADIENTS = ([Series("grad_norm_encoder", "encoder"), Series("grad_norm_predictor", "predictor", ORANGE)],)
SCHEDULE = ([Series("lr", "learning rate", MUTED)], [Series("grad_norm", "gradient norm before clipping", PURPLE)])
SPEED_CAPTION = "Throughput, and the share of each interval in which the training waited for data. Waiting above a few per "\
    "cent after the start means that decoding is the bottleneck."  # fmt: skip
SCHEDULE_CAPTION = "Learning rate as scheduled, and the gradient norm. Spikes of the norm announce trouble earlier than the loss."


PROBED = "What the target encoder knows of a small fixed set of clips: shares of right answers, beside those of random "\
    "weights and of raw pixels. The set is small: single points move by chance."  # fmt: skip


def build_section(run_dir: str, kind: str, config: Row) -> Section:
    """Read a run and lay out what the page says about it."""
    section = Section(run_dir, kind, config, PurePosixPath(run_dir).name)
    builders = {"pretrain": _pretrain, "sweep": sweep, "post-train": _post_train, "plan": _plan, "evaluate": evaluation,
                "pictures": pictures, "offline": offline, "questions": questions}  # fmt: skip
    builder = builders[kind]
    section.attempt("The run", lambda: builder(section))
    section.attempt("Provenance", lambda: _provenance(section))
    return section


def _provenance(section: Section) -> None:
    facts = run_folder.read_json(section.run_dir, run_folder.PROVENANCE) or {}
    versions = facts.pop("versions", {})
    section.provenance = [(key, str(value)) for key, value in {**facts, **versions}.items() if value is not None]


def _training(section: Section) -> list[Row]:
    """Metrics of a training run; says how far it came."""
    rows: list[Row] = []
    section.attempt("Metrics", lambda: rows.extend(run_folder.read_parts(section.run_dir, run_folder.METRICS)))
    steps = int(section.config["train"]["steps"])
    found = run_folder.latest_checkpoint(section.run_dir)
    reached = max(rows[-1]["step"] if rows else 0, found.step if found else 0)
    kept = f"last checkpoint at {found.step:,}" if found else "no checkpoint"
    section.cards.append(Card("steps", f"{reached:,}", f"of {steps:,}, {kept}"))
    if not found:
        section.notes.append(f"{NOT_YET} no checkpoint is committed.")
    if reached < steps:
        section.notes.append(f"Training stands at step {reached:,} of {steps:,}; the command that began it continues it.")
    if not rows:
        section.notes.append(f"{NOT_YET} the run has no metrics.")
    return rows


def _pretrain(section: Section) -> None:
    rows = _training(section)
    clip = section.config["clip"]
    section.lead = (
        f"Masked latent prediction on clips of {clip['num_frames']} frames at {clip['fps']:g} per second, "
        f"{clip['crop_size']} pixels square."
    )
    if rows:
        section.attempt("Training curves", lambda: _pretrain_curves(section, rows))
    section.attempt("The masks", lambda: _masks(section, rows))
    section.attempt("The data", lambda: _data(section))


def _pretrain_curves(section: Section, rows: list[Row]) -> None:
    last = rows[-1]
    side = "below" if last["loss"] < last["trivial"] else "above"
    section.lead += f" The loss is {side} what always predicting the mean costs."
    width = section.config["model"]["encoder"]["dim"]
    section.cards += [
        Card("loss", number(last["loss"]), f"mean predictor {number(last['trivial'])}"),
        Card("feature std", number(last["feature_std"]), "0 is collapse"),
        Card("RankMe", number(last["rank_me"]), f"of {width} dimensions"),
        *_speed_cards(rows),
    ]
    group = Group("Training")
    loss = [Series("loss", "loss"), Series("trivial", "mean predictor", ORANGE)]
    _curves(group, rows, [loss], "L1 error of the predicted features, beside the error of always predicting their "
                   "mean. Below the second line something is learned; both at zero together is collapse.")  # fmt: skip
    _curves(group, rows, SKILL, SKILL_CAPTION)
    _curves(group, rows, HEALTH, HEALTH_CAPTION)
    _probe(section, group, rows)
    _curves(group, rows, GRADIENTS, "Norms of the gradients before clipping.")
    section.notes += [f"The guard: {told}." for told in dict.fromkeys(row["guard"] for row in rows if row.get("guard"))]
    for note in run_folder.read_json(section.run_dir, run_folder.ROLLBACKS) or []:
        section.notes.append(f"The guard took the run from step {note['at']} back to {note['to']}: {note['signature']}.")
    _curves(group, rows, SPEED, SPEED_CAPTION)
    _curves(group, rows, SCHEDULE, SCHEDULE_CAPTION)
    section.groups.append(group)


def _probe(section: Section, group: Group, rows: list[Row]) -> None:
    """Curves of the probe beside the training, if there was one, and what it could not ask."""
    names = dict.fromkeys(key.partition("/")[2] for row in rows for key in row if key.startswith("probe/"))
    beside = (("probe_random/{}", "random weights", ORANGE), ("probe_pixels/{}", "pixels", MUTED))
    panels = [
        [Series(f"probe/{name}", name), *(Series(key.format(name), label, colour) for key, label, colour in beside)]
        for name in names
    ]
    _curves(group, rows, panels, PROBED)
    told = run_folder.read_json(section.run_dir, run_folder.PROBE) or {"left_out": [], "failures": {"count": 0}}
    section.notes += [f"The probe: {note}." for note in told["left_out"]]
    if count := told["failures"]["count"]:
        reasons = ", ".join(f"{reason} {number}" for reason, number in told["failures"]["reasons"].items())
        section.notes.append(f"The probe: {count} of its clips do not decode: {reasons}.")


def _speed_cards(rows: list[Row]) -> list[Card]:
    steady = rows[1:] or rows  # the first interval holds the start of the data pipeline
    speed, wait = (statistics.median(row[key] for row in steady) for key in ("clips_per_s", "data_wait"))
    return [Card("clips / s", number(speed), "median"), Card("data wait", f"{wait:.0%}", "of the time, median")]


def _masks(section: Section, rows: list[Row]) -> None:
    group = Group("Masks", "Training clips as they were decoded, and what each mask hides of them at one step. The encoder sees "
                  "the part left visible; the predictor must tell the features of the tinted part.")  # fmt: skip
    section.groups.append(group)
    table = []
    for index, mask in enumerate(section.config["model"]["masks"]):
        effective = [
            statistics.fmean(values) if (values := [r[key] for r in rows if key in r]) else None
            for key in (f"context_ratio_{index}", f"target_ratio_{index}")
        ]
        scales = ["-".join(f"{v:.0%}" for v in sorted(set(mask[key]))) for key in ("spatial_scale", "temporal_scale")]
        table.append([str(index + 1), str(mask["num_blocks"]), *scales, *(percent(value) for value in effective)])
    columns = ("mask", "blocks", "block area", "block length", "context, mean", "target, mean")
    group.tables.append(Table(columns, table, "Ratios are of the clip's tubelets, as trained: the union of blocks that overlap, "
                              "cut to equal length within a batch."))  # fmt: skip
    section.attempt("Masks over real frames", lambda: group.pictures.extend(mask_examples(section.run_dir)), group)
    group.legend = bool(group.pictures)


def mask_examples(run_dir: str) -> list[Picture]:
    """Clips of an early step, decoded and masked as the run did. Raises JepaError when the source is out of reach."""
    from pipelines import mask_pictures, pretrain

    pictures = []
    for example in mask_pictures.examples(pretrain.config_of(run_dir), SAMPLES_SHOWN):
        n, frames, grid = example.sample, example.frames, example.grid
        parts = [("the clip", figures.image(figures.strip(frames, grid), f"frames of sample {n}"))]
        for index, (ids, ratios) in enumerate(zip(example.hidden, example.ratios, strict=True)):
            label = f"mask {index + 1}: context {ratios[0]:.0%}, target {ratios[1]:.0%}"
            parts.append((label, figures.image(figures.strip(frames, grid, *ids), f"sample {n} under mask {index + 1}")))
        length = f"{(len(frames) - 1) / example.fps:.2g} s" if len(frames) > 1 else "one frame"
        pictures.append(Picture(parts, f"Sample {n}, {length} of {example.uri}"))
    return pictures


def _data(section: Section) -> None:
    group = Group("Data")
    section.groups.append(group)
    section.attempt("The catalog", lambda: _catalog(section, group), group)
    _replaced(section, group)


def _catalog(section: Section, group: Group) -> None:
    mixed = section.config.get("datasets") or {}
    refs = [catalog.parse_ref(uri) for uri in ([source["catalog"] for source in mixed.values()] or [section.config["catalog"]])]
    tables = [catalog.read_videos(ref, ["duration"]) for ref in refs]
    refused = [row for ref in refs for row in catalog.read_quarantine(ref).to_pylist()]
    texts = []
    for ref, videos in zip(refs, tables, strict=True):
        hours = sum(videos["duration"].to_pylist()) / 3600
        length = f"{hours:.3g} hours" if hours >= 1 else f"{hours * 60:.3g} minutes"
        texts.append(f"Catalog {ref}: {videos.num_rows:,} videos of together {length}")
    group.intro = f"{'; '.join(texts)}, {len(refused):,} files refused at ingest."
    section.cards.append(Card("videos", f"{sum(map(len, tables)):,}", f"{len(refused):,} refused at ingest"))
    reasons = Counter(row["reason"] for row in refused).most_common()
    rows = [[reason, f"{n:,}", next(row["uri"] for row in refused if row["reason"] == reason)] for reason, n in reasons]
    if rows:
        group.tables.append(Table(("reason", "files", "for example"), rows, "Refused at ingest, by reason."))


def _replaced(section: Section, group: Group) -> None:
    """What failed to decode during training."""
    rows = run_folder.read_parts(section.run_dir, run_folder.QUARANTINE)
    section.cards.append(Card("replaced clips", f"{len(rows):,}", "failed to decode in training"))
    if not rows:
        group.intro += " Every clip that the training asked for did decode."
        return
    columns = ("step", "sample", "dataset", "uri", "reason", "detail", "attempt", "replaced_by")
    cells = [[str(row.get(column, "")) for column in columns] for row in rows[:ROWS_SHOWN]]
    more = f" The first {ROWS_SHOWN} of {len(rows):,}." if len(rows) > ROWS_SHOWN else ""
    caption = f"Clips that failed to decode during training, and the video that took their place.{more}"
    group.tables.append(Table([column.replace("_", " ") for column in columns], cells, caption))


def _result(section: Section) -> Row | None:
    try:
        result = run_folder.read_json(section.run_dir, run_folder.RESULT)
    except ValueError as error:
        raise InputRefused(f"{run_folder.RESULT} is not JSON ({error})") from error
    return result if isinstance(result, dict) else None


def _post_train(section: Section) -> None:
    section.lead = "A predictor learns, on frozen features, what an action does to the next frame."
    rows = _training(section)
    group = _added(section, Group("Training"))
    if rows:
        section.attempt("Training losses", lambda: _post_train_losses(section, group, rows))
        section.attempt("Health", lambda: _curves(group, rows, PREDICTED, PREDICTED_CAPTION))
    section.attempt("Rollouts", lambda: _rollouts(section, group))
    if rows:
        section.attempt("Throughput", lambda: _curves(group, rows, SPEED, SPEED_CAPTION))
        section.attempt("The schedule", lambda: _curves(group, rows, SCHEDULE, SCHEDULE_CAPTION))
    section.attempt("Replaced clips", lambda: _replaced(section, _added(section, Group("Data"))))


def _post_train_losses(section: Section, group: Group, rows: list[Row]) -> None:
    last = rows[-1]
    section.cards += [
        Card("teacher forcing", number(last["teacher_forcing"]), f"copying costs {number(last['copy_last'])}"),
        Card("rollout", number(last["rollout"]), f"{section.config['rollout_steps']} steps on its own output"),
        *_speed_cards(rows),
    ]
    losses = [Series("teacher_forcing", "teacher forcing"), Series("rollout", "rollout", GREEN)]
    losses.append(Series("copy_last", "copied frame", ORANGE))
    _curves(group, rows, [losses], "L1 error of the predicted features; the training loss is the sum of the first two. "
            "Only below the copied frame does the predictor know more than that little moves.")  # fmt: skip


def _rollouts(section: Section, group: Group) -> None:
    numbers = (_result(section) or {}).get("rollout")
    if not numbers:
        section.notes.append(f"{NOT_YET} rollouts are not measured.")
        return
    drawn = figures.rollout(numbers, "latent error against horizon")
    caption = "Latent error on held-out episodes when the predictor runs on its own output. Shuffled actions must cost more "\
        "than the true ones, or the model ignores what the robot does."  # fmt: skip
    group.pictures.append(Picture([("", drawn)], caption))
    model, copied = (number(numbers[key][-1]) for key in ("model", "copy_last"))
    section.cards.append(Card(f"error at {numbers['horizon'][-1]} steps", model, f"copied frame {copied}"))


def _plan(section: Section) -> None:
    tree = section.config
    section.lead = f"Planning to goal images in the simulated robot, {tree['episodes']} episodes of {tree['steps']} actions."
    result = _result(section)
    if result is None:
        section.notes.append(f"{NOT_YET} the run has no result.")
    else:
        section.attempt("The result", lambda: _plan_result(section, result))
    section.attempt("The films", lambda: _films(section, result or {}))


def _plan_result(section: Section, result: Row) -> None:
    agents, episodes = result["agents"], result.get("episodes", [])
    success = result.get("success_distance")
    order = [name for name in AGENTS if name in agents] + sorted(set(agents) - set(AGENTS))
    for name in order:
        numbers = agents[name]
        hint = f"median distance left, {percent(numbers['success'])} of the goals reached"
        section.cards.append(Card(name, centimetres(numbers["median_m"]), hint))
    if "planner" in agents:
        planner = agents["planner"]
        section.cards.append(Card("planning", f"{number(planner['seconds_per_action'])} s", "per action"))
        section.lead += (
            f" The planner came from {centimetres(planner['start_m'])} to {centimetres(planner['final_m'])} on average."
        )
    group = _added(section, Group("Distance to the goal"))
    caption = "Distance of the hand from its goal after each action: episodes thin, means thick. The planner should fall away "\
        "from the random and the resting agent."  # fmt: skip
    drawn = figures.approach(episodes, order, success, "distance to the goal per action")
    group.pictures.append(Picture([("", drawn)], caption))
    final = {name: [e["distances"][-1] * 100 for e in episodes if e["agent"] == name] for name in order}
    lines = {} if success is None else {f"success: {success * 100:g} cm": success * 100}
    drawn = figures.dots(final, lines, "distance left, cm", "final distance by agent")
    group.pictures.append(
        Picture([("", drawn)], "Where each episode ended: a dot per episode, a bar at the mean. Left is better.")
    )
    keys = ("start_m", "final_m", "median_m")
    cells = [[name, *(centimetres(agents[name].get(key)) for key in keys), percent(agents[name].get("success")),
              f"{agents[name].get('seconds_per_action', float('nan')):.3f}"] for name in order]  # fmt: skip
    columns = ("agent", "start, mean", "left, mean", "left, median", "goals reached", "s per action")
    group.tables.append(Table(columns, cells))


def _films(section: Section, result: Row) -> None:
    """The planner's episodes that were kept as a film strip, a video, or both."""
    folder = storage.join(section.run_dir, EPISODES)
    found = storage.list_files(folder, (".png", ".mp4")) if storage.exists(folder) else []
    small = [info for info in found if info.size <= MAX_INLINE_BYTES]
    names = sorted({PurePosixPath(info.uri).stem for info in small})
    if not names:
        section.notes.append(f"{NOT_YET} no episode has a picture.")
        return
    group = _added(section, Group("Episodes", "The goal image first, then what the robot saw on its way there."))
    if len(names) > EPISODES_SHOWN or len(small) < len(found):
        group.intro += f" Shown are the first {EPISODES_SHOWN} at most; {EPISODES}/ in the run folder holds all."
    for name in names[:EPISODES_SHOWN]:
        parts = []
        for info in small:
            if PurePosixPath(info.uri).stem == name:
                inline = figures.image if info.uri.lower().endswith(".png") else figures.film
                parts.append(("", inline(storage.read_bytes(info.uri), f"episode {name}")))
        parts.sort(key=lambda part: "<video" in part[1][:6])
        played = [e for e in result.get("episodes", []) if e["agent"] == "planner" and f"{e['episode']:03d}" == name]
        ends = [f", from {centimetres(e['distances'][0])} to {centimetres(e['distances'][-1])}" for e in played]
        group.pictures.append(Picture(parts, f"Episode {name}{''.join(ends)}", wide=True))


def _curves(group: Group, rows: Sequence[Row], panels: Sequence[Sequence[Series]], caption: str) -> None:
    """Add a plot of metrics, unless no row has them."""
    drawn = figures.curves(rows, panels, caption)
    if drawn:
        group.pictures.append(Picture([("", drawn)], caption))


def _added(section: Section, group: Group) -> Group:
    section.groups.append(group)
    return group
