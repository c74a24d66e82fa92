"""Options of the planning server. Imports neither torch nor ray, like pipelines.config."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from jepa_core.planner_config import PlannerConfig
from pipelines.errors import UsageError

TOKEN_VARIABLE = "JEPA_PLANNER_TOKEN"  # noqa: S105 - a name, no secret


@dataclass(frozen=True)
class ServePlannerConfig:
    """jepa serve-planner: goal image, observation and state come in over HTTP, an action goes out.

    Where the environment has JEPA_PLANNER_TOKEN, requests need it as `Authorization: Bearer TOKEN`.
    """

    model: str = MISSING
    """URI of a post-training run."""
    host: str = "127.0.0.1"
    """Another address than this machine's own needs a token."""
    port: int = 8077
    """0 takes a free one, which the first line of output tells."""
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    other_size: Literal["resize", "refuse"] = "resize"
    """A goal image of another size than the observation: both are cut to their centre and scaled, as the answer tells, or
    the request is refused."""
    max_body_mb: float = 16.0
    max_pixels: int = 4_000_000
    """Of one image."""
    max_sessions: int = 64
    """The one that was silent for longest goes first."""
    seed: int = 0
    bf16: bool = False

    def check(self) -> None:
        """Numbers that cannot be meant."""
        if not 0 <= self.port < 65536:
            raise UsageError(f"port={self.port} must lie between 0 and 65535")
        for name in ("max_body_mb", "max_pixels", "max_sessions"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}={getattr(self, name)} must be above 0")
        self.planner.check()
