"""Options of `jepa run`. This module imports neither torch nor ray, so that `jepa --help` answers at once."""

from dataclasses import dataclass
from typing import Literal

from omegaconf import MISSING

from pipelines.errors import UsageError


@dataclass(frozen=True)
class RunFolderConfig:
    """jepa run ACTION RUN: what stands in a run folder; which samples trained its newest checkpoint.

    `jepa run show RUN`      catalogs, configuration, checkpoints with age and size, starts
    `jepa run ledger RUN`    recomputes the order of all samples up to the newest checkpoint and compares it with what the workers
                             wrote down while they trained: every microbatch once, none missing, each with the videos it should
                             have had. Exit code 3 when something differs.
    step=N | sample=N | video=URI-or-id    list these samples only; out=FILE.parquet writes what is listed, or all samples
    """

    action: Literal["show", "ledger"] = MISSING
    run: str = MISSING
    step: int | None = None
    """Finished step, from 1."""
    sample: int | None = None
    """Number of a sample, from 0."""
    video: str | None = None
    """URI or catalog id of a video."""
    out: str | None = None
    """Parquet file for the samples: step, unit, sample, dataset, epoch, id, uri, replaced."""

    def check(self) -> None:
        """Options that belong to the other action, or exclude each other."""
        given = [name for name in ("step", "sample", "video", "out") if getattr(self, name) is not None]
        if self.action == "show" and given:
            raise UsageError(f"{given[0]} is for jepa run ledger")
        if len(filters := [name for name in given if name != "out"]) > 1:
            raise UsageError(f"{filters[0]} and {filters[1]}: choose one of them")
        if self.out is not None and not self.out.endswith(".parquet"):
            raise UsageError(f"out={self.out} must end in .parquet")
