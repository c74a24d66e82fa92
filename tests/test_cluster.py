"""A real Ray cluster of its own, with token auth: verbs against its address, and as jobs through the Jobs API."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import events, jepa

pytestmark = pytest.mark.ray
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """`ray start --head` with a token: (environment, GCS address, dashboard address)."""
    home = tmp_path_factory.mktemp("home")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "HOME": str(home)}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"  # a job's command is looked up on the head's PATH
    port, dashboard = free_port(), free_port()
    command = [BIN / "ray", "start", "--head", "--num-cpus=4", f"--port={port}", "--dashboard-host=127.0.0.1",
               f"--dashboard-port={dashboard}", "--object-store-memory=300000000", "--block",
               f"--dashboard-agent-listen-port={free_port()}"]  # fmt: skip  # the default is taken by other Rays here
    head = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    for address in (port, dashboard):
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", address)) == 0:
                    break
            time.sleep(0.2)
    yield environment, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    head.terminate()
    try:
        head.wait(timeout=3)  # its orderly end takes half a minute
    except subprocess.TimeoutExpired:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def submit(cluster, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.submit", cluster[2], *arguments]
    return subprocess.run(command, env=cluster[0] | changes, capture_output=True, text=True, timeout=180)


def test_a_verb_runs_on_the_cluster_at_an_address(cluster, corpus, tmp_path):
    environment, address, _ = cluster
    token = {key: environment[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "HOME")}
    result = jepa("ingest", f"source={corpus}", f"catalog={tmp_path}/cat", f"ray.address={address}", env=token)
    assert result.returncode == 0, result.stderr
    assert events(result)[-1]["ingested"] == 3
    refused = jepa("ingest", f"source={corpus}", f"catalog={tmp_path}/c2", f"ray.address={address}",
                   env=token | {"RAY_AUTH_TOKEN": "0" * 64})  # fmt: skip
    assert refused.returncode == 75
    assert "RAY_AUTH_TOKEN" in refused.stderr


def test_a_job_is_submitted_once_streams_its_log_and_ends_with_the_verbs_code(cluster, corpus, tmp_path):
    arguments = ["ingest", f"source={corpus}", f"catalog={tmp_path}/cat"]
    first = submit(cluster, *arguments)
    assert first.returncode == 0, first.stderr
    assert '"ingested": 3' in first.stdout
    assert "submitted jepa-ingest-" in first.stderr
    second = submit(cluster, *arguments)
    assert "attaching to jepa-ingest-" in second.stderr
    assert '"ingested": 3' in second.stdout
    empty = submit(cluster, "ingest", f"source={tmp_path}/nowhere", f"catalog={tmp_path}/cat")
    assert empty.returncode == 3
    assert "does not exist" in empty.stdout


def test_mistakes_and_strangers_are_refused_before_anything_runs(cluster):
    typo = submit(cluster, "ingest", "sourze=a", "catalog=b")
    assert (typo.returncode, "did you mean source?" in typo.stderr) == (2, True)
    stranger = submit(cluster, "ingest", "source=a", "catalog=b", RAY_AUTH_TOKEN="0" * 64)
    assert stranger.returncode == 75
    assert "RAY_AUTH_TOKEN" in stranger.stderr
