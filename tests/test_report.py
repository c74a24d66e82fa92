"""The report page: every kind of run, finished, unfinished and damaged; self-contained; nothing hostile survives."""

import html
import io
import json
import re
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
import yaml

from jepa_core.positions import Grid
from pipelines import catalog, report, report_figures, run_folder, storage, sweep_table
from pipelines.catalog_schema import CURRENT, QUARANTINE, QUARANTINE_SCHEMA, VIDEO_SCHEMA, VIDEOS, item_id
from pipelines.config import ReportConfig
from pipelines.errors import InputRefused
from pipelines.ingest_scan import TODO_SCHEMA
from pipelines.ingest_tasks import Job, probe_items
from pipelines.progress import Reporter
from pipelines.video import tubelets

HOSTILE = '<script>alert("x")</script>$x$'
PROVENANCE = {"started": "2026-01-02T03:04:05Z", "git": "abc1234", "python": "3.11", "versions": {"ray": "2.60.0"}}
FRAMES = 12
SCORES = {"tubes": (0.61, 0.57), "large": (0.42, 0.47)}
AGENTS = {"planner": 0.031, "no-op": 0.204, "random": 0.251, "oracle": 0.012}


def write_run(folder: Path, config: dict, metrics: list[dict] = (), result: object = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
    if metrics:
        (folder / "metrics").mkdir()
        (folder / "metrics" / "00000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        step = metrics[-1]["step"]
        run_folder.commit(run_folder.checkpoint_folder(str(folder), step, "abcdef"), {"step": step, "files": {}})
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def tiny_mp4(path: Path, size: int = 48) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(FRAMES):
            picture = np.full((size, size, 3), 20 * index, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_catalog(folder: Path, uri: Path) -> str:
    ref = catalog.CatalogRef(str(folder / "catalog"), None)
    info = storage.stat_many([str(uri)])[str(uri)]
    item = {"id": item_id(info.uri, "", 0, info.size, info.etag), "uri": info.uri, "member": "", "offset": 0, "size": info.size,
            "etag": info.etag}  # fmt: skip
    rows = probe_items(pa.Table.from_pylist([item], TODO_SCHEMA), Job(ref.uri, str(folder), "r", "sample"))
    refused = {**item, "uri": f"/raw/{HOSTILE}.mp4", "id": "0" * 32, "source": str(folder), "reason": "not_a_video",
               "stage": "probe", "detail": HOSTILE, "status": CURRENT, "run": "r"}  # fmt: skip
    writer = catalog.Writer(ref, "r")
    writer.append(QUARANTINE, pa.Table.from_pylist([refused], QUARANTINE_SCHEMA))
    writer.append(VIDEOS, rows.select(VIDEO_SCHEMA.names).cast(VIDEO_SCHEMA))
    return str(catalog.pin(ref))


def pretrain_run(folder: Path, catalog_ref: str, steps: int = 20) -> Path:
    mask = {"num_blocks": 2, "spatial_scale": [0.3, 0.3], "temporal_scale": [1.0, 1.0], "aspect_ratio": [1.0, 1.0]}
    config = {
        "catalog": catalog_ref, "seed": 0, "run": {"dir": str(folder)},
        "clip": {"num_frames": 4, "fps": 8.0, "crop_size": 48}, "train": {"steps": steps, "batch_size": 2},
        "model": {"encoder": {"dim": 48, "depth": 1, "heads": 2}, "predictor": {"dim": 48, "depth": 1, "heads": 2},
                  "masks": [mask]},
    }  # fmt: skip
    metrics = [
        {"step": step, "time": 1.0 * step, "loss": 0.9 - step / 50, "trivial": 0.777, "feature_std": 0.9,
         "rank_me": 12.0 + step, "grad_norm": 2.0, "lr": 1e-3, "clips_per_s": 33.0, "data_wait": 0.05,
         "context_ratio_0": 0.5, "target_ratio_0": 0.4375}
        for step in range(2, 21, 2)
    ]  # fmt: skip
    write_run(folder, config, metrics)
    quarantined = {"step": 3, "sample": 7, "uri": f"/raw/{HOSTILE}.mkv", "reason": "frames_missing", "detail": "gone",
                   "attempt": 0, "replaced_by": "/raw/other.mp4"}  # fmt: skip
    (folder / "quarantine").mkdir()
    (folder / "quarantine" / "00000000.jsonl").write_text(json.dumps(quarantined) + "\n")
    return folder


def sweep_run(folder: Path, names: dict[str, tuple[float, ...]] = SCORES) -> Path:
    rows = [
        {"name": name, "seed": seed, "score": score, "loss": 0.5, "trivial": 0.7, "context_ratio": 0.4,
         "target_ratio": 0.6, "run": "r", "stopped": None,
         "points": [{"step": 1, "samples": 8, "flops": 2e9, "tokens": 64, "score": score}]}
        for name, scores in names.items()
        for seed, score in enumerate(scores)
    ]  # fmt: skip
    settings = [{"name": name, "values": {}, "expected": [[0.4, 0.6]]} for name in names]
    controls = {"random init": {0: 0.313, 1: 0.313}, "pixels": 0.352}
    result = {
        "probe": {"kind": "robot_state", "metric": "R2 held out"}, "failures": [], "missing": [],
        **sweep_table.summary(rows, settings, list(names)[-1], [0, 1], controls),
    }  # fmt: skip
    config = {"base": "demo", "catalog": "/c@1", "masks": {name: [{}] for name in names}, "seeds": [0, 1]}
    return write_run(folder, config, result=result)


def post_train_run(folder: Path) -> Path:
    metrics = [
        {"step": step, "loss": 0.5, "teacher_forcing": 0.234, "rollout": 0.266, "copy_last": 0.345, "lr": 1e-3,
         "grad_norm": 1.0, "clips_per_s": 9.0, "data_wait": 0.1}
        for step in (5, 10)
    ]  # fmt: skip
    rollout = {"horizon": [1, 2], "model": [0.2, 0.219], "copy_last": [0.3, 0.4], "shuffled_actions": [0.3, 0.35]}
    config = {"trajectories": "/t", "encoder": "/e", "rollout_steps": 2, "train": {"steps": 10}}
    return write_run(folder, config, metrics, {"rollout": rollout})


def plan_run(folder: Path) -> Path:
    agents = {
        name: {
            "start_m": 0.2,
            "final_m": left,
            "median_m": left,
            "success": float(left < 0.05),
            "seconds_per_action": 1.25,
        }
        for name, left in AGENTS.items()
    }
    episodes = [
        {"episode": n, "agent": name, "distances": [0.2, left], "goal": [0, 0, 0]}
        for name, left in AGENTS.items()
        for n in range(2)
    ]
    result = {"agents": agents, "success_distance": 0.05, "episodes": episodes}
    config = {"model": "/m", "episodes": 2, "steps": 1, "planner": {"samples": 8}}
    write_run(folder, config, result=result)
    (folder / "episodes").mkdir()
    strip = report_figures.strip(np.zeros((2, 16, 16, 3), dtype=np.uint8), Grid(1, 1, 1))
    (folder / "episodes" / "000.png").write_bytes(strip)
    tiny_mp4(folder / "episodes" / "000.mp4")
    return folder


def page_of(run: Path, out: str | None = None) -> str:
    answer = report.run(ReportConfig(str(run), out), Reporter(io.StringIO()))
    return Path(answer["report"]).read_text("utf-8")


def text_of(page: str) -> str:
    """What a reader sees, roughly."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))


def assert_self_contained(page: str) -> None:
    for attribute in re.findall(r"""\b(?:src|href|poster|data|action)\s*=\s*["']([^"']{0,40})""", page):
        assert attribute.startswith(("data:", "#")), attribute
    assert "@import" not in page
    assert "url(h" not in page
    assert "<script" not in page


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    root = tmp_path_factory.mktemp("demo")
    clips = root / "raw"
    clips.mkdir()
    tiny_mp4(clips / "a.mp4")
    reference = write_catalog(root, clips / "a.mp4")
    plan_run(root / "plan")
    post_train_run(root / "post-train")
    sweep_run(root / "sweep")
    pretrain_run(root / "pretrain", reference)
    write_run(root / "sweep" / "trials" / "tubes-s0", {"model": {}, "clip": {}, "catalog": "c"})
    answer = report.run(ReportConfig(str(root)), Reporter(io.StringIO()))
    return root, answer, Path(answer["report"]).read_text("utf-8")


def test_folder_of_runs_gives_one_section_each_in_order(demo: tuple[Path, dict, str]) -> None:
    root, answer, page = demo
    assert answer == {"report": f"{root}/report.html", "sections": ["pretrain", "sweep", "post-train", "plan"]}
    titles = [page.index(f"<h2>{title}") for title in ("Pretraining", "Mask sweep", "Post-training", "Planning")]
    assert titles == sorted(titles)
    assert "cannot be shown" not in page
    assert "Not there yet" not in page


def test_page_is_self_contained_and_escapes_what_runs_hold(demo: tuple[Path, dict, str]) -> None:
    _, _, page = demo
    assert_self_contained(page)
    assert html.escape(HOSTILE, quote=False).replace('"', "&#34;") in page


def test_sections_hold_their_numbers(demo: tuple[Path, dict, str]) -> None:
    _, _, page = demo
    text = text_of(page)
    for expected in (
        "steps 20 of 20, last checkpoint at 20", "loss 0.500 mean predictor 0.777", "RankMe 32.0 of 48 dimensions",
        "data wait 5%", "videos 1 1 refused at ingest", "replaced clips 1", "not_a_video", "frames_missing", "/raw/other.mp4",
        "winner tubes its score 0.59 ± 0.25 R2 held out", "tubes is NOT separable from the default, large: +0.145",
        "random init 0.313", "losses under different masks are not comparable",
        "teacher forcing 0.234 copying costs 0.345", "error at 2 steps 0.219 copied frame 0.400",
        "planner 3.1 cm median distance left, 100% of the goals reached", "no-op 20.4 cm", "success: 5 cm",
        "Episode 000, from 20.0 cm to 3.1 cm", "git abc1234", "ray 2.60.0", "num_blocks: 2",
    ):  # fmt: skip
        assert expected in text, expected


def test_pictures_and_films_are_inlined(demo: tuple[Path, dict, str]) -> None:
    _, _, page = demo
    assert page.count('<svg class="plot"') == 4 + 2 + 4 + 2
    assert page.count("data:video/mp4;base64,") == 1
    assert page.count("data:image/png;base64,") == 2 * 2 + 1  # two samples, the clip and one mask each, and a film strip
    assert len(re.findall(r"mask 1: context \d+%, target \d+%", page)) == 2


def test_clip_frames_undo_tubelets_and_strips_tint_targets_only() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (4, 48, 48, 3), dtype=np.uint8)
    grid = Grid(2, 3, 3)
    assert (report_figures.clip_frames(tubelets(frames), grid) == frames).all()

    import matplotlib.image

    png = report_figures.strip(frames, grid, np.array([0, 2]), np.array([1]))
    shown = np.round(matplotlib.image.imread(io.BytesIO(png), "png")[..., :3] * 255).astype(np.uint8)
    assert (shown[:16, :16] == frames[0, :16, :16]).all()
    assert (shown[:16, 32:48] == frames[0, :16, 32:48]).all()
    assert not (shown[:16, 16:32] == frames[0, :16, 16:32]).all()
    assert (shown[16:32, :48] == report_figures.DROPPED_TINT).all()  # in neither set


def test_hostile_trial_names_stay_text_inside_plots(tmp_path: Path) -> None:
    page = page_of(sweep_run(tmp_path / "s", {HOSTILE: (0.6, 0.5), "b&<c>": (0.3, 0.2)}))
    assert_self_contained(page)
    assert "&lt;script" in page


def test_health_and_what_the_guard_did_are_told(tmp_path: Path) -> None:
    run = pretrain_run(tmp_path / "sick", str(tmp_path / "no-catalog@3"))
    (part,) = (run / "metrics").iterdir()
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    sick = {"loss_over_trivial": 0.7, "rank_me_clip": 3.0, "grad_norm_encoder": 1.5, "guard": "shortcut since step 12"}
    part.write_text("".join(json.dumps(row | (sick if row["step"] >= 12 else {})) + "\n" for row in rows))
    (run / "rollbacks.json").write_text(json.dumps([{"at": 30, "to": 10, "signature": "full_collapse"}]))
    page = page_of(run)
    assert page.count("The guard: shortcut since step 12.") == 1
    assert "The guard took the run from step 30 back to 10: full_collapse." in page
    assert page.count('<svg class="plot"') == 4 + 2


def test_unfinished_runs_say_so(tmp_path: Path) -> None:
    started = pretrain_run(tmp_path / "half", str(tmp_path / "no-catalog@3"), steps=50)
    page = text_of(page_of(started))
    assert "Training stands at step 20 of 50" in page
    assert "Masks over real frames cannot be shown" in page
    assert "The catalog cannot be shown" in page
    assert "frames_missing" in page
    nothing = {
        "pretrain": {
            "model": {"encoder": {"dim": 8}, "masks": []},
            "clip": {},
            "catalog": "/c@1",
            "train": {"steps": 5},
        },
        "sweep": {"masks": {"a": []}, "base": "b", "seeds": [0]},
        "post-train": {"trajectories": "/t", "encoder": "/e", "train": {"steps": 5}},
        "plan": {"model": "/m", "planner": {}, "episodes": 1, "steps": 1},
    }
    for kind, config in nothing.items():
        write_run(tmp_path / "all" / kind, config)
        (tmp_path / "all" / kind / "provenance.json").unlink()
    page = text_of(page_of(tmp_path / "all"))
    assert page.count("Not there yet") >= 6
    assert "the sweep has no result" in page
    assert "rollouts are not measured" in page
    assert "no episode has a picture" in page


def test_damaged_parts_become_notes(tmp_path: Path) -> None:
    post_train_run(tmp_path / "post-train")
    (tmp_path / "post-train" / "result.json").write_text('{"rollout": {"horizon": [1], "model": 3}}')
    (tmp_path / "post-train" / "provenance.json").write_text("not json")
    sweep_run(tmp_path / "sweep")
    (tmp_path / "sweep" / "result.json").write_text("{")
    plan_run(tmp_path / "plan")
    (tmp_path / "plan" / "result.json").write_text('{"agents": {"planner": {}}}')
    text = text_of(page_of(tmp_path))
    assert "Rollouts cannot be shown" in text
    assert "Provenance cannot be shown" in text
    assert "result.json is not JSON" in text
    assert "The result cannot be shown" in text
    assert "Episode 000" in text


def test_vanished_video_is_said_in_place_of_the_picture(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    tiny_mp4(tmp_path / "raw" / "a.mp4")
    reference = write_catalog(tmp_path, tmp_path / "raw" / "a.mp4")
    (tmp_path / "raw" / "a.mp4").unlink()
    page = text_of(page_of(pretrain_run(tmp_path / "run", reference)))
    assert "Masks over real frames cannot be shown: sample 0" in page
    assert "target, mean" in page


def test_out_names_the_page_and_other_folders_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "pages" / "p.html"
    assert "Planning" in page_of(plan_run(tmp_path / "plan"), str(out))
    assert out.exists()
    assert not (tmp_path / "plan" / "report.html").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("just: text")
    for folder in ("other", "pages", "missing"):
        with pytest.raises(InputRefused, match=folder):
            report.run(ReportConfig(str(tmp_path / folder)), Reporter(io.StringIO()))
