"""Options of the probe during pretraining: see online_probe.py."""

from dataclasses import dataclass
from typing import Any

from jepa_core.config import ClipConfig
from pipelines.errors import UsageError
from pipelines.label_config import UNLISTED, ListFormat, list_files

CLIPS_OF_GROUP = 6
"""Of a video or a piece of one, without labels: two moments in both directions of time, and its first and last third."""
FOLDS = 3
"""One is tested, the others are read: of so many videos or pieces there must be one each."""


@dataclass(frozen=True)
class OnlineProbeConfig:
    """What the target encoder knows, measured every so many steps of a training on a small fixed set of clips.

    None of it reaches the training: losses and weights are the same bits with the probe and without it.
    """

    every: int = 0
    """Steps between measurements, told with the next line of metrics; the last step is measured too. 0 measures nothing."""
    catalog: str | None = None
    """URI of the catalog that holds the clips, `@version` pins one; without it that of the run, of several the first."""
    labels: Any = None
    """Labelled list, as of `jepa evaluate probe`, for linear and k-NN accuracy. Without one, arrow of time and retrieval."""
    format: ListFormat = "auto"
    """folders and catalog need no list."""
    max_clips: int = 96
    """Clips of the set, at most."""
    max_mb: float = 256.0
    """What the decoded set may take of Ray's object store, once a node; more is refused."""

    @property
    def labelled(self) -> bool:
        """Whether classes are asked for."""
        return self.labels is not None or self.format in UNLISTED

    def check(self, clip: ClipConfig) -> None:
        """Raises UsageError for options that cannot be meant, and for a set of such clips that would be too large."""
        list_files(self.labels)
        if self.every < 0 or self.max_mb <= 0:
            raise UsageError("probe.every must not be negative, probe.max_mb must be above 0")
        least = FOLDS * CLIPS_OF_GROUP
        if self.max_clips < least:
            raise UsageError(f"probe.max_clips={self.max_clips} asks nothing that chance would not answer: give {least} or more")
        size = self.max_clips * clip.num_frames * clip.crop_size**2 * 3 / 1e6
        if self.every and size > self.max_mb:
            raise UsageError(
                f"probe.max_clips={self.max_clips} clips of {clip.num_frames} frames take {size:,.0f} MB decoded, "
                f"probe.max_mb is {self.max_mb:g}: lower the first, or raise the second and ray.object_store_mb"
            )
