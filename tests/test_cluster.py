"""A real Ray cluster of its own, with token auth: verbs against its address, and as jobs that are submitted once.

`pytest -m cluster`. `make test` runs a sample; `make cluster-test` (JEPA_CHAOS=all) everything.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import events, jepa
from harness import arguments, ledger, processes, slow

from cluster import submission
from pipelines import catalog, run_folder
from pipelines.cluster_config import SubmitConfig

pytestmark = [pytest.mark.ray, pytest.mark.cluster]
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
PLANTED = "planted-secret-0123456789"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Head:
    """`ray start --head` with a token, and what speaks to it."""

    def __init__(self, home: Path) -> None:
        self.home, self.token = home, secrets.token_hex(32)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "HOME": str(home), "PYTHONPATH": str(ROOT)}
        environment |= {"AWS_SECRET_ACCESS_KEY": PLANTED, "WANDB_API_KEY": PLANTED[::-1]}
        bin_folder = home / "bin"
        bin_folder.mkdir()
        (bin_folder / "jepa").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipelines.cli "$@"\n')
        (bin_folder / "jepa").chmod(0o755)
        environment["PATH"] = f"{bin_folder}:{BIN}:{environment['PATH']}"  # a job's command is looked up on the head's PATH
        self.environment = environment
        port, dashboard = free_port(), free_port()
        command = [BIN / "ray", "start", "--head", "--num-cpus=4", f"--port={port}", "--dashboard-host=127.0.0.1",
                   f"--dashboard-port={dashboard}", "--object-store-memory=300000000", "--block", f"--temp-dir={home}/ray",
                   f"--dashboard-agent-listen-port={free_port()}"]  # fmt: skip  # the default is taken by other Rays here
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for address in (port, dashboard):
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline:
                with socket.socket() as attempt:
                    if attempt.connect_ex(("127.0.0.1", address)) == 0:
                        break
                time.sleep(0.2)
        self.gcs, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self.client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "HOME": str(home), "PYTHONPATH": str(ROOT)}
        self.client |= {"RAY_API_SERVER_ADDRESS": self.dashboard, "PATH": os.environ["PATH"]}

    def jepa(self, *words: str, timeout: float = 240, **changes: str) -> subprocess.CompletedProcess[str]:
        return jepa(*words, env=self.client | changes, timeout=timeout)

    def start(self, *words: str) -> subprocess.Popen:
        base = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        command = [sys.executable, "-m", "pipelines.cli", *words]
        return subprocess.Popen(command, env=base | self.client, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def jobs(self) -> dict[str, dict]:
        (table, *_) = [event for event in events(self.jepa("jobs", "list")) if event["event"] == "table"]
        return {row["job"]: row for row in table["rows"]}

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=3)  # its orderly end takes half a minute
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    import tempfile

    with tempfile.TemporaryDirectory(prefix="jepa-", ignore_cleanup_errors=True) as home:  # sockets below need a short path
        made = Head(Path(home))
        yield made
        made.end()


@pytest.fixture(scope="module")
def ingested(head, corpus, tmp_path_factory) -> str:
    """A catalog of the corpus, made by a verb that joined the cluster at its address."""
    uri = str(tmp_path_factory.mktemp("ingested") / "cat")
    result = head.jepa("ingest", f"source={corpus}", f"catalog={uri}", f"ray.address={head.gcs}")
    assert result.returncode == 0, result.stderr
    assert events(result)[-1]["ingested"] == 3
    return uri


def name_of(*command: str, **options: str) -> str:
    return submission.job_of(SubmitConfig(list(command), **options)).name


def test_a_job_is_submitted_once_streams_its_log_and_ends_with_the_verbs_code(head, corpus, tmp_path):
    command = ["ingest", f"source={corpus}", f"catalog={tmp_path}/cat"]
    first = head.jepa("submit", *command)
    assert first.returncode == 0, first.stderr
    assert [event["ingested"] for event in events(first) if event["event"] == "ingest done"] == [3]
    submitted, done = events(first)[-1], [event for event in events(first) if event["event"] == "submitted"]
    assert (submitted["job"], submitted["status"]) == (done[0]["job"], "succeeded")
    second = head.jepa("submit", "ingest", f"catalog={tmp_path}/cat", f"source={corpus}")  # in another order
    assert [event["job"] for event in events(second) if event["event"] == "attached"] == [done[0]["job"]]
    assert second.stdout.count('"ingest done"') == 1
    status = head.jepa("jobs", "status", done[0]["job"])
    told = events(status)[-1]
    assert [told[key] for key in ("job", "status", "exit_code", "retry")] == [done[0]["job"], "succeeded", 0, False]


@slow
def test_two_submits_at_once_run_once_and_a_failed_job_gets_another_attempt(head, tmp_path):
    command = ["ingest", f"source={tmp_path}/nowhere", f"catalog={tmp_path}/cat"]
    both = [head.start("submit", *command) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [3, 3], str(said)
    assert all("does not exist" in out for out, _ in said)
    assert all("input refused" in error for _, error in said)
    name = name_of(*command)
    new = [word for out, _ in said for word in ("submitted", "attached") if f'"event": "{word}"' in out]
    assert sorted(new) in (["attached", "submitted"], ["submitted", "submitted"])  # the second after the first has failed
    made = [job for job in head.jobs() if job.startswith(name)]
    assert len(made) == new.count("submitted")
    again = head.jepa("submit", *command)
    assert again.returncode == 3
    assert [event["job"] for event in events(again) if event["event"] == "submitted"] == [submission.name_of(name, len(made) + 1)]


def test_strangers_and_mistakes_are_told_apart(head, tmp_path):
    job = ("ingest", "source=s3://a", "catalog=s3://b")
    typo = head.jepa("submit", "ingest", "sourze=a", "catalog=b")
    assert (typo.returncode, "did you mean source?" in typo.stderr) == (2, True)
    for doctor, token in (("true", "0" * 64), ("false", "0" * 64), ("true", "")):
        stranger = head.jepa("submit", f"doctor={doctor}", *job, RAY_AUTH_TOKEN=token)
        assert stranger.returncode == 2, stranger.stderr
        assert "RAY_AUTH_TOKEN" in stranger.stderr
        assert '"retry": false' in stranger.stderr
    nobody = head.jepa("submit", f"address=http://127.0.0.1:{free_port()}", "doctor=false", *job)
    assert (nobody.returncode, "no Ray dashboard answers" in nobody.stderr) == (75, True), nobody.stderr
    missing = head.jepa("jobs", "stop", "jepa-nothing")
    assert (missing.returncode, "there is no job jepa-nothing" in missing.stderr) == (3, True), missing.stderr
    import urllib.error
    import urllib.request

    for path in ("/api/jobs/", "/api/version", "/nodes?view=summary"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(head.dashboard + path, timeout=10)
        assert refused.value.code == 401


@slow
def test_doctor_here_and_on_the_cluster(head, tmp_path):
    began = time.monotonic()
    here = head.jepa("doctor", "--cheap")
    assert time.monotonic() - began < 15  # its own clock says how long the checks took
    assert here.returncode == 0, here.stderr
    checks = {(event["check"], event["status"]) for event in events(here) if event["event"] == "check"}
    assert {("versions", "ok"), ("token", "ok"), ("dashboard", "ok"), ("clock", "ok")} <= checks
    assert events(here)[-1]["seconds"] < 5
    nodes = head.jepa("doctor", "--nodes", f"storage=[{tmp_path}]", f"catalog={tmp_path}/none", f"ray.address={head.gcs}")
    assert nodes.returncode == 4
    assert any(event.get("node") and event["check"] == "shared memory" for event in events(nodes))
    assert "catalog: " in nodes.stderr
    assert not list(tmp_path.iterdir())


@slow
def test_no_secret_in_job_lists_and_logs(head, tmp_path):
    planted = head.jepa("submit", "ingest", f"source=s3://user:{PLANTED}@bucket", "catalog=c", AWS_SECRET_ACCESS_KEY=PLANTED)
    assert planted.returncode == 2
    job = name_of("doctor", f"storage=[{tmp_path}]")
    head.jepa("submit", "doctor", f"storage=[{tmp_path}]", AWS_SECRET_ACCESS_KEY=PLANTED)
    request = [sys.executable, "-c", f"import urllib.request as u; print(u.urlopen(u.Request('{head.dashboard}/api/jobs/', "
               f"headers={{'Authorization': 'Bearer {head.token}'}})).read().decode())"]  # fmt: skip
    info = subprocess.run(request, capture_output=True, text=True, timeout=600).stdout
    assert job in info
    told = [planted.stdout, planted.stderr, info, head.jepa("jobs", "logs", job).stdout, head.jepa("jobs", "list").stdout]
    logs = [
        path for path in (head.home / "ray").rglob("*") if path.is_file() and path.suffix in (".log", ".out", ".err", ".json")
    ]
    assert any("job-driver" in path.name for path in logs)
    told += [path.read_text(errors="replace") for path in logs]
    for secret in (PLANTED, PLANTED[::-1], head.token):
        assert not [text[:200] for text in told if secret in text]


@slow
def test_a_window_fired_twice_ingests_once(head, corpus, tmp_path):
    command = ["ingest", f"source={corpus}", f"catalog={tmp_path}/cat"]
    both = [head.start("submit", "window=day@00:00", *command) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], str(said)
    made = [job for job in head.jobs() if job.startswith(name_of(*command, window="day@00:00"))]
    assert len(made) == 1
    ref = catalog.parse_ref(f"{tmp_path}/cat")
    assert len(catalog.read_videos(ref)) == 3
    digest, _, window = made[0].removeprefix("jepa-ingest-").partition("-")
    assert catalog.read(ref, "runs")["run"].to_pylist() == [f"{window}-{digest[:6]}"]


def log_until(process: subprocess.Popen, words: str) -> list[str]:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            break
    return lines


@slow
def test_a_stopped_job_saves_and_the_next_submit_continues_it(head, ingested, tmp_path):
    """SIGTERM, as Kubernetes and `jepa jobs stop` send it, ends in a committed checkpoint, well beyond Ray's own 3 s."""
    run_dir = tmp_path / "run"
    command = arguments(ingested, run_dir, "train.steps=60", "train.checkpoint_every=1000", "train.log_every=1")
    first = head.start("submit", *command)
    job = json.loads(log_until(first, '"submitted"')[-1])["job"]
    log_until(first, '"done": 3')
    stopped = head.jepa("jobs", "stop", job)
    assert (stopped.returncode, events(stopped)[-1]["status"], events(stopped)[-1]["retry"]) == (0, "stopped", True)
    _, errors = first.communicate(timeout=600)
    assert (first.returncode, "was stopped" in errors) == (75, True)
    step = run_folder.require_checkpoint(str(run_dir)).step
    assert 3 <= step < 60
    assert f"after step {step}, which is saved" in head.jepa("jobs", "logs", job).stdout
    second = head.jepa("submit", *command)
    assert second.returncode == 0, second.stderr
    assert [event["job"] for event in events(second) if event["event"] == "submitted"] == [f"{job}-try2"]
    assert min(event["done"] for event in events(second) if event["event"] == "progress") > step
    assert run_folder.require_checkpoint(str(run_dir)).step == 60


@slow
def test_a_verb_with_another_token_cannot_join(head, corpus, tmp_path):
    refused = head.jepa(
        "ingest", f"source={corpus}", f"catalog={tmp_path}/c2", f"ray.address={head.gcs}", RAY_AUTH_TOKEN="0" * 64
    )
    assert refused.returncode == 75
    assert "RAY_AUTH_TOKEN" in refused.stderr


@slow
def test_code_of_a_folder_travels_with_the_job(head, corpus, tmp_path):
    """working_dir: what runs is the folder's code, not the image's."""
    folder = tmp_path / "code"
    folder.mkdir()
    for room in ("pipelines", "jepa_core", "cluster", "configs"):
        subprocess.run(["cp", "-r", str(ROOT / room), str(folder)], check=True)
    changed = folder / "pipelines" / "catalog_verb.py"
    changed.write_text(changed.read_text() + "\n\ndef run(config, reporter):\n    return {'code': 'of the folder'}\n")
    result = head.jepa("submit", f"working_dir={folder}", "catalog", "show", f"{tmp_path}/none")
    assert result.returncode == 0, result.stderr
    assert any(event.get("code") == "of the folder" for event in events(result))
    image = head.jepa("submit", "catalog", "show", f"{tmp_path}/none")
    assert image.returncode == 3


@slow
def test_the_time_from_submit_to_the_first_line(head, tmp_path):
    """On a warm cluster; printed, because busy machines differ."""
    for number in range(3):
        began = time.monotonic()
        process = head.start("submit", "catalog", "show", f"{tmp_path}/none{number}")
        spent = []
        for words in ("Running entrypoint", '"event": "error"'):
            assert log_until(process, words)
            spent.append(time.monotonic() - began)
        process.communicate(timeout=600)
        print(f"the cluster's first line after {spent[0]:.1f} s, the verb's after {spent[1]:.1f} s")
    assert spent[0] < 16  # the goal is 8 s on a machine that does nothing else


NODES = """
import json, sys
from ray.cluster_utils import Cluster

def node(role, cpus):
    return cluster.add_node(num_cpus=cpus, object_store_memory=100 << 20, labels={"role": role})

def raylet(node):
    return node.all_processes["raylet"][0].process.pid

cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, object_store_memory=100 << 20))
decode, train = node("decode", 1), node("train", 2)
cluster.wait_for_nodes()
print(json.dumps([cluster.address, raylet(decode), raylet(train)]), flush=True)
for _ in sys.stdin:
    cluster.remove_node(decode, allow_graceful=False)
    decode = node("decode", 1)
    print(raylet(decode), flush=True)
"""


def raylets_of(title: bytes, marker: str) -> set[int]:
    """Raylets of the marked cluster whose processes do such work at this moment."""
    found = set()
    for pid in processes([title], marker.encode()):
        with contextlib.suppress(OSError):
            mark = re.search(rb"RAY_RAYLET_PID=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
            found |= {int(mark[1])} if mark else set()
    return found


@slow
@pytest.mark.timeout(540)
def test_a_decode_node_is_replaced_while_training_goes_on(ingested, tmp_path):
    """Head without CPUs, a node for decoding, one for training: each does its own work and no other, and a new one takes over."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}
    base, marker = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | token, secrets.token_hex(8)
    nodes = subprocess.Popen([sys.executable, "-c", NODES], env=base | {"JEPA_TEST_MARKER": marker}, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    run_dir, steps = tmp_path / "run", 120
    try:
        address, first, trains = json.loads(nodes.stdout.readline())
        command = arguments(ingested, run_dir, f"train.steps={steps}", "train.checkpoint_every=1", "train.cpus_per_worker=2",
                            "data.decode_on=labelled", f"ray.address={address}")  # fmt: skip
        driver = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *command], env=base, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True)  # fmt: skip
        decoded, trained, second, attempts = set(), set(), None, set()
        while driver.poll() is None:
            decoded |= raylets_of(b"(_decode)", marker)
            trained |= raylets_of(b"RayTrainWorker", marker)
            found = run_folder.latest_checkpoint(str(run_dir))
            if found:
                attempts.add(found.uri.rpartition("-")[2])
            if second is None and found:  # at the first step, before all of it is decoded
                nodes.stdin.write("next\n")
                nodes.stdin.flush()
                second = int(nodes.stdout.readline())
            time.sleep(0.02)
        assert driver.returncode == 0, driver.stderr.read()
        assert run_folder.require_checkpoint(str(run_dir)).step == steps
        assert decoded == {first, second}
        assert trained == {trains}
        assert len(attempts) == 1, "the workers had to start again"
        assert len(ledger(run_dir)) == 2 * steps
    finally:
        nodes.stdin.close()
        try:
            nodes.wait(timeout=20)
        except subprocess.TimeoutExpired:
            for pid in processes([b""], marker.encode()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            nodes.wait()
