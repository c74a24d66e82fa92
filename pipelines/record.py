"""jepa record: seeded random play of the simulated robot, written in DROID's raw layout."""

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
        record(
            out,
            episodes=config.episodes,
            seconds=config.seconds,
            seed=config.seed,
            config=config.sim,
            header_fps=config.header_fps,
            on_episode=count,
        )
        reporter.stop()
    return {"trajectories": out, "episodes": config.episodes, "hours": config.episodes * config.seconds / 3600}
