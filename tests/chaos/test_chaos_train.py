"""Training under kill -9, preemption, SIGTERM, NaN, slow ranks: the same weights by the same losses from the same samples, or a
clear end. `make chaos` (JEPA_CHAOS=all) runs all of them; `make test` a sample, with one kill.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import jepa
from harness import ALL, Killer, arguments, assert_same, faulty, ledger, processes, replaced, settings, slow, trace, weights

from pipelines import pretrain, run_folder
from pipelines.errors import InputRefused, Retryable

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
KILLS, STEPS = (20, 200) if ALL else (1, 24)
TWO = ("train.num_workers=2", "train.checkpoint_every=2")


def without_ray() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


def start(command: list[str], marker: str, more: dict[str, str] | None = None) -> subprocess.Popen:
    """A driver in a process group of its own, whose workers carry a marker in their environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *command],
        env=without_ray() | {"JEPA_TEST_MARKER": marker} | (more or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(catalog_uri, reporter, tmp_path_factory) -> Path:
    """All steps on two workers, without any trouble."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    pretrain.run(settings(catalog_uri, run_dir, f"train.steps={STEPS}", *TWO), reporter)
    return run_dir


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["worker", pytest.param("decode", marks=slow)])
def test_kill_9_of_random_processes_changes_no_bit(undisturbed, catalog_uri, tmp_path, kind):
    # Between two short tasks, a process that decodes is idle; so may others be that have not decoded yet.
    titles = {"worker": [b"RayTrainWorker"], "decode": [b"(_decode)", b"ray::IDLE"]}[kind]
    run_dir, marker = tmp_path / "run", secrets.token_hex(8)
    driver = start(arguments(catalog_uri, run_dir, f"train.steps={STEPS}", *TWO, "train.max_failures=5"), marker)
    with Killer(titles, run_dir, KILLS, seed=7, environment=marker.encode()) as killer:
        _, errors = driver.communicate(timeout=1700)
    assert driver.returncode == 0, errors
    assert len(killer.killed) == KILLS
    assert_same(run_dir, undisturbed)


NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, object_store_memory=100 << 20))
nodes = [cluster.add_node(num_cpus=2, object_store_memory=100 << 20) for _ in range(2)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for _ in sys.stdin:
    cluster.remove_node(nodes.pop(0), allow_graceful=False)
    nodes.append(cluster.add_node(num_cpus=2, object_store_memory=100 << 20))
    print("another", flush=True)
"""


@slow
@pytest.mark.timeout(900)
def test_nodes_that_vanish_with_workers_and_data_change_no_bit(undisturbed, catalog_uri, tmp_path):
    """Both nodes that workers, decode tasks and units are on go, one after the other, at once; each time another one comes."""
    cluster = subprocess.Popen([sys.executable, "-c", NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address, run_dir, attempts = cluster.stdout.readline().strip(), tmp_path / "run", set()
        driver = start([*arguments(catalog_uri, run_dir, f"train.steps={STEPS}", *TWO), f"ray.address={address}"], "nodes",
                       {key: os.environ[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})  # fmt: skip
        for number in range(2):
            while (found := run_folder.latest_checkpoint(str(run_dir))) is None or found.step < STEPS // 3 * (number + 1):
                assert driver.poll() is None, driver.stderr.read()
                time.sleep(0.05)
            attempts.add(found.uri.rpartition("-")[2])
            cluster.stdin.write("next\n")
            cluster.stdin.flush()
            assert cluster.stdout.readline() == "another\n"
        _, errors = driver.communicate(timeout=700)
        assert driver.returncode == 0, errors
        attempts.add(run_folder.latest_checkpoint(str(run_dir)).uri.rpartition("-")[2])
        assert len(attempts) > 1, "no worker was on the nodes that went"
        assert_same(run_dir, undisturbed)
    finally:
        cluster.stdin.close()
        cluster.terminate()
        cluster.wait()


@slow
@pytest.mark.timeout(900)
def test_kill_9_of_the_driver_and_the_same_command_again(undisturbed, catalog_uri, tmp_path):
    run_dir, command = tmp_path / "run", arguments(catalog_uri, tmp_path / "run", f"train.steps={STEPS}", *TWO)
    for number in range(3 if ALL else 1):
        driver = start(command, secrets.token_hex(8))
        target = STEPS // 3 * (number + 1) // (3 if ALL else 1)
        while driver.poll() is None:
            found = run_folder.latest_checkpoint(str(run_dir))
            if found and found.step >= target:
                break
            time.sleep(0.05)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.communicate()
    again = jepa(*command, timeout=600)
    assert again.returncode == 0, again.stderr
    assert_same(run_dir, undisturbed)


@slow
def test_sigterm_saves_and_says_that_the_same_command_continues(undisturbed, catalog_uri, reporter, tmp_path):
    """What Kubernetes sends before it kills: the run ends at a step that is saved, with the exit code that means try again."""
    run_dir = tmp_path / "run"
    config = settings(catalog_uri, run_dir, f"train.steps={STEPS}", *TWO)

    def terminate() -> None:
        while (found := run_folder.latest_checkpoint(str(run_dir))) is None or found.step < 4:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(Retryable, match=r"asked to stop \(SIGTERM\) after step \d+, which is saved") as stopped:
        pretrain.run(config, reporter)
    assert stopped.value.exit_code == 75
    assert f"after step {run_folder.latest_checkpoint(str(run_dir)).step}," in str(stopped.value)
    pretrain.run(config, reporter)
    assert_same(run_dir, undisturbed)


@slow
def test_more_and_fewer_workers_see_the_same_samples(undisturbed, catalog_uri, reporter, tmp_path):
    """1 -> 2 -> 1 workers within one epoch. Gradients are summed in another order, so losses agree but for rounding."""
    run_dir = tmp_path / "run"
    for workers, steps in ((1, 4), (2, 10), (1, STEPS)):
        more = (f"train.steps={STEPS}", f"train.num_workers={workers}", "train.checkpoint_every=2")
        if steps < STEPS:
            _run_until(settings(catalog_uri, run_dir, *more), steps, reporter)
        else:
            pretrain.run(settings(catalog_uri, run_dir, *more), reporter)
    assert ledger(run_dir) == ledger(undisturbed)
    losses = [
        [line["loss"] for line in run_folder.read_parts(str(folder), run_folder.METRICS)] for folder in (run_dir, undisturbed)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in run_folder.read_parts(str(run_dir), run_folder.METRICS)]


def _run_until(config, step: int, reporter) -> None:
    """Train, and be asked to stop at a step."""
    from pipelines import relay

    stopped = []

    class StopAt(relay.Relay):
        def __init__(self, show) -> None:
            def watch(line) -> None:
                show(line)
                if line["step"] >= step and not stopped:
                    stopped.append(line["step"])
                    self.sink.stop.remote()

            super().__init__(watch)

    from pipelines import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Relay", StopAt)
        with pytest.raises(Retryable, match="the same command continues"):
            pretrain.run(config, reporter)


def test_canonical_runs_have_the_same_bits_on_any_number_of_workers(catalog_uri, reporter, tmp_path):
    more = ("train.steps=4", "train.deterministic=canonical", "train.checkpoint_every=2", "train.batch_size=6")
    runs = []
    for workers in (0, 1, 2, 3) if ALL else (0, 2):
        run_dir = tmp_path / f"on-{workers}"
        pretrain.run(settings(catalog_uri, run_dir, *more, "train.microbatches=3", f"train.num_workers={workers}"), reporter)
        runs.append(run_dir)
    for run_dir in runs[1:]:
        assert weights(run_dir) == weights(runs[0])
        assert ledger(run_dir) == ledger(runs[0])
        assert trace(run_dir, ("step", "loss", "grad_norm", "lr")) == trace(runs[0], ("step", "loss", "grad_norm", "lr"))


@slow
def test_a_loss_that_is_not_a_number_ends_the_run_and_poisons_nothing(catalog_uri, reporter, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"

    def nan_at_step_5(task) -> None:
        tensors = task.tensors

        def poisoned(unit):
            clips, *others = tensors(unit)
            if unit.step == 5 and unit.number % 2:
                task.module.encoder.norm.weight.data[0] = float("nan")
            return clips, *others

        task.tensors = poisoned

    config = settings(catalog_uri, run_dir, f"train.steps={STEPS}", *TWO)
    with faulty(monkeypatch, nan_at_step_5), pytest.raises(InputRefused, match=r"loss is nan at step 5 for samples \[22, 23\]"):
        pretrain.run(config, reporter)
    found = run_folder.latest_checkpoint(str(run_dir))
    assert found.step == 4
    for part in ("encoder", "target_encoder", "predictor"):
        assert all(value.isfinite().all() for value in run_folder.load_weights(found, part).values())


@slow
def test_a_rank_that_is_ten_times_slower_is_named(undisturbed, catalog_uri, reporter, tmp_path, monkeypatch):
    def slow_rank_1(task) -> None:
        import ray.train

        if ray.train.get_context().get_world_rank() == 1:
            tensors = task.tensors

            def delayed(unit):
                time.sleep(2.0)  # far above what a step takes on a busy machine
                return tensors(unit)

            task.tensors = delayed

    run_dir = tmp_path / "run"
    with faulty(monkeypatch, slow_rank_1):
        _run_until(settings(catalog_uri, run_dir, f"train.steps={STEPS}", *TWO), 6, reporter)
    lines = run_folder.read_parts(str(run_dir), run_folder.METRICS)
    assert all(line["slowest_rank"] == 1 for line in lines[1:])
    assert sorted(line["skew"] for line in lines[1:])[len(lines[1:]) // 2] > 5, "the other rank may wait for a processor once"
    numbers = trace(run_dir, ("step", "loss", "grad_norm"))
    assert numbers == trace(undisturbed, ("step", "loss", "grad_norm"))[: len(numbers)]


@slow
def test_a_preemption_notice_saves_before_the_node_goes(catalog_uri, reporter, tmp_path, monkeypatch):
    """The checkpoint by the clock is an hour away; the notice makes one at the next step at which the workers ask."""

    def notice(task) -> None:
        from types import SimpleNamespace

        import ray.train

        from pipelines import train_control

        train_control.PREEMPTION_S = 0.0
        ray.train.get_preemption_info = lambda: SimpleNamespace(deadline_ms=1)

    run_dir = tmp_path / "run"
    more = ("train.steps=6", "train.num_workers=2", "train.checkpoint_every=1000", "train.keep_checkpoints=9")
    with faulty(monkeypatch, notice):
        pretrain.run(settings(catalog_uri, run_dir, *more), reporter)
    assert [found.step for found in run_folder.checkpoints(str(run_dir))] == [6, 1]


@slow
def test_workers_that_die_again_and_again_at_one_step_end_the_run(catalog_uri, reporter, tmp_path, monkeypatch):
    def dies(task) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    config = replaced(settings(catalog_uri, tmp_path / "run", "train.steps=4"), max_failures=1)
    with faulty(monkeypatch, dies), pytest.raises(Retryable, match=r"died 2 times at step 0 .*train.max_failures=1"):
        pretrain.run(config, reporter)


def test_the_killer_kills():
    code = "import time; print(flush=True); time.sleep(60)"
    victim = subprocess.Popen([sys.executable, "-c", code, "chaos-victim"], stdout=subprocess.PIPE)
    try:
        victim.stdout.readline()  # just after its start, its command line is not yet there to be read
        assert victim.pid in processes([b"chaos-victim"])
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        assert victim.pid not in processes([b"chaos-victim"])
    finally:
        victim.kill()
