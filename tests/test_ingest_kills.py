"""Exactly once: drivers, workers, reading processes and nodes are killed at random, and two ingests run at once.

One Ray cluster of two nodes serves all; every driver is a real `jepa ingest` process that is killed by SIGKILL.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import encode, make_corpus, make_frames
from test_ingest import content, ref_of

from pipelines import catalog, storage
from pipelines.catalog_schema import CURRENT, PACKS, QUARANTINE, RUNS, VIDEOS
from pipelines.errors import InputRefused

pytestmark = [pytest.mark.ray, pytest.mark.ingest, pytest.mark.timeout(1200)]
KILLS = int(os.environ.get("JEPA_TEST_KILLS", "50"))
FAST = ("files_per_task=1", "commit_every=2")
VIDEOS_MADE, REFUSED_MADE = 12, 3


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = make_corpus(tmp_path_factory.mktemp("kills") / "in", 2)
    for index in range(2, VIDEOS_MADE):
        (folder / f"good{index}.mp4").write_bytes(encode(make_frames(10 + index, seed=index)))
    return folder


@pytest.fixture(scope="module")
def clean(source, cluster, tmp_path_factory) -> dict:
    """What an undisturbed run gives."""
    uri = tmp_path_factory.mktemp("clean") / "cat"
    assert Driver(source, uri, cluster).wait() == 0
    rows = content(uri)
    assert (len(rows[VIDEOS]), len(rows[QUARANTINE])) == (VIDEOS_MADE, REFUSED_MADE)
    return rows


class Driver:
    """A running `jepa ingest`, and whether it has begun to read files."""

    def __init__(self, source: Path, catalog_uri: Path, cluster, *options: str):
        command = [sys.executable, "-m", "pipelines.cli", "ingest", f"source={source}", f"catalog={catalog_uri}",
                   f"ray.address={cluster.address}", *(options or FAST)]  # fmt: skip
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        self.reading = threading.Event()
        self.events: list[dict] = []
        self.errors = ""
        self._threads = [threading.Thread(target=self._follow, daemon=True), threading.Thread(target=self._listen, daemon=True)]
        for thread in self._threads:
            thread.start()

    def _follow(self) -> None:
        for line in self.process.stdout:
            if line.startswith("{"):
                self.events.append(json.loads(line))
                self.reading.set()
        self.reading.set()

    def _listen(self) -> None:
        self.errors = self.process.stderr.read()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def wait(self) -> int:
        try:
            code = self.process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # the fault handler tells where every thread stands
            code = self.process.wait()
        for thread in self._threads:
            thread.join(timeout=10)
        return code


def victims(kind: str) -> list[int]:
    """Pids at work for this test's cluster, known by its token: Ray's workers ("worker"), or the readers that they started."""
    token = os.environ["RAY_AUTH_TOKEN"].encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            owner = folder if b"sandbox_child" not in command else Path("/proc") / (folder / "stat").read_text().split()[3]
            if token not in (owner / "environ").read_bytes():
                continue
        except OSError:
            continue
        if (kind == "worker" and b"ray::" in command and b"Map" in command) or (kind == "reader" and b"sandbox_child" in command):
            found.append(int(folder.name))
    return found


def committed(uri: Path) -> dict[str, str]:
    """Id of every committed row, and the run that wrote it."""
    try:
        rows = [row for name in (VIDEOS, QUARANTINE) for row in catalog.read(ref_of(uri), name, ("id", "run")).to_pylist()]
    except InputRefused:
        return {}  # killed before all tables were made
    assert len({row["id"] for row in rows}) == len(rows), "an item stands once, whatever was killed"
    return {row["id"]: row["run"] for row in rows}


def test_an_ingest_that_is_killed_anywhere_ends_in_the_clean_run_s_catalog(source, clean, cluster, tmp_path):
    chance = random.Random(4)
    kills, episode, kinds = 0, 0, {"driver": 0, "worker": 0, "reader": 0, "node": 0}
    while kills < KILLS or min(kinds["driver"], kinds["worker"] + kinds["reader"]) == 0:  # drivers and their tasks both
        uri = tmp_path / f"cat{episode}"
        episode += 1
        before: dict[str, str] = {}
        for _ in range(10):
            driver = Driver(source, uri, cluster)
            kind = chance.choices(("driver", "worker", "reader", "node"), (10, 6, 3, 1))[0]
            if kind == "driver" and chance.random() < 0.25:
                time.sleep(chance.uniform(0.0, 4.0))  # anywhere, the start included
            else:
                driver.reading.wait(timeout=600)
                time.sleep(chance.uniform(0.0, 1.2))
            running = driver.process.poll() is None
            if kind == "driver":
                driver.kill()
            elif kind == "node":
                node = next(iter(cluster.worker_nodes))
                cluster.remove_node(node, allow_graceful=False)
                cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
            else:
                for pid in victims(kind):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            kills += running
            kinds[kind] += running
            code = driver.wait()
            assert code in (0, 75, -signal.SIGKILL), (code, driver.errors[-2000:])
            after = committed(uri)
            assert before.items() <= after.items(), "what was committed is neither lost nor done again"
            before = after
            if code == 0:
                break
        else:
            assert Driver(source, uri, cluster).wait() == 0
        assert content(uri) == clean, f"episode {episode}"
        catalog.vacuum(ref_of(uri), 0)
        named = set(catalog.read(ref_of(uri), VIDEOS)["index_pack"].to_pylist())
        assert {info.uri.rpartition("/")[2] for info in storage.list_files(f"{uri}/{PACKS}")} == named, "no orphan, none missing"
        runs = set(catalog.read(ref_of(uri), RUNS)["run"].to_pylist())
        assert set(committed(uri).values()) <= runs, "every row's run is known"
    print(f"{kills} kills in {episode} catalogs: {kinds}")
    assert min(kinds["driver"], kinds["worker"] + kinds["reader"]) > 0


def test_two_ingests_at_once_never_mix(source, clean, cluster, tmp_path):
    uri = tmp_path / "cat"
    drivers = [Driver(source, uri, cluster) for _ in range(2)]
    codes = [driver.wait() for driver in drivers]
    assert set(codes) <= {0, 75}, [driver.errors[-1000:] for driver in drivers]
    assert 0 in codes
    if 75 in codes:
        assert Driver(source, uri, cluster).wait() == 0
    assert content(uri) == clean
    committed(uri)
    statuses = {row["status"] for name in (VIDEOS, QUARANTINE) for row in content(uri)[name]}
    assert statuses == {CURRENT}
