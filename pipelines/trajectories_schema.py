"""The catalog's table `trajectories`: a row for each camera of each episode, with all that reading a clip of it needs.

A refused episode, or camera of one, is a row with `reason` and `detail`. The index in a run's folder has the same columns.

Legend: F frames of an episode.
"""

import hashlib

import pyarrow as pa

TRAJECTORIES = "trajectories"

_STATISTICS = pa.struct([(name, pa.list_(pa.float64())) for name in ("mean", "std", "min", "max")])

TRAJECTORY_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("uri", pa.string()),  # names the episode: its folder, or shard or dataset # place
        ("episode", pa.string()),  # its name in the source
        ("layout", pa.string()),
        ("robot", pa.string()),
        ("camera", pa.string()),  # "" for a refusal of the whole episode
        ("task", pa.string()),
        ("success", pa.bool_()),  # null where nothing says it
        ("time_base", pa.string()),  # physical | header
        ("seconds_per_frame", pa.float64()),  # median, by the time base
        ("num_frames", pa.int64()),
        ("state_statistics", _STATISTICS),  # of the 7 numbers of a state
        ("action_statistics", _STATISTICS),  # of the 7 deltas from frame to frame, before any subsampling
        ("video_uri", pa.string()),
        ("etag", pa.string()),
        ("stream", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("pts", pa.list_(pa.int64())),  # of each frame, in the video's units; of a JPEG its first byte in `video_uri`
        ("sizes", pa.list_(pa.int32())),  # bytes of each JPEG; null for a video
        ("times", pa.list_(pa.float64())),  # of each frame, seconds from the first by the time base
        ("states", pa.list_(pa.float64())),  # [F * 7]
        ("reason", pa.string()),  # null for a usable row
        ("detail", pa.string()),
        ("source", pa.string()),  # what `jepa ingest trajectories source=` named
        ("item", pa.string()),  # the piece of the source that was read in one go
        ("fingerprint", pa.string()),  # of its bytes and of how it was read
        ("item_rows", pa.int32()),  # how many rows it has: with fewer, it is read again
        ("status", pa.string()),
        ("run", pa.string()),
        ("status_run", pa.string()),
    ]
)


def row_id(item: str, fingerprint: str, episode: str, camera: str) -> str:
    """Name of one row, 32 hex digits: the same for every run that reads the same bytes in the same way."""
    text = "\0".join((item, fingerprint, episode, camera))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
