"""The layouts that episodes come in: which one stands at a URI, the pieces that it is read in, and rows from them on Ray Data."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from pipelines import lerobot, storage
from pipelines.errors import InputRefused, UsageError
from pipelines.robot import droid_episodes, droid_raw, lerobot_episodes, rlds
from pipelines.robot.recording import Item, Reader, Reading
from pipelines.trajectories_rows import rows_of
from pipelines.trajectories_schema import TRAJECTORY_SCHEMA

READERS: dict[str, Reader] = {"droid_raw": droid_episodes.read, "rlds": rlds.read, "lerobot": lerobot_episodes.read}
ITEM_SCHEMA = pa.schema([("uri", pa.string()), ("fingerprint", pa.string()), ("payload", pa.string())])
EPISODES_PER_TASK = 8
"""Folders of DROID raw; a shard or a file of a dataset is a task of its own."""


def detect(root: str, layout: str = "auto") -> str:
    """The layout at `root`: what is said, or what is found. Raises InputRefused where no episode is."""
    if layout != "auto":
        return layout
    if lerobot.version(root):
        return "lerobot"
    for page in storage.list_pages(root):
        for info in page:
            if info.uri.endswith(f"/{droid_raw.TRAJECTORY_FILE}"):
                return "droid_raw"
            if rlds.SHARD.search(info.uri):
                return "rlds"
    raise InputRefused(
        f"no episodes below {root}: no {droid_raw.TRAJECTORY_FILE}, no *.tfrecord-00000-of-00001, no {lerobot.INFO} with a "
        f"codebase_version: check the path, or let `jepa record out={root}` make some"
    )


def items(root: str, layout: str, reading: Reading) -> list[Item]:
    """The pieces of a source in order of URI; the way they are read is part of their fingerprints."""
    if reading.time_base == "header" and layout == "rlds":
        raise UsageError(f"{root} is RLDS, which has no container whose header could say a rate: use time_base=physical")
    listed: Iterable[Item]
    if layout == "lerobot":
        listed = lerobot_episodes.items(root, reading.mapping)
    else:
        listed = droid_episodes.items(root) if layout == "droid_raw" else rlds.items(root)
    how = _digest(reading)
    found = [item._replace(fingerprint=f"{item.fingerprint}-{how}") for item in listed]
    if not found:
        raise InputRefused(f"no episodes of layout={layout} below {root}: check the path, or leave layout=auto")
    return found


def read(found: list[Item], layout: str, reading: Reading, cameras: tuple[str, ...] = ()) -> Iterator[pa.Table]:
    """Rows of TRAJECTORY_SCHEMA of the items, as tables in no promised order, by tasks of Ray Data; `cameras` keeps some."""
    import ray.data

    size = EPISODES_PER_TASK if layout == "droid_raw" else 1
    rows = [{"uri": item.uri, "fingerprint": item.fingerprint, "payload": json.dumps(item.payload)} for item in found]
    blocks = [pa.Table.from_pylist(rows[start : start + size], ITEM_SCHEMA) for start in range(0, len(rows), size)]
    kwargs = {"layout": layout, "reading": reading, "cameras": cameras}
    read_rows = ray.data.from_arrow(blocks).map_batches(
        _read_batch, batch_size=None, batch_format="pyarrow", num_cpus=1, fn_kwargs=kwargs
    )
    for batch in read_rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield pa.table(batch).cast(TRAJECTORY_SCHEMA)


def _read_batch(batch: pa.Table, layout: str, reading: Reading, cameras: tuple[str, ...]) -> Iterator[pa.Table]:
    for row in batch.to_pylist():
        item = Item(row["uri"], row["fingerprint"], json.loads(row["payload"]))
        found = READERS[layout](item, reading)
        kept = (one for one in found if not cameras or one.camera in ("", *cameras))
        yield pa.Table.from_pylist(rows_of(item, kept, layout, reading.time_base), TRAJECTORY_SCHEMA)


def _digest(reading: Reading) -> str:
    told: dict[str, Any] = {"time_base": reading.time_base, "mapping": asdict(reading.mapping), "rlds_hz": reading.rlds_hz}
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()
