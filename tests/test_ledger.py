"""The ledger: what the workers wrote down agrees with the order computed again, and every way in which it may not is named."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3_faults import SeparateS3

from pipelines import catalog, cli, clips, ledger, presets, run_folder, run_verb, storage, units
from pipelines.catalog_schema import CURRENT, VIDEO_SCHEMA, VIDEOS, CatalogRef, item_id
from pipelines.config import PretrainConfig
from pipelines.errors import InputRefused, UsageError
from pipelines.ledger_config import RunFolderConfig
from pipelines.progress import Reporter

STEPS, EVERY, PARTS, SIZE = 40, 10, 3, 4
"""Steps, steps between checkpoints, microbatches of a step, samples of a microbatch."""
SAMPLES = STEPS * PARTS * SIZE
WORKERS = (1, 3, 2, 1)
"""In each interval."""


def write_catalog(folder: str, count: int) -> CatalogRef:
    rows = []
    for number in range(count):
        place = {"uri": f"s3://b/{folder[-1]}{number:03d}.mp4", "member": "", "offset": 0, "size": 7, "etag": "e"}
        row = {**place, "id": item_id(*place.values()), "keep": True, "status": CURRENT}
        rows.append({name: row.get(name) for name in VIDEO_SCHEMA.names})
    ref = catalog.parse_ref(folder)
    catalog.Writer(ref, "one").append(VIDEOS, pa.Table.from_pylist(rows, VIDEO_SCHEMA))
    return catalog.pin(ref)


def write_run(folder: str) -> tuple[str, list[dict]]:
    """A run over two catalogs as training leaves it, unit by unit; and its samples: (dataset, id, uri, attempt) by number."""
    refs = {name: write_catalog(f"{folder}/{name}", count) for name, count in (("big", 100), ("few", 7))}
    run_dir = f"{folder}/run"
    config = presets.load(PretrainConfig, "pretrain", [
        f"run.dir={run_dir}", f"datasets.big.catalog={refs['big']}", f"datasets.few.catalog={refs['few']}", "seed=5",
        "datasets.few.weight=0.25", "datasets.few.num_frames=1", f"train.steps={STEPS}", f"train.batch_size={PARTS * SIZE}",
        f"train.microbatches={PARTS}",
    ])  # fmt: skip
    storage.write_bytes(storage.join(run_dir, run_folder.CONFIG), presets.to_yaml(config).encode())
    data = clips.open_data(config, PARTS, shared=False)
    rows = {source.name: source.table.select(["id", "uri"]).to_pylist() for source in data.sources}
    truth: list[dict] = []
    for interval, workers in enumerate(WORKERS):
        lines: list[dict[str, list]] = [{run_folder.LEDGER: [], run_folder.QUARANTINE: []} for _ in range(workers)]
        for unit in range(interval * EVERY * PARTS, (interval + 1) * EVERY * PARTS):
            mine, draw, step = lines[unit % workers], data.plan.unit(unit)[1], unit // PARTS + 1
            ids = []
            for place, n in enumerate(draw.sample.tolist()):
                name = data.sources[draw.dataset[place]].name
                attempts = 2 if n % 50 == 7 else 1 if n % 20 == 3 else 0  # so many videos failed
                tried = [draw.row[place], *(data.plan.replacement(n, k).row[0] for k in range(1, attempts + 1))]
                shown = rows[name][tried[-1]]
                for attempt, row in enumerate(tried[:-1]):
                    mine[run_folder.QUARANTINE].append(
                        {"step": step, "sample": n, "dataset": name, "uri": rows[name][row]["uri"], "reason": "truncated",
                         "detail": "", "attempt": attempt, "replaced_by": shown["uri"]}
                    )  # fmt: skip
                ids.append(shown["id"])
                truth.append({"dataset": name, **shown, "replaced": attempts})
            mine[run_folder.LEDGER].append({"step": step, "unit": unit, "digest": units.digest(draw.sample, ids)})
        for rank, kinds in enumerate(lines):
            for kind, written in kinds.items():
                if written:
                    run_folder.write_part(run_dir, kind, interval * EVERY + 1, written, rank)
        catalogs = {source.name: {"catalog": str(source.ref), "digest": data.digests[source.name]} for source in data.sources}
        step = (interval + 1) * EVERY
        uri = run_folder.checkpoint_folder(run_dir, step, "abcdef")
        files = {"a": {"size": 5, "sha256": ""}, "b": {"size": 7, "sha256": ""}}
        run_folder.commit(uri, {"step": step, "catalogs": catalogs, "files": files, "config_hash": "c0ffee", "code_version": "v"})
    run_folder.write_json(run_dir, run_folder.PROVENANCE, {"first_started": 0.0, "starts": 3})
    return run_dir, truth


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[str, list[dict]]:
    return write_run(str(tmp_path_factory.mktemp("ledger")))


@pytest.fixture
def run_dir(written, tmp_path) -> str:
    """A copy to damage."""
    return shutil.copytree(written[0], str(tmp_path / "run"))


def audit(run_dir: str, *words: str) -> tuple[dict, list[dict]]:
    """(result, what was printed)"""
    reporter = Reporter(io.StringIO())
    options = presets.load(RunFolderConfig, "run", ["action=ledger", f"run={run_dir}", *words])
    result = run_verb.run(options, reporter)
    return result, [json.loads(line) for line in reporter.stream.getvalue().splitlines()]


def table(printed: list[dict], start: str) -> list[dict]:
    return next(line["rows"] for line in printed if line["event"] == "table" and line["title"].startswith(start))


def part(run_dir: str, kind: str, first: int) -> Path:
    return Path(run_dir, kind, f"{first:08d}.jsonl")


@pytest.mark.parametrize("chunk", [1, 100, 1 << 16])
def test_a_sound_ledger_agrees_and_tells_who_was_shown_how_often(written, chunk, monkeypatch):
    monkeypatch.setattr(ledger, "CHUNK_SAMPLES", chunk)
    run_dir, truth = written
    result, printed = audit(run_dir)
    replaced = sum(row["replaced"] > 0 for row in truth)
    assert result == {
        "run": run_dir, "checkpoint": f"step_{STEPS:08d}-abcdef", "step": STEPS, "microbatches": STEPS * PARTS,
        "samples": SAMPLES, "replaced": replaced, "missing": 0, "doubled": 0, "mismatched": 0,
    }  # fmt: skip
    assert replaced > 20
    for row in table(printed, "datasets"):
        times = Counter(line["id"] for line in truth if line["dataset"] == row["dataset"])
        videos = {"big": 100, "few": 7}[row["dataset"]]
        assert (row["videos"], row["samples"]) == (videos, times.total())
        assert row["epochs"] == pytest.approx(times.total() / videos)
        assert row["shown_max"] == max(times.values())
        assert row["shown_min"] == (min(times.values()) if len(times) == videos else 0)
        assert row["replaced"] == sum(r["replaced"] > 0 for r in truth if r["dataset"] == row["dataset"])


def test_all_samples_go_to_parquet(written, tmp_path):
    run_dir, truth = written
    result, _ = audit(run_dir, f"out={tmp_path}/all.parquet")
    rows = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert [{name: row[name] for name in truth[0]} for row in rows] == truth
    assert [row["sample"] for row in rows] == list(range(SAMPLES))
    assert all(row["step"] == row["sample"] // (PARTS * SIZE) + 1 and row["unit"] == row["sample"] // SIZE for row in rows)
    assert result["out"] == f"{tmp_path}/all.parquet"


def test_filters_list_a_step_a_sample_or_a_video(written, monkeypatch):
    run_dir, truth = written
    result, printed = audit(run_dir, "step=13")
    assert [row["sample"] for row in table(printed, "samples")] == list(range(12 * PARTS * SIZE, 13 * PARTS * SIZE))
    assert result["microbatches"] == PARTS  # and only these were looked at
    (row,) = table(audit(run_dir, "sample=57")[1], "samples")
    assert {name: row[name] for name in truth[57]} == truth[57]
    assert truth[57]["replaced"] == 2
    for key in ("uri", "id"):
        wanted = truth[57][key]
        rows = table(audit(run_dir, f"video={wanted}")[1], "samples")
        assert [row["sample"] for row in rows] == [n for n, row in enumerate(truth) if row[key] == wanted]


@pytest.mark.parametrize(("words", "error"), [
    (["step=41"], "has seen steps 1 to 40 and samples 0 to 479 only"),
    (["step=0"], "has seen steps 1 to 40"),
    (["sample=480"], "samples 0 to 479 only"),
    (["video=s3://b/other.mp4"], "no catalog of the run has such a URI or id"),
])  # fmt: skip
def test_what_the_run_has_not_seen_is_refused(written, words, error):
    with pytest.raises(InputRefused, match=error):
        audit(written[0], *words)


@pytest.mark.parametrize(("words", "error"), [
    (["action=show", "step=1"], "step is for jepa run ledger"),
    (["action=ledger", "step=1", "sample=1"], "choose one"),
    (["action=ledger", "out=x.csv"], "must end in .parquet"),
])  # fmt: skip
def test_options_that_do_not_go_together(words, error):
    with pytest.raises(UsageError, match=error):
        presets.load(RunFolderConfig, "run", ["run=/r", *words])


def swap_digests(lines: list[dict]) -> list[dict]:
    lines[4]["digest"], lines[5]["digest"] = lines[5]["digest"], lines[4]["digest"]
    return lines


def shift_step(lines: list[dict]) -> list[dict]:
    lines[4]["step"] += 1
    return lines


@pytest.mark.parametrize(("change", "counts", "first"), [
    (lambda lines: lines[:4] + lines[6:], {"missing": 2}, "microbatch 4 of step 2 is missing; microbatch 5 of step 2 is missing"),
    (lambda lines: lines[:5] + lines[4:], {"doubled": 1}, "microbatch 4 of step 2 is doubled"),
    (swap_digests, {"of other samples": 2}, "microbatch 4 of step 2 is of other samples"),
    (shift_step, {"of another step": 1, "missing": 1}, "microbatch 4 of step 3 is of another step"),
    (lambda lines: lines[:-1], {"missing": 1}, "microbatch 29 of step 10 is missing"),
    (lambda lines: lines + lines[-1:], {"doubled": 1}, "microbatch 29 of step 10 is doubled"),
    (lambda lines: [], {"missing": 30}, "microbatch 0 of step 1 is missing"),
])  # fmt: skip
def test_what_does_not_agree_is_counted_and_named(run_dir, change, counts, first, monkeypatch):
    path = part(run_dir, run_folder.LEDGER, 1)
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputRefused, match=f"{sum(counts.values())} microbatches up to step 40 do not agree: {first}"):
        audit(run_dir)
    # And when the chunk ends right there.
    monkeypatch.setattr(ledger, "CHUNK_SAMPLES", SIZE)
    with pytest.raises(InputRefused, match=first):
        audit(run_dir)


def test_the_last_lines_of_all_are_looked_at_too(run_dir):
    path = part(run_dir, run_folder.LEDGER, 31)
    path.write_text(path.read_text() + path.read_text().splitlines()[-1] + "\n")
    with pytest.raises(InputRefused, match="microbatch 119 of step 40 is doubled"):
        audit(run_dir)


def test_a_replacement_that_nobody_noted_shows(run_dir):
    path = part(run_dir, run_folder.QUARANTINE, 1)
    failures = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in failures[1:]))
    with pytest.raises(InputRefused, match="of other samples"):
        audit(run_dir)


def test_only_what_the_newest_checkpoint_has_seen_counts(run_dir):
    """A run that was killed: parts of the last interval were written, its COMMIT was not."""
    Path(run_dir, "checkpoints", f"step_{STEPS:08d}-abcdef", "COMMIT").unlink()
    result, _ = audit(run_dir)
    assert (result["step"], result["samples"]) == (30, SAMPLES * 3 // 4)


def test_another_catalog_is_refused(run_dir):
    path = Path(run_dir, "checkpoints", f"step_{STEPS:08d}-abcdef", "COMMIT")
    record = json.loads(path.read_text())
    record["catalogs"]["big"]["digest"] = "0" * 16
    path.write_text(json.dumps(record))
    with pytest.raises(InputRefused, match=r"was trained on .*000000.* one was changed since"):
        audit(run_dir)


def test_memory_is_that_of_an_interval_and_a_chunk(written, monkeypatch):
    """No more lines are held than one checkpoint interval wrote, and samples come in pieces."""
    monkeypatch.setattr(ledger, "CHUNK_SAMPLES", 40)
    held: list[str] = []
    real = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: held.append(uri) or real(uri))
    from pipelines.pretrain import config_of

    config = config_of(written[0])
    watched = ledger.Audit(config, run_folder.require_checkpoint(written[0]), uris=False)
    held.clear()
    pieces = []
    for done, samples in watched.compare(watched.units_of()):
        pieces.append(len(samples.sample))
        ahead = {int(Path(uri).name[:8]) for uri in held if f"/{run_folder.LEDGER}/" in uri}
        assert max(ahead) <= done // PARTS + EVERY + 1
    assert set(pieces) == {40}


def test_show_tells_where_a_run_stands(run_dir):
    reporter = Reporter(io.StringIO())
    Path(run_dir, "checkpoints", "step_00000020-abcdef", "DAMAGED").write_text('{"reason": "a"}')
    result = run_verb.run(RunFolderConfig("show", run_dir), reporter)
    assert result == {
        "run": run_dir, "status": "finished", "step": 40, "steps": 40, "starts": 3, "first_started": "1970-01-01T00:00:00Z",
        "config_hash": "c0ffee", "code_version": "v", "damaged": ["step_00000020-abcdef"],
    }  # fmt: skip
    printed = [json.loads(line) for line in reporter.stream.getvalue().splitlines()]
    rows = table(printed, "checkpoints")
    assert [(row["step"], row["bytes"]) for row in rows] == [(40, 12), (30, 12), (10, 12)]
    assert all(0 <= row["age_hours"] < 1 for row in rows)
    assert {row["dataset"] for row in table(printed, "catalogs")} == {"big", "few"}
    with pytest.raises(InputRefused, match="not a run folder"):
        run_verb.run(RunFolderConfig("show", f"{run_dir}/checkpoints"), reporter)


@pytest.mark.s3
def test_a_run_on_s3(tmp_path, monkeypatch):
    with SeparateS3("bucket", tmp_path) as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        run_dir, truth = write_run("s3://bucket/x")
        result, _ = audit(run_dir, "out=s3://bucket/out/rows.parquet")
        assert (result["samples"], result["mismatched"]) == (SAMPLES, 0)
        rows = pq.read_table(pa.BufferReader(storage.read_bytes("s3://bucket/out/rows.parquet")))
        assert rows["id"].to_pylist() == [row["id"] for row in truth]


def test_the_command_line_answers_with_exit_code_3(run_dir, capsys):
    part(run_dir, run_folder.LEDGER, 11).unlink()
    assert cli.main(["run", "ledger", run_dir]) == 3
    printed = capsys.readouterr()
    assert table([json.loads(line) for line in printed.out.splitlines()], "datasets")
    message = json.loads(printed.err)["message"]
    assert "10 microbatches up to step 40 do not agree: microbatch 30 of step 11 is missing" in message  # of three workers
