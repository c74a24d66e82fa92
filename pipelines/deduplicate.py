"""Near-duplicates across the whole catalog, after an ingest: which video stands for each group, and the decision that follows."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import catalog, curation
from pipelines.catalog_schema import VIDEOS, CatalogRef
from pipelines.curation import CurationConfig

COLUMNS = ("id", "hashes", "motion", "black", "static", "duplicate_of", "keep", "dropped_by")


def run(ref: CatalogRef, writer: catalog.Writer, config: CurationConfig) -> int:
    """Compare all current videos that have hashes; commit the rows whose group or decision has changed. Returns how many."""
    rows = catalog.read(ref, VIDEOS, COLUMNS, catalog.STANDS & pc.field("hashes").is_valid())
    if not len(rows):
        return 0
    rows = rows.combine_chunks()
    ids = rows["id"].to_pylist()
    hashes = rows["hashes"].combine_chunks()
    stands = curation.duplicate_groups(ids, (hashes.values.to_numpy(), hashes.offsets.to_numpy()), config.duplicate_distance)
    duplicate_of = pa.array([None if stand == row else ids[stand] for row, stand in enumerate(stands.tolist())], pa.string())
    scores = [rows[name].to_numpy() for name in ("motion", "black", "static")]
    keep, dropped_by = curation.decide_all(config, *scores, duplicate_of.is_valid().to_numpy(zero_copy_only=False))
    decided = {"keep": pa.array(keep), "dropped_by": pa.array(dropped_by, pa.string())}
    now = pa.table({"id": rows["id"], "duplicate_of": duplicate_of, **decided})
    changed = np.zeros(len(rows), bool)
    for name in ("duplicate_of", "keep", "dropped_by"):
        before, after = rows[name].combine_chunks(), now[name].combine_chunks()
        same = pc.fill_null(pc.equal(before, after), False)
        changed |= ~pc.or_(same, pc.and_(before.is_null(), after.is_null())).to_numpy(zero_copy_only=False)
    if changed.any():
        writer.update(VIDEOS, now.filter(pa.array(changed)))
    return int(changed.sum())
