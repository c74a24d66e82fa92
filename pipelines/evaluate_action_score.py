"""jepa evaluate action-score: actions planned towards a later frame of a held-out episode, against those that led there.

The planner sees the first frame and the frame `planner.horizon` steps later, and its actions are composed from the first state.
Errors are of the pose that they end in: metres, radians (angle of the rotation between), gripper closedness. Beside it doing
nothing, and random actions within the planner's bounds. `score` is that of jepa-wms, 800 * (0.1 m - error), 0 at the least.

Legend: B clips, H planned steps.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_core.planner import plan
from jepa_core.poses import compose, deltas, euler_to_matrix
from pipelines import evaluate_arms, offline
from pipelines.offline import Row, Shared
from pipelines.offline_config import ActionScoreConfig
from pipelines.progress import Reporter

PLANNER, NO_OP, RANDOM = "planner", "no-op", "random"
AGENTS = (PLANNER, NO_OP, RANDOM)
METRES, RADIANS, GRIPPER = "metres", "radians", "gripper"


def run(config: ActionScoreConfig, reporter: Reporter) -> dict[str, Any]:
    """Returns the mean end-effector error of every agent in metres, and the planner's other errors."""
    return offline.evaluate(config, reporter, _measure, _finish, config.planner.horizon + 1, lambda result: result["summary"])


def end_state(start: Tensor, actions: Tensor) -> Tensor:
    """The state [7] after actions [H, 7]."""
    for action in actions:
        start = compose(start, action)
    return start


def errors(reached: Tensor, wanted: Tensor) -> dict[str, float]:
    """Between two states [7]: metres, radians, gripper."""
    turn = euler_to_matrix(reached[3:6]).T @ euler_to_matrix(wanted[3:6])
    sine = torch.stack([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]]).norm() / 2
    angle = torch.atan2(sine, (turn.trace() - 1) / 2)  # exact for small angles, where the arc cosine is not
    return {
        METRES: (reached[:3] - wanted[:3]).norm().item(),
        RADIANS: angle.item(),
        GRIPPER: (reached[6] - wanted[6]).abs().item(),
    }


def _measure(numbers: range, shared: Shared) -> list[str]:
    torch.set_num_threads(1)
    config, world = shared.config, offline.world_of(shared.model)
    predict = world.for_planning()
    horizon = config.planner.horizon
    clips = offline.clips_for(shared.trained, world, horizon + 1, config.seed)
    shown = offline.read(shared.episodes, numbers, clips, world)
    bound = torch.tensor([config.planner.max_step] * 3 + [0.0] * 3 + [config.planner.max_gripper])
    lines = []
    for clip, number in enumerate(numbers):
        noise = torch.Generator().manual_seed(config.seed + number)
        found = plan(predict, shown.z[clip, 0], shown.states[clip, 0], shown.z[clip, -1], config.planner, noise)
        random = (2 * torch.rand(horizon, 7, generator=noise) - 1) * bound
        chosen = {PLANNER: found.actions.float(), NO_OP: torch.zeros(horizon, 7), RANDOM: random}
        start, wanted = shown.states[clip, 0], shown.states[clip, -1]
        told = {name: errors(end_state(start, actions), wanted) for name, actions in chosen.items()}
        recorded = deltas(shown.states[clip])
        lines.append({"errors": told, "planned": chosen[PLANNER].tolist(), "recorded": recorded.tolist()})
    evaluate_arms.write_unit(shared.run_dir, offline.block(numbers), {"episodes": shown.rows, "clips": lines})
    return [offline.block(numbers)]


def _finish(shared: Shared, blocks: list[Row]) -> Row:
    episodes = [row for block in blocks for row in block["episodes"]]
    lines = [line for block in blocks for line in block["clips"]]
    units = (METRES, RADIANS, GRIPPER)
    values = {(name, unit): np.array([line["errors"][name][unit] for line in lines]) for name in AGENTS for unit in units}
    told = {name: {unit: offline.interval(values[name, unit], episodes) for unit in units} for name in AGENTS}
    gains = {name: offline.interval(values[name, METRES] - values[PLANNER, METRES], episodes) for name in (NO_OP, RANDOM)}
    scores = {name: max(0.0, 800 * (0.1 - told[name][METRES]["mean"])) for name in AGENTS}
    rows = [
        (
            name,
            offline.shown_interval(told[name][METRES], 100, 2),
            offline.shown_interval(told[name][RADIANS]),
            offline.shown_interval(told[name][GRIPPER]),
            offline.shown_interval(gains[name], 100, 2) if name in gains else "-",
            f"{scores[name]:.1f}",
        )
        for name in AGENTS
    ]
    horizon = shared.config.planner.horizon
    return {
        "task": "action-score",
        "lead": f"Actions planned towards the frame {horizon} steps ahead, against the recorded ones.",
        "title": f"error of the pose after {horizon} planned steps, {len(lines)} clips of {len(set(episodes))} held-out episodes",
        "columns": ("agent", "hand, cm", "rotation, rad", "gripper", "worse than the planner, cm", "score"),
        "rows": rows,
        "horizon": horizon,
        "scores": told,
        "gains_m": gains,
        "action_score": scores,
        "clips": [{"episode": row, **line} for row, line in zip(episodes, lines, strict=True)],
        "summary": {
            **{f"{name.replace('-', '_')}_m": told[name][METRES]["mean"] for name in AGENTS},
            "planner_rad": told[PLANNER][RADIANS]["mean"],
            "planner_gripper": told[PLANNER][GRIPPER]["mean"],
            "score": scores[PLANNER],
        },
        "pictures": [],
    }
