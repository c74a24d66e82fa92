"""Why an episode of a robot, or one camera of it, cannot be used: codes that stay the same, each with what it means."""

REASONS = {
    "missing_metadata": "not exactly one metadata_*.json with the episode's facts, or an episode table without the episode",
    "missing_camera": "the metadata names a camera whose video is not there",
    "unreadable_h5": "the HDF5 file is damaged, truncated or lacks the robot's pose",
    "unreadable_parquet": "the Parquet file is damaged or truncated",
    "unreadable_record": "a record is no tf.train.Example, or its steps do not fit together",
    "unreadable_video": "the video cannot be probed, or a picture of it does not decode",
    "truncated": "the file ends within a record: what came before it is used",
    "wrong_crc": "the bytes of a record, or of its length, do not have their checksum",
    "non_finite_state": "NaN or infinity in the robot's state",
    "length_mismatch": "more states than pictures, or the reverse, beyond the tolerance",
    "bad_time_base": "times are missing or do not increase from frame to frame",
    "bad_timestamps": "frames whose picture is not within half a frame of where the dataset says it is",
    "bad_mapping": "a column or dimension that the mapping names is not there",
    "bad_units": "values that metres, radians or a gripper of 0 to 1 cannot have: degrees, millimetres or another gripper scale",
    "too_short": "shorter than a clip",
}
"""Every reason that the table `trajectories` may hold. Documented in docs/trajectories.md."""


class EpisodeRefused(Exception):
    """One episode cannot be used; ``reason`` is one of REASONS, ``detail`` a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
