"""Which of a source's episodes a verb takes: a group of options that several verbs have."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EpisodeChoice:
    """Which episodes and cameras of a catalog, or of a folder, are taken."""

    camera: str = ""
    """Name of a camera, or all. Empty: left, or exterior_1, or the only one: mixing views hurt V-JEPA 2-AC."""
    robot: str = ""
    success_only: bool = False
    min_seconds: float = 0.0
    """Shorter episodes are left out, besides those that are shorter than a clip."""
