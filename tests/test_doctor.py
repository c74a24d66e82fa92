"""jepa doctor's checks, each shown what it is to find: every failure has a fix, and what may pass is told from what stays."""

import ast
import inspect
import os
import secrets
import subprocess
import sys
import time
from importlib import metadata
from types import SimpleNamespace

import pytest
from conftest import events, jepa
from s3_faults import FaultyS3, impatient
from test_submission import VERSION, Server

from cluster import doctor, doctor_checks
from pipelines import storage_check
from pipelines.cluster_config import DoctorConfig, SubmitConfig
from pipelines.errors import ConditionMissed, Retryable, UsageError

TOKEN = "t" * 32


def statuses(found) -> dict[str, str]:
    return {finding.check: finding.status for finding in (found if isinstance(found, list) else [found])}


def test_every_failure_has_a_fix():
    made = [node for node in ast.walk(ast.parse(inspect.getsource(doctor_checks)))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding"]  # fmt: skip
    bad = [node for node in made if isinstance(node.args[1], ast.Constant) and node.args[1].value in ("fail", "warn")]
    assert len(bad) > 15
    for node in bad:
        assert len(node.args) >= 4, ast.unparse(node)


def test_versions_that_do_not_fit_together_are_named(monkeypatch, tmp_path):
    assert statuses(doctor_checks.versions(None))["versions"] in ("ok", "warn")
    real = metadata.version
    monkeypatch.setattr(doctor_checks.metadata, "version", lambda name: "0.1" if name == "timm" else real(name))
    (wrong, *_) = doctor_checks.versions(None)
    assert (wrong.status, "timm 0.1, but jepa-pipeline needs" in wrong.detail) == ("fail", True)
    monkeypatch.setattr(doctor_checks.metadata, "version", lambda name: "2.15.0+cpu" if name == "torch" else real(name))
    assert any("different builds" in finding.detail for finding in doctor_checks.versions(None))
    monkeypatch.setattr(doctor_checks.metadata, "version", real)
    (tmp_path / "pins.txt").write_text("# pins\nav==1.0\n")
    (drift,) = doctor_checks.versions(str(tmp_path / "pins.txt"))
    assert (drift.status, "pinned 1.0" in drift.detail) == ("warn", True)


def test_a_token_that_others_can_read_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert doctor_checks.token().status == "warn"
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o644)
    assert (doctor_checks.token().status, doctor_checks.token().fix) == ("fail", f"chmod 600 {tmp_path / 'token'}")
    (tmp_path / "token").chmod(0o600)
    assert doctor_checks.token().status == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor_checks.token().status == "fail"


def dashboard_that(answers, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)

    class Asked(Server):
        pass

    server = Asked(lambda *_: answers(server.asked[-1][3]))
    return server.address


def test_a_dashboard_must_be_closed_to_strangers_and_open_to_us(monkeypatch):
    opened = dashboard_that(lambda _: (200, VERSION), monkeypatch)
    assert "without a token" in doctor_checks.dashboard(opened)[0].detail
    good = dashboard_that(lambda token: (200, VERSION) if TOKEN in token else (401, "no"), monkeypatch)
    assert statuses(doctor_checks.dashboard(good)) == {"dashboard": "ok", "clock": "ok"}
    other = dashboard_that(lambda token: (403, "no"), monkeypatch)
    assert "refuses this token" in doctor_checks.dashboard(other)[0].detail
    older = dashboard_that(
        lambda token: (200, {**VERSION, "ray_version": "2.9.0"}) if TOKEN in token else (401, "no"), monkeypatch
    )
    assert [finding.status for finding in doctor_checks.dashboard(older)][:2] == ["ok", "fail"]
    assert [finding.status for finding in doctor_checks.dashboard(older, strict=False)][:2] == ["ok", "warn"]
    page = dashboard_that(lambda _: (200, "<html>"), monkeypatch)
    assert "not as a Ray dashboard" in doctor_checks.dashboard(page)[0].detail
    with pytest.raises(Retryable):
        doctor_checks.dashboard("http://127.0.0.1:1")


def test_clock_memory_and_disk(monkeypatch, tmp_path):
    assert [doctor_checks.clock(skew, "x").status for skew in (0.5, -3.0, 20.0, -1000.0)] == ["ok", "ok", "warn", "fail"]
    disk = SimpleNamespace(f_frsize=4096, f_blocks=16384, f_bavail=16384)  # docker's 64 MiB
    monkeypatch.setattr(doctor_checks.os, "statvfs", lambda path: disk)
    assert doctor_checks.shared_memory().status == "fail"
    usage = {0.99: "fail", 0.9: "warn", 0.1: "ok"}
    for full, status in usage.items():
        total = 100 * doctor_checks.GIB
        free = SimpleNamespace(total=total, free=total * (1 - full))
        monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda path, free=free: free)
        assert doctor_checks.spill(20.0).status == status


def test_gpus_are_tried_in_a_process_of_its_own(monkeypatch):
    def ran(stdout: str, code: int = 0, stderr: str = ""):
        result = SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)
        monkeypatch.setattr(doctor_checks.subprocess, "run", lambda *_, **__: result)
        return doctor_checks.gpus("require")

    assert doctor_checks.gpus("skip").status == "skip"
    fine = '{"gpus": 2, "names": ["H", "H"], "torch": "2", "cuda": "13", "nccl": "2.27", "problems": []}'
    assert (ran(fine).status, "2 x H" in ran(fine).detail) == ("ok", True)
    assert "sees no GPU" in ran('{"gpus": 0, "names": [], "torch": "2", "cuda": null, "problems": []}').detail
    assert (
        "wrong numbers" in ran('{"gpus": 1, "names": ["H"], "torch": "2", "problems": ["cuda:0 computes wrong numbers"]}').detail
    )
    assert "libcuda" in ran("", -11, "ImportError: libcuda\n").detail


def test_a_folder_and_a_bucket_are_really_written(tmp_path, monkeypatch):
    assert storage_check.check(str(tmp_path)) == (True, True, None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    (found,) = doctor._all([("storage", lambda: doctor_checks.bucket(str(tmp_path / "file" / "below")))], 5)
    assert (found.status, bool(found.fix)) == ("fail", True)


def test_conditional_writes_of_a_store_are_tried(monkeypatch):
    with FaultyS3() as server:
        impatient(server, monkeypatch)
        found = doctor_checks.bucket("s3://bucket/runs")
        assert statuses(found) == {"storage": "ok", "clock": "ok"}
        assert not server.objects
        monkeypatch.setattr(storage_check, "_refused_twice", lambda *_: False)
        assert "ignores If-None-Match" in doctor_checks.bucket("s3://bucket/runs")[0].detail
        (missing,) = doctor._all([("storage", lambda: doctor_checks.bucket("s3://elsewhere/runs"))], 20)
        assert (missing.status, missing.check) == ("fail", "storage")


def test_what_may_pass_is_told_from_what_must_be_put_right(reporter, monkeypatch):
    monkeypatch.setattr(doctor_checks, "shared_memory", lambda: doctor_checks.Finding("shared memory", "ok", "plenty"))
    monkeypatch.setattr(doctor_checks, "spill", lambda _: doctor_checks.Finding("spill", "ok", "plenty"))
    config = DoctorConfig(address="http://127.0.0.1:1", cheap=True)
    with pytest.raises(Retryable, match="no Ray dashboard answers"):
        doctor.run(config, reporter)
    monkeypatch.setattr(doctor_checks, "spill", lambda _: doctor_checks.Finding("spill", "fail", "full", "free space"))
    with pytest.raises(ConditionMissed, match="spill: full: free space"):
        doctor.run(config, reporter)
    monkeypatch.setattr(doctor, "CHEAP_SECONDS", 0.1)
    monkeypatch.setattr(doctor_checks, "spill", lambda _: time.sleep(0.5))
    with pytest.raises(Retryable, match="no answer within"):
        doctor.run(config, reporter)


def test_submit_asks_first_and_submits_nothing_to_an_open_cluster(monkeypatch, reporter):
    opened = dashboard_that(lambda _: (200, VERSION), monkeypatch)
    command = ["ingest", "source=videos", "catalog=s3://b/c"]
    with pytest.raises(UsageError, match="nothing was submitted"):
        doctor.before_submit(SubmitConfig(command, address=opened), reporter)
    (path,) = doctor.local_paths("ingest", SimpleNamespace(source="videos", catalog="s3://b/c"))
    assert "source=videos" in path.detail


def test_doctor_runs_without_torch_and_says_what_it_found():
    verbs = "cluster.doctor, cluster.submit, cluster.jobs, cluster.schedule"
    code = f"import sys, {verbs}; sys.exit(bool({{'torch', 'ray'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    result = jepa("doctor", "--cheap", env={"RAY_AUTH_TOKEN": secrets.token_hex(8), "PATH": os.environ["PATH"]})
    found = [event for event in events(result) if event["event"] == "check"]
    assert {event["check"] for event in found} == {"versions", "token", "shared memory", "spill"}
    assert events(result)[-1]["seconds"] < 5
