"""The plan of an epoch: the order of jepa_core.order, whole or not there at all, the same bytes every time."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jepa_core.order import epoch_order
from pipelines import catalog, epoch_plan, storage
from pipelines.catalog_schema import CURRENT, VANISHED, VIDEO_SCHEMA, VIDEOS, item_id
from pipelines.clip_reader import COLUMNS
from pipelines.errors import InputRefused


@pytest.fixture
def ref(tmp_path):
    """57 kept videos in four commits, in no order of names, members of a tar among them; others that training does not read."""
    ref = catalog.parse_ref(str(tmp_path / "cat"))
    writer = catalog.Writer(ref, "one")
    rng = np.random.default_rng(0)
    rows = []
    for number in rng.permutation(60):
        uri, member = ("s3://b/x.tar", f"{number % 4}.mp4") if number >= 52 else (f"s3://b/{number:02d}.mp4", "")
        place = {"uri": uri, "member": member, "offset": int(number) if member else 0, "size": 7, "etag": "e"}
        row = {**place, "id": item_id(*place.values()), "keep": number != 5, "status": VANISHED if number in (6, 7) else CURRENT}
        row |= {"width": int(number), "start_pts": int(number) * 3, "index_directory": bytes([number])}
        rows.append(row | {"cuts": [1, int(number)] if number % 3 else None, "index_pack": f"{number % 5}.pack"})
    for start in range(0, 60, 15):
        part = [{name: row.get(name) for name in VIDEO_SCHEMA.names} for row in rows[start : start + 15]]
        writer.append(VIDEOS, pa.Table.from_pylist(part, VIDEO_SCHEMA))
    return catalog.pin(ref)


def parts(uri) -> list[str]:
    """The plan's Parquet parts, in order."""
    return [storage.join(uri, name) for name in epoch_plan.manifest(uri)["parts"]]


def read(uri):
    return pa.concat_tables(pq.read_table(part) for part in parts(uri))


@pytest.mark.parametrize("spooled", [1, 20, 500])
@pytest.mark.parametrize("epoch", [0, 3])
def test_row_n_is_the_video_at_place_n(ref, tmp_path, monkeypatch, spooled, epoch):
    monkeypatch.setattr(epoch_plan, "SPOOLED", spooled)
    uri = str(tmp_path / "plan")
    told = epoch_plan.write(ref, uri, seed=11, dataset=2, epoch=epoch, rows_per_part=10)
    assert told == epoch_plan.manifest(uri)
    assert told["rows"] == 57
    videos, plan = catalog.read_videos(ref, COLUMNS), read(uri)
    rows = epoch_order(11, 2, epoch, 57).tolist()
    assert plan["row"].to_pylist() == rows
    assert plan.drop_columns("row").to_pylist() == videos.take(rows).to_pylist()
    assert [pq.read_metadata(part).num_rows for part in parts(uri)] == [10] * 5 + [7]


def test_equal_arguments_write_equal_bytes_and_nothing_twice(ref, tmp_path, monkeypatch):
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    for uri in (one, two):
        epoch_plan.write(ref, uri, 0, 0, 0, 20)
    for a, b in zip(parts(one), parts(two), strict=True):
        assert storage.read_bytes(a) == storage.read_bytes(b)
    monkeypatch.setattr(epoch_plan, "_ranks", lambda ref: pytest.fail("written already"))
    assert epoch_plan.write(ref, one, 0, 0, 0, 20) == epoch_plan.manifest(two)
    with pytest.raises(InputRefused, match="another folder"):
        epoch_plan.write(ref, one, 0, 1, 0, 20)
    with pytest.raises(InputRefused, match="epoch 0"):
        epoch_plan.write(ref, one, 0, 0, 1, 20)


def test_a_plan_without_its_manifest_is_none_and_is_written_again(ref, tmp_path, monkeypatch):
    uri, real = str(tmp_path / "plan"), storage.write_bytes

    def killed_before_the_third(name, data):
        if name.endswith("part-000002.parquet"):
            raise KeyboardInterrupt
        real(name, data)

    monkeypatch.setattr(storage, "write_bytes", killed_before_the_third)
    with pytest.raises(KeyboardInterrupt):
        epoch_plan.write(ref, uri, 0, 0, 0, 20)
    assert len(storage.list_files(uri)) == 2
    with pytest.raises(InputRefused):
        parts(uri)
    monkeypatch.undo()
    epoch_plan.write(ref, uri, 0, 0, 0, 20)
    np.testing.assert_array_equal(read(uri)["row"], epoch_order(0, 0, 0, 57))


def test_a_catalog_without_kept_videos_is_refused(tmp_path):
    ref = catalog.parse_ref(str(tmp_path / "cat"))
    catalog.Writer(ref, "one")
    with pytest.raises(InputRefused, match="no video that training would read"):
        epoch_plan.write(ref, str(tmp_path / "plan"), 0, 0, 0)


def test_rows_come_in_any_order_and_one_part_is_open_at_a_time(ref, tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_plan, "ROWS_PER_PART", 10)
    videos, plans = catalog.read_videos(ref, COLUMNS), str(tmp_path / "plans")
    opened, real = [], storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: opened.append(uri) or real(uri))
    order = epoch_order(5, 1, 3, 57)
    for start in range(0, 57, 4):
        places = np.arange(start, min(start + 4, 57))
        assert epoch_plan.rows(ref, plans, 5, 1, 3, places)["row"].to_pylist() == order[places].tolist()
    assert len(opened) == 6  # each part once
    places = np.array([56, 3, 40, 3, 11])
    found = epoch_plan.rows(ref, plans, 5, 1, 3, places)
    assert found["row"].to_pylist() == order[places].tolist()
    assert found.drop_columns("row").to_pylist() == videos.take(order[places]).to_pylist()


def test_an_epoch_is_planned_when_the_walk_reaches_it_and_the_last_but_one_leaves(ref, tmp_path):
    plans = str(tmp_path / "plans")
    for epoch in range(5):
        row = epoch_plan.rows(ref, plans, 0, 0, epoch, np.array([7]))["row"][0].as_py()
        assert row == epoch_order(0, 0, epoch, 57)[7]
        epoch_plan.rows(ref, plans, 0, 1, 0, np.array([7]))
    left = {info.uri.split("/")[-2] for info in storage.list_files(plans)}
    assert left == {"000-000003", "000-000004", "001-000000"}
    epoch_plan._OPEN.clear()  # as in a process that comes back to an earlier epoch after a restart of the workers
    row = epoch_plan.rows(ref, plans, 0, 0, 1, np.array([7]))["row"][0].as_py()
    assert row == epoch_order(0, 0, 1, 57)[7]
