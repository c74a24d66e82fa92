"""Feeding a trainer, for bench_data: Ray Data and Ray Train, against a torch DataLoader that decodes the same units in as many
processes. The trainer only looks at every page of what it gets.

    python tests/bench/data_feed.py CATALOG [--quick]     (a process of its own: Ray's token is set before Ray is imported)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import data_inputs as inputs
import data_tree as tree

DECODERS = 2
"""Decoding processes, and one that trains."""
SAMPLES = 8
"""Clips of a unit: 25 MB."""
PAGE = 4096
SLOWER = 0.6
"""Share of the feed's rate that the trainer of the data-wait row asks for."""
CLAIMS = "claims: "


class Fed(NamedTuple):
    """A run as the trainer saw it after its first quarter: clips per second, CPU seconds of all processes for each clip, share of
    the time without data. And the seconds until the trainer ran, and until it had its first batch.
    """

    rate: float
    cpu_s: float
    waited: float
    started: float
    first: float


def measured(root: str, quick: bool) -> list[tuple[str, str, bool]]:
    """Prints the table. Returns the claims."""
    kinds = [inputs.MANY] if quick else [inputs.MANY, f"{inputs.VIDEO}0"]
    command = [sys.executable, __file__, *(inputs.catalog_of(root, kind) for kind in kinds), *(["--quick"] if quick else [])]
    claims = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            if line.startswith(CLAIMS):
                claims = json.loads(line.removeprefix(CLAIMS))
            else:
                print(line, end="", flush=True)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("catalogs", nargs="+")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--loader", type=int, metavar="UNITS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loader:
        print(json.dumps(_through_loader(options.catalogs[0], options.loader)))
        return
    from pipelines import ray_session
    from pipelines.config import RayConfig

    with tempfile.TemporaryDirectory(prefix="jepa-feed-") as scratch, ray_session.session(RayConfig()):
        claims = []
        for number, uri in enumerate(options.catalogs):
            units, rounds = (6, 1) if options.quick else ((80, 3), (24, 2))[number]
            claims += _compared(uri, units, rounds, scratch)
    print(CLAIMS + json.dumps(claims))


def _compared(uri: str, units: int, rounds: int, scratch: str) -> list[tuple[str, str, bool]]:
    """One table, by turns."""
    ray_runs, loader_runs = [], []
    _through_ray(uri, 4, 0.0, scratch)  # which starts the processes
    for _ in range(rounds):
        command = [sys.executable, __file__, uri, "--loader", str(units)]
        loader_runs.append(Fed(*json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)))
        ray_runs.append(_through_ray(uri, units, 0.0, scratch))
    rate = statistics.median(run.rate for run in ray_runs)
    slow = _through_ray(uri, max(8, units // 2), SAMPLES / (SLOWER * rate), scratch)
    row = inputs.videos(uri)[0].row
    title = f"{row['height']}p"
    print(f"\nclips of 16 x 256 x 256 out of {title}, {SAMPLES} a unit, {DECODERS} decoding processes and the trainer, "
          f"{units} units x {rounds} rounds in turns; load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    print("\n| way | clips/s | CPU ms a clip, all processes | trainer runs after, s | first batch after, s | waits for data |")
    print("|---|---|---|---|---|---|")
    rows = {"Ray Data and Ray Train": ray_runs, "torch DataLoader": loader_runs, f"Ray, trainer at {SLOWER:.0%} of it": [slow]}
    for name, runs in rows.items():
        middle = Fed(*(statistics.median(column) for column in zip(*runs, strict=True)))
        print(f"| {name} | {middle.rate:.1f} | {middle.cpu_s * 1e3:.1f} | {middle.started:.1f} | {middle.first:.1f} "
              f"| {middle.waited:.1%} |")  # fmt: skip
    share = statistics.median(a.rate / b.rate for a, b in zip(ray_runs, loader_runs, strict=True))
    cpu = statistics.median(b.cpu_s / a.cpu_s for a, b in zip(ray_runs, loader_runs, strict=True))
    first = statistics.median(run.first for run in ray_runs)
    return [
        (f"Ray Data and Ray Train: at least 0.85 of a DataLoader's clips/s, {title}",
         f"{share:.2f}; by CPU time {cpu:.2f}", share >= 0.85),
        (f"first batch in under 10 s, warm, {title}", f"{first:.1f} s", first < 10),
        (f"waits for data below 5 % of a trainer slower than the feed, {title}", f"{slow.waited:.1%}", slow.waited < 0.05),
    ]  # fmt: skip


def _data(uri: str, units: int, scratch: str, *, shared: bool) -> Any:
    from jepa_core.config import OptimConfig
    from pipelines import clips
    from pipelines.config import DataConfig, PretrainConfig, RunConfig, TrainConfig

    train = TrainConfig(steps=units, batch_size=SAMPLES, microbatches=1)
    data = DataConfig(decode_tasks=DECODERS, decode_on="anywhere")
    config = PretrainConfig(catalog=uri, run=RunConfig(scratch), train=train, data=data, optim=OptimConfig())
    return clips.open_data(config, 1, shared=shared)


class _Trainer:
    """Takes units as they come, and notes how it went."""

    def __init__(self, units: int, root: int, sleep_s: float = 0.0) -> None:
        self.units, self.root, self.sleep_s = units, root, sleep_s
        self.seen, self.waited, self.first = 0, 0.0, 0.0
        self.started = self.before = time.time()

    def take(self, pages: Any) -> None:
        """One unit has come; `pages` is a value of each of its pages, summed so that each is read."""
        now = time.time()
        self.first = self.first or now
        self.waited += now - self.before
        self.seen += 1
        int(pages.sum())
        if self.sleep_s:
            time.sleep(self.sleep_s)  # an accelerator computes: the processor has nothing to do
        self.before = time.time()
        if self.seen == self.units // 4:
            self.begun, self.cpu_s, self.waited = self.before, tree.cpu_s(self.root), 0.0

    def result(self) -> list[float]:
        """Fed, with dates for the last two."""
        assert self.seen == self.units, f"{self.seen} of {self.units} units came"
        clips, seconds = (self.units - self.units // 4) * SAMPLES, self.before - self.begun
        return [clips / seconds, (tree.cpu_s(self.root) - self.cpu_s) / clips, self.waited / seconds, self.started, self.first]


def _through_ray(uri: str, units: int, sleep_s: float, scratch: str) -> Fed:
    import ray.data
    import ray.train
    from ray.train.torch import TorchTrainer

    from pipelines import clips

    data = _data(uri, units, scratch, shared=True)
    began = time.time()
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"units": units, "root": os.getpid(), "sleep_s": sleep_s},
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(name="feed", storage_path=scratch),
        datasets={"train": lambda: clips.unit_dataset(data, 0, units, 0)},
        dataset_config=ray.train.DataConfig(execution_options=ray.data.ExecutionOptions(preserve_order=True)),
    )
    fed = Fed(*trainer.fit().return_value)
    return fed._replace(started=fed.started - began, first=fed.first - began)


def _train_worker(config: dict[str, Any]) -> list[float]:
    import numpy as np
    import ray.train

    from pipelines import clips
    from pipelines.units import unit_of

    trainer = _Trainer(**config)
    shard = ray.train.get_dataset_shard("train")
    for block in shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        trainer.take(unit_of(block).array(clips.TUBELETS, np.uint8, (-1,))[::PAGE])
    return trainer.result()


def _through_loader(uri: str, units: int) -> list[float]:
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset

    from pipelines import clips
    from pipelines.units import unit_of

    torch.set_num_threads(1)
    data = _data(uri, units, ".", shared=False)

    class Units(Dataset):
        def __len__(self) -> int:
            return units

        def __getitem__(self, number: int) -> torch.Tensor:
            unit = unit_of(clips.decode_unit(number, number, clips.plan_unit(number, data), data))
            return torch.from_numpy(unit.array(clips.TUBELETS, np.uint8, (-1,)))

    began = time.time()
    trainer = _Trainer(units, os.getpid())
    for unit in DataLoader(Units(), batch_size=None, num_workers=DECODERS):
        trainer.take(unit[::PAGE])
    fed = Fed(*trainer.result())
    return list(fed._replace(started=fed.started - began, first=fed.first - began))


if __name__ == "__main__":
    main()
