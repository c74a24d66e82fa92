"""`make soak`: a pretraining run for a while, and whether its memory and its open files grow.

    python tests/bench/soak.py [--minutes 10] [--clips FOLDER] [--folder FOLDER] [--quick]

The real command: `jepa pretrain` of a small model on the shard that `jepa normalise` makes, with asynchronous checkpoints, in
processes of its own, ended by SIGTERM. Memory is the resident memory of the whole process tree, with shared memory (Ray's object
store) counted once. Writes soak.csv and soak.png into the folder. Ends with exit code 1 when memory grows by more than 1 MB a
minute after warm-up, or open files grow.
"""

import argparse
import contextlib
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import data_inputs as inputs
import data_tree as tree
import numpy as np

PERIOD_S = 2.0
WARM_UP = 0.4
"""Share of the time after the first step: the object store fills, allocators reach their size."""
MB_A_MINUTE = 1.0
SPARE_FILES = 4.0
"""By which the mean number of open files of the second half may exceed the first half's: files come and go."""
START_S, STOP_S = 600, 120
STEPS = '"progress"'
"""In the lines of a run that has made a step."""
RUN = (
    "preset=demo",
    "clip.num_frames=16",
    "train.steps=10000000",
    "train.batch_size=8",
    "train.microbatches=2",
    "train.checkpoint_every=100",
    "ray.object_store_mb=256",
)


class Sample(NamedTuple):
    """One line of the table."""

    minutes: float
    own_mb: float
    mapped_mb: float
    shared_mb: float
    files: int
    processes: int

    @property
    def resident_mb(self) -> float:
        """All of it."""
        return self.own_mb + self.mapped_mb + self.shared_mb


class Growth(NamedTuple):
    """After warm-up: memory in MB a minute with its standard error, and open files from one half to the other."""

    mb_a_minute: float
    error: float
    files: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    clips = os.environ.get("JEPA_TEST_CLIPS")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clips", type=Path, default=clips and Path(clips), help="a folder of footage")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="for made videos, the table and the plot")
    parser.add_argument("--quick", action="store_true", help="small videos of a texture")
    options = parser.parse_args()
    _, paths = inputs.made(options.folder, options.clips, inputs.QUICK if options.quick else inputs.FULL)
    with tempfile.TemporaryDirectory(prefix="jepa-soak-") as scratch:
        inputs.catalogued([scratch], paths[:1], many=True)
        claims = measured(inputs.catalog_of(scratch, inputs.MANY), options.folder, options.minutes)
    for text, value, kept in claims:
        print(f"{text}: {value}: {'yes' if kept else 'NO'}")
    return int(not all(kept for _, _, kept in claims))


def measured(catalog: str, folder: Path, minutes: float) -> list[tuple[str, str, bool]]:
    """Run and watch. Returns claims: text, what was measured, whether it is kept."""
    with tempfile.TemporaryDirectory(prefix="jepa-soak-run-") as run_dir:
        samples, steps, grown = _watched(["pretrain", *RUN, f"catalog={catalog}", f"run.dir={run_dir}"], Path(run_dir), minutes)
    folder.mkdir(parents=True, exist_ok=True)
    _write(samples, folder / "soak.csv")
    growth = growth_of(samples)
    _plot(samples, growth, folder / "soak.png")
    last = samples[-1]
    memory = f"{last.own_mb:.0f} MB of their own, {last.mapped_mb:.0f} mapped, {last.shared_mb:.0f} shared"
    print(f"\n{last.minutes:.1f} minutes, {steps} steps, {last.processes} processes: {memory}, {last.files} open files; "
          f"{folder / 'soak.png'}, {folder / 'soak.csv'}")  # fmt: skip
    print("grown most: " + ", ".join(f"{name} by {mb:.1f} MB" for mb, name in grown[:6]))
    return [
        (f"memory grows by less than {MB_A_MINUTE:g} MB a minute after warm-up, {minutes:g} minutes",
         f"{growth.mb_a_minute:+.2f} +- {growth.error:.2f} MB a minute", growth.mb_a_minute < MB_A_MINUTE),
        ("open files do not grow", f"{growth.files:+.1f}", growth.files <= SPARE_FILES),
    ]  # fmt: skip


def growth_of(samples: list[Sample]) -> Growth:
    """A line through the memory after warm-up. Neighbouring samples are not independent, so the error is that of 20 means."""
    end = samples[-1].minutes
    kept = [sample for sample in samples if sample.minutes >= WARM_UP * end]
    points = np.array([(sample.minutes, sample.resident_mb) for sample in kept])
    times, memory = np.array([part.mean(axis=0) for part in np.array_split(points, min(20, len(kept)))]).T
    slope, base = np.polyfit(times, memory, 1)
    rest = memory - (slope * times + base)
    error = np.sqrt((rest**2).sum() / max(1, len(rest) - 2) / ((times - times.mean()) ** 2).sum())
    half = len(kept) // 2
    files = np.mean([sample.files for sample in kept[half:]]) - np.mean([sample.files for sample in kept[:half]])
    return Growth(float(slope), float(error), float(files))


@contextlib.contextmanager
def _running(arguments: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A command from its first step on, until SIGTERM makes it save and end."""
    with log.open("w") as output:
        child = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *arguments], stdout=output, stderr=subprocess.STDOUT,
                                 cwd=Path(__file__).parents[2])  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while STEPS not in log.read_text():
            if child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the run made no step:\n{log.read_text()[-2000:]}")
            time.sleep(PERIOD_S)
        yield child
        child.send_signal(signal.SIGTERM)
        child.wait(STOP_S)
    finally:
        for pid in tree.processes(child.pid):  # of a run that has ended, nobody
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        child.wait()


def _watched(arguments: list[str], run_dir: Path, minutes: float) -> tuple[list[Sample], int, list[tuple[float, str]]]:
    """Samples of a command's process tree, the last step of its run, and by how many MB each process has grown after warm-up,
    the most first. Raises SystemExit when it ends by itself.
    """
    samples, warm, log = [], {}, run_dir / "soak.log"
    with _running(arguments, log) as child:
        began = time.monotonic()
        while (passed := (time.monotonic() - began) / 60) < minutes:
            if child.poll() is not None:
                raise SystemExit(f"the run ended after {passed:.1f} minutes:\n{log.read_text()[-2000:]}")
            usage, own = tree.usage(child.pid)
            samples.append(Sample(passed, *usage))
            warm = warm or (own if passed >= WARM_UP * minutes else {})
            time.sleep(PERIOD_S)
    from pipelines import run_folder

    grown = [(mb - warm.get(pid, (title, 0.0))[1], f"{title[:40]} ({mb:.0f} MB)") for pid, (title, mb) in own.items()]
    return samples, run_folder.read_parts(str(run_dir), run_folder.METRICS)[-1]["step"], sorted(grown, reverse=True)


def _write(samples: list[Sample], path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(Sample._fields)
        table.writerows([f"{value:.3f}" if isinstance(value, float) else value for value in sample] for sample in samples)


def _plot(samples: list[Sample], growth: Growth, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    minutes = [sample.minutes for sample in samples]
    figure, (memory, files) = plt.subplots(2, 1, sharex=True, figsize=(8, 6))
    memory.plot(minutes, [sample.resident_mb for sample in samples], label="resident memory of all processes")
    memory.plot(minutes, [sample.own_mb for sample in samples], label="their own")
    memory.plot(minutes, [sample.mapped_mb for sample in samples], label="mapped files, libraries above all")
    memory.plot(minutes, [sample.shared_mb for sample in samples], label="shared memory, once")
    memory.set_title(f"{growth.mb_a_minute:+.2f} +- {growth.error:.2f} MB a minute after warm-up")
    memory.set_ylabel("MB")
    files.plot(minutes, [sample.files for sample in samples], label="open files")
    files.plot(minutes, [sample.processes for sample in samples], label="processes")
    files.set_xlabel("minutes")
    for axes in (memory, files):
        axes.axvspan(0, WARM_UP * minutes[-1], color="0.93", label="warm-up")
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
