"""jepa evaluate rollout: how well a world model predicts held-out clips on its own output, and which frames its tokens mean.

Beside it the same clips by copying the first frame, and by the model under the actions of another clip: a model that ignores
actions is as good under those. For each step, the held-out frame whose tokens are nearest to the predicted ones is looked up:
its hand's distance from the true one is in metres, and the sheet shows it.

Legend: B clips, H steps, P patches of a frame, D encoder width, G frames of all clips.
"""

import io
from typing import Any

import numpy as np
import torch

from jepa_core.poses import deltas
from pipelines import evaluate_arms, evaluate_table, frame_sheet, model_folder, offline, storage
from pipelines.offline import Row, Shared
from pipelines.offline_config import RolloutEvaluationConfig
from pipelines.progress import Reporter

MODEL, COPY, SHUFFLED = "model", "copy_last", "shuffled_actions"
ARMS = (MODEL, COPY, SHUFFLED)
CURVE, STRIPS = "rollout.png", "nearest.png"
LATENTS = "latents"


def run(config: RolloutEvaluationConfig, reporter: Reporter) -> dict[str, Any]:
    """Returns the errors at the longest horizon, and how far the nearest frames' hands are from the true ones."""
    return offline.evaluate(config, reporter, _measure, _finish, config.num_frames, lambda result: result["summary"])


def _measure(numbers: range, shared: Shared) -> list[str]:
    """Errors of one block of clips, and the tokens that the lookup of nearest frames needs."""
    torch.set_num_threads(1)
    config, world = shared.config, offline.world_of(shared.model)
    clips = offline.clips_for(shared.trained, world, shared.num_frames, config.seed)
    shown = offline.read(shared.episodes, numbers, clips, world)
    others = [(n + 1) % config.clips for n in numbers]
    actions = {MODEL: deltas(shown.states), SHUFFLED: deltas(offline.states_only(shared.episodes, others, clips, world))}
    true, errors = shown.z[:, 1:], {COPY: offline.distances(shown.z[:, :1], shown.z[:, 1:], config.distance).tolist()}
    for name, given in actions.items():
        predicted = offline.rollout(world, shown, given)
        errors[name] = offline.distances(predicted, true, config.distance).tolist()
        if name == MODEL:
            kept = {"true": shown.z.half(), "predicted": predicted.half(), "images": torch.from_numpy(shown.images)}
            model_folder.save_tensors(_latents(shared, numbers), kept)
    told = {"episodes": shown.rows, "errors": errors, "hands": shown.states[..., :3].tolist()}
    evaluate_arms.write_unit(shared.run_dir, offline.block(numbers), told)
    return [offline.block(numbers)]


def _latents(shared: Shared, numbers: range) -> str:
    return storage.join(shared.run_dir, LATENTS, f"{offline.block(numbers)}.safetensors")


def _finish(shared: Shared, blocks: list[Row]) -> Row:
    import ray

    config = shared.config
    episodes = [row for block in blocks for row in block["episodes"]]
    errors = {name: np.concatenate([block["errors"][name] for block in blocks]) for name in ARMS}  # [B, H]
    steps = range(errors[MODEL].shape[1])
    curves = {name: [offline.interval(errors[name][:, step], episodes) for step in steps] for name in ARMS}
    apart = {
        name: [offline.interval(errors[name][:, step] - errors[MODEL][:, step], episodes) for step in steps]
        for name in (COPY, SHUFFLED)
    }
    hands = np.concatenate([np.asarray(block["hands"]) for block in blocks])
    nearest = ray.get(ray.remote(num_cpus=1)(_nearest).remote(shared, hands))
    metres = {name: [offline.interval(np.array(found)[:, step], episodes) for step in steps] for name, found in nearest.items()}
    columns = ("steps ahead", *ARMS, "copy - model", "shuffled - model", "nearest frame, cm", "first frame, cm")
    rows = [
        (
            str(step + 1),
            *(offline.shown_interval(curves[name][step], digits=4) for name in ARMS),
            *(offline.shown_interval(apart[name][step], digits=4) for name in (COPY, SHUFFLED)),
            *(offline.shown_interval(metres[name][step], 100, 1) for name in (MODEL, COPY)),
        )
        for step in steps
    ]
    storage.write_bytes(storage.join(shared.run_dir, CURVE), _curve(curves, config.distance))
    last = {name: curves[name][-1]["mean"] for name in ARMS}
    return {
        "task": "rollout",
        "lead": "Latent error of a world model on held-out clips, on its own output, against how many steps it looks ahead.",
        "title": f"latent error ({config.distance}), {len(episodes)} clips of {len(set(episodes))} held-out episodes",
        "columns": columns,
        "rows": rows,
        "horizon": [step + 1 for step in steps],
        "curves": curves,
        "differences": apart,
        "nearest_m": metres,
        "clips": len(episodes),
        "summary": {"horizon": len(steps), **last, **{f"nearest_{name}_m": metres[name][-1]["mean"] for name in metres}},
        "pictures": [
            {"file": CURVE, "caption": "Latent error against horizon, with intervals at 95 % over held-out episodes."},
            {"file": STRIPS, "caption": "True frames, and below each the held-out frame whose tokens are nearest to the "
             "predicted ones."},
        ],
    }  # fmt: skip


def _nearest(shared: Shared, hands: np.ndarray) -> dict[str, list[list[float]]]:
    """Metres [B][H] from the true hand to that of the nearest frame, and to that of the clip's first frame; draws the sheet."""
    torch.set_num_threads(1)
    config, blocks = shared.config, []
    for first in range(0, config.clips, offline.BLOCK):
        numbers = range(first, min(first + offline.BLOCK, config.clips))
        blocks.append(model_folder.load_tensors(_latents(shared, numbers)))
    parts = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    gallery, predicted = parts["true"].flatten(0, 1), parts["predicted"]
    places = hands.reshape(-1, 3)
    found = np.stack([_lookup(clip, gallery, config.distance) for clip in predicted])  # [B, H] into the gallery
    images = parts["images"].flatten(0, 1).numpy()
    sheet = []
    for clip in frame_sheet.picked(len(found), config.shown).tolist():
        picked = frame_sheet.picked(found.shape[1], 8)
        rows = [frame_sheet.Row("true frame", parts["images"][clip].numpy()[picked + 1])]
        rows.append(frame_sheet.Row("nearest to the prediction", images[found[clip, picked]]))
        steps = ", ".join(str(step + 1) for step in picked)
        sheet.append(frame_sheet.Block(f"clip {clip}: {steps} steps ahead", rows))
    head = (
        "What a rollout predicts: for each step the held-out frame, of all clips, whose tokens are nearest to the predicted ones."
    )
    storage.write_bytes(storage.join(shared.run_dir, STRIPS), frame_sheet.draw(sheet, head))
    metres = np.linalg.norm(places[found] - hands[:, 1:], axis=-1)
    stayed = np.linalg.norm(hands[:, :1] - hands[:, 1:], axis=-1)
    return {MODEL: metres.tolist(), COPY: stayed.tolist()}


def _lookup(clip: torch.Tensor, gallery: torch.Tensor, kind: str) -> np.ndarray:
    """Nearest frame of the gallery [G, P, D] to each of [H, P, D]: int64 [H]."""
    return np.array([int(offline.distances(one.float(), gallery.float(), kind).argmin()) for one in clip])


def _curve(curves: dict[str, list[Row]], kind: str) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), dpi=110, layout="constrained")
    ax = figure.add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    for (name, lines), colour in zip(curves.items(), evaluate_table.BAR_COLOURS, strict=False):
        steps, means = np.arange(1, len(lines) + 1), np.array([line["mean"] for line in lines])
        ax.plot(steps, means, marker="o", ms=4, color=colour, label=name.replace("_", " "))
        if lines[0]["low"] is not None:
            ax.fill_between(steps, [line["low"] for line in lines], [line["high"] for line in lines], color=colour, alpha=0.18)
    ax.set_xlabel("steps ahead")
    ax.set_ylabel(f"latent error ({kind})")
    ax.set_xticks(steps)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
