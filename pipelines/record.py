"""jepa record: seeded play of the simulated robot, written in DROID's raw layout."""

import time
from typing import Any

from pipelines import ray_session, storage
from pipelines.config import RecordConfig
from pipelines.progress import Reporter


def run(config: RecordConfig, reporter: Reporter) -> dict[str, Any]:
    """Record `episodes` episodes below `out`. Episode i depends on (seed, i) alone, so a repeated run writes the same."""
    from pipelines.robot.record import record

    out = storage.normalize(config.out)
    storage.check_bucket(out)
    done = 0

    def count(_: str) -> None:
        nonlocal done
        done += 1
        reporter.advance(done)

    with ray_session.session(config.ray):
        reporter.start("record", config.episodes, "episodes")
        began = time.perf_counter()
        record(
            out,
            episodes=config.episodes,
            seconds=config.seconds,
            seed=config.seed,
            config=config.sim,
            header_fps=config.header_fps,
            on_episode=count,
            cameras=tuple(config.cameras),
            task=config.task,
            play=config.play,
        )
        minutes = (time.perf_counter() - began) / 60
        reporter.stop()
    hours = config.episodes * config.seconds / 3600
    return {"trajectories": out, "episodes": config.episodes, "hours": hours, "episodes_per_minute": config.episodes / minutes}
