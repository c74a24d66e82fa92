"""jepa evaluate energy: where the predicted outcome of an action is nearest to the true next frame.

For held-out pairs of frames, a grid of translations goes through the world model; rotation and gripper are the recorded ones.
Energy is the latent distance of the outcome to the true next frame. Numbers: the distance from the grid's lowest point to the
recorded translation, and the share of the grid with lower energy than the recorded action itself (0: none, 0.5: chance). Beside
them how far off a point drawn at random is, and no motion.

Legend: N points along an axis of the grid, A = N^3 actions, P patches of a frame, D encoder width.
"""

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_core.poses import deltas
from pipelines import evaluate_arms, offline, storage
from pipelines.offline import Row, Shared
from pipelines.offline_config import EnergyConfig
from pipelines.progress import Reporter

PICTURE = "energy.png"
AXES = "xyz"
PLANES = ((0, 1), (0, 2), (1, 2))


def run(config: EnergyConfig, reporter: Reporter) -> dict[str, Any]:
    """Returns the mean distance of the minimum to the recorded action in metres, and the recorded action's rank."""
    return offline.evaluate(config, reporter, _measure, _finish, 2, lambda result: result["summary"])


def grid(points: int, radius: float, centre: Tensor) -> Tensor:
    """Translations [N, N, N, 3] around `centre` [3], x first."""
    steps = torch.linspace(-radius, radius, points)
    return torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=-1) + centre


def _measure(numbers: range, shared: Shared) -> list[str]:
    torch.set_num_threads(1)
    config, world = shared.config, offline.world_of(shared.model)
    clips = offline.clips_for(shared.trained, world, 2, config.seed)
    shown = offline.read(shared.episodes, numbers, clips, world)
    actions, lines = deltas(shown.states)[:, 0], []
    for clip, recorded in enumerate(actions):
        centre = recorded[:3] if config.centre == "recorded" else torch.zeros(3)
        tried = recorded.expand(config.points**3 + 1, 7).clone()
        tried[:-1, :3] = grid(config.points, config.radius, centre).flatten(0, 2)
        energies = torch.cat([_energies(world, shown, clip, part, config.distance) for part in tried.split(config.batch)])
        lines.append({"recorded": recorded.tolist(), "centre": centre.tolist(), "energy": energies[:-1].tolist(),
                      "recorded_energy": energies[-1].item()})  # fmt: skip
    evaluate_arms.write_unit(shared.run_dir, offline.block(numbers), {"episodes": shown.rows, "clips": lines})
    return [offline.block(numbers)]


@torch.no_grad()
def _energies(world: Any, shown: offline.Shown, clip: int, actions: Tensor, kind: str) -> Tensor:
    """Distance [n] of the outcome of each action [n, 7] to the clip's second frame."""
    count = len(actions)
    cameras = None if shown.cameras is None else shown.cameras[clip, :1].expand(count, 1, -1)
    z, states = shown.z[clip, :1], shown.states[clip, :1]
    outcome = world.predict(z.expand(count, *z.shape), actions[:, None], states.expand(count, 1, -1), cameras)[:, -1]
    return offline.distances(outcome, shown.z[clip, 1], kind)


def landscape(line: Row, config: EnergyConfig) -> Row:
    """What one clip's energies say: metres from the lowest point of the grid, and the recorded action's rank."""
    points = grid(config.points, config.radius, torch.tensor(line["centre"])).flatten(0, 2).numpy()
    energy, recorded = np.array(line["energy"]), np.array(line["recorded"])[:3]
    apart = np.linalg.norm(points - recorded, axis=-1)
    lower = (energy < line["recorded_energy"]).mean() + 0.5 * (energy == line["recorded_energy"]).mean()
    return {
        "minimum": points[energy.argmin()].tolist(),
        "distance": float(apart[energy.argmin()]),
        "least": float(apart.min()),
        "random": float(apart.mean()),
        "no_op": float(np.linalg.norm(recorded)),
        "rank": float(lower),
    }


def _finish(shared: Shared, blocks: list[Row]) -> Row:
    config = shared.config
    episodes = [row for block in blocks for row in block["episodes"]]
    lines = [line for block in blocks for line in block["clips"]]
    clips = [landscape(line, config) for line in lines]
    told = {name: offline.interval(np.array([clip[name] for clip in clips]), episodes) for name in clips[0] if name != "minimum"}
    names = {
        "distance": "lowest point of the grid",
        "least": "nearest point of the grid",
        "random": "a random point",
        "no_op": "no motion",
    }
    rows = [(label, offline.shown_interval(told[name], 100, 2)) for name, label in names.items()]
    rows.append(("share of the grid below the recorded action, %", offline.shown_interval(told["rank"], 100, 1)))
    storage.write_bytes(storage.join(shared.run_dir, PICTURE), _picture(lines[: config.shown], clips, config))
    summary = {"distance_m": told["distance"]["mean"], "random_m": told["random"]["mean"], "no_op_m": told["no_op"]["mean"],
               "rank": told["rank"]["mean"]}  # fmt: skip
    return {
        "task": "energy",
        "lead": "Energy of actions on a grid: the latent distance from their predicted outcome to the true next frame.",
        "title": f"from the recorded translation, cm: {config.points}^3 points to +-{100 * config.radius:g} cm, "
        f"{len(clips)} clips of {len(set(episodes))} held-out episodes",
        "columns": ("what", "cm"),
        "rows": rows,
        "grid": {"points": config.points, "radius": config.radius, "centre": config.centre},
        "scores": told,
        "clips": [{"episode": row, **line, **clip} for row, line, clip in zip(episodes, lines, clips, strict=True)],
        "summary": summary,
        "pictures": [{"file": PICTURE, "caption": "Lowest energy along the third axis. Star: recorded; ring: lowest point."}],
    }  # fmt: skip


def _picture(lines: list[Row], clips: list[Row], config: EnergyConfig) -> bytes:
    """Heat-maps of the planes xy, xz and yz, a clip a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 2.6 * len(lines)), dpi=100, layout="constrained")
    axes = figure.subplots(len(lines), len(PLANES), squeeze=False)
    for row, (line, clip) in enumerate(zip(lines, clips, strict=False)):
        energy = np.array(line["energy"]).reshape((config.points,) * 3)
        for ax, (first, second) in zip(axes[row], PLANES, strict=True):
            flat = energy.min(axis=3 - first - second).T
            edge = 100 * config.radius * (1 + 1 / (config.points - 1))
            left, bottom = 100 * line["centre"][first], 100 * line["centre"][second]
            extent = (left - edge, left + edge, bottom - edge, bottom + edge)
            drawn = ax.imshow(flat, origin="lower", extent=extent, cmap="viridis")
            ax.plot(100 * line["recorded"][first], 100 * line["recorded"][second], "*", color="white", mec="black", ms=13)
            ax.plot(100 * clip["minimum"][first], 100 * clip["minimum"][second], "o", mfc="none", mec="#ff5d5d", mew=2, ms=11)
            ax.set_xlabel(f"{AXES[first]}, cm", fontsize=8)
            ax.set_ylabel(f"{AXES[second]}, cm", fontsize=8)
            ax.tick_params(labelsize=7)
        figure.colorbar(drawn, ax=axes[row], fraction=0.02)
        axes[row][1].set_title(
            f"clip {row}: lowest point {100 * clip['distance']:.1f} cm off, rank {100 * clip['rank']:.0f} %", fontsize=8
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
