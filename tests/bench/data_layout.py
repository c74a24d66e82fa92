"""How clips should lie in a unit: cut into tubelets by the decoder, or as frames. What placing, transport and cutting cost.

    python tests/bench/data_layout.py [--quick]     (a process of its own: Ray's token is set before Ray is imported)

Frames are random; decoding is left out. Ways go by turns, and CPU time counts all processes of Ray but the measuring one's start.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import data_tree as tree
import numpy as np

FRAMES, SIZE, PATCH, DEPTH = 16, 256, 16, 2
CLIPS = 8
"""Of a unit: 25 MB."""
PAGE = 4096
TUBELETS, CLIP, TENSORS = "tubelets, one row a unit", "frames, one row a unit", "frames, a row of Ray's tensors for each clip"
CLAIMS = "claims: "
Claims = list[tuple[str, str, bool]]


def measured(quick: bool) -> Claims:
    """Prints the table. Returns the claims."""
    command = [sys.executable, __file__, *(["--quick"] if quick else [])]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *lines, last = result.stdout.splitlines()
    print("\n".join(lines), flush=True)
    return json.loads(last.removeprefix(CLAIMS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    units, rounds = (6, 1) if quick else (60, 5)
    placing = {way: _ms(lambda way=way: _place(way), 3 if quick else 30) for way in (TUBELETS, CLIP)}
    cutting = {way: _ms(_cutter(way), 3 if quick else 30) for way in (TUBELETS, CLIP)}
    from pipelines import ray_session
    from pipelines.config import RayConfig

    ways = (TUBELETS, CLIP, TENSORS)
    with ray_session.session(RayConfig(object_store_mb=512)):
        for way in ways:
            _transport(way, 4)  # which starts the processes
        runs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                runs[way].append(_transport(way, units))
    print(f"\nlayout of {FRAMES} x {SIZE} x {SIZE} clips, {CLIPS} a unit, {units} units x {rounds} rounds in turns; "
          f"load average {os.getloadavg()[0]:.1f}")  # fmt: skip
    print("\n| layout | decoder places, ms a clip | trainer cuts, ms a clip | transport, clips/s | transport, CPU ms a clip |")
    print("|---|---|---|---|---|")
    for way in ways:
        rate, cpu = (statistics.median(column) for column in zip(*runs[way], strict=True))
        near = CLIP if way == TENSORS else way
        print(f"| {way} | {placing[near]:.2f} | {cutting[near]:.2f} | {rate:.0f} | {cpu * 1e3:.2f} |")
    total = {way: placing[way] + cutting[way] for way in (TUBELETS, CLIP)}
    told = f"{total[TUBELETS]:.2f} ms a clip against {total[CLIP]:.2f}, none of it the trainer's"
    text = "tubelets that the decoder places cost no more CPU than frames that the trainer cuts"
    print(CLAIMS + json.dumps([(text, told, total[TUBELETS] <= total[CLIP])]))


def _shape(way: str) -> tuple[int, ...]:
    cut = (FRAMES // DEPTH, SIZE // PATCH, SIZE // PATCH, DEPTH, PATCH, PATCH, 3)
    return (CLIPS, *cut) if way == TUBELETS else (CLIPS, FRAMES, SIZE, SIZE, 3)


IMAGES = np.random.default_rng(0).integers(0, 256, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)


def _place(way: str) -> np.ndarray:
    """A unit of frames as the scaler gives them, one after another, written where they belong."""
    out = np.empty(_shape(way), np.uint8)
    for clip in out:
        for number, image in enumerate(IMAGES):
            if way == TUBELETS:  # as pipelines.clip_reader does
                place = clip.transpose(0, 3, 1, 4, 2, 5, 6)[number // DEPTH, number % DEPTH]
                place[...] = image.reshape(SIZE // PATCH, PATCH, SIZE // PATCH, PATCH, 3)
            else:
                clip[number] = image
    return out


def _cutter(way: str) -> Callable[[], Any]:
    """From a unit in shared memory to the tubelets that the encoder's embedding multiplies."""
    import torch

    torch.set_num_threads(1)
    unit = torch.from_numpy(_place(way))
    if way == TUBELETS:
        return lambda: unit.view(CLIPS, -1, DEPTH * PATCH * PATCH * 3)
    cut = unit.view(CLIPS, FRAMES // DEPTH, DEPTH, SIZE // PATCH, PATCH, SIZE // PATCH, PATCH, 3)
    return lambda: cut.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(CLIPS, -1, DEPTH * PATCH * PATCH * 3)


def _ms(work: Callable[[], Any], repeats: int) -> float:
    """CPU milliseconds a clip, the median."""
    work()
    times = []
    for _ in range(repeats):
        used = time.process_time()
        work()
        times.append(time.process_time() - used)
    return statistics.median(times) / CLIPS * 1e3


def _transport(way: str, count: int) -> tuple[float, float]:
    """(clips per second, CPU seconds a clip) of units that only exist, from a task to a reader that looks at every page."""
    import pyarrow as pa
    import ray

    from pipelines import units
    from pipelines.config import DataConfig

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    if way == TENSORS:
        rows = ray.data.range(count, override_num_blocks=count).map_batches(_tensors, batch_size=None, num_cpus=1)
        rows.context.execution_options.preserve_order = True
        batches = (batch["clip"].reshape(-1) for batch in rows.iter_batches(batch_size=CLIPS, prefetch_batches=1))
    else:
        recipe = units.Recipe(_plan, _decode, {"way": way}, ("clips",), IMAGES.nbytes * CLIPS, CLIPS)
        blocks = units.dataset(recipe, units.Span(0, count, 1), 0, DataConfig(decode_tasks=2)).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=1
        )
        batches = (units.unit_of(pa.table(block)).array("clips", np.uint8, (-1,)) for block in blocks)
    seen, began, used = 0, time.monotonic(), tree.cpu_s(os.getpid())
    for batch in batches:
        seen += 1
        int(batch[::PAGE].sum())
        if seen == max(1, count // 4):
            began, used = time.monotonic(), tree.cpu_s(os.getpid())
    assert seen == count, f"{seen} of {count} units came"
    clips = (count - max(1, count // 4)) * CLIPS
    return clips / (time.monotonic() - began), (tree.cpu_s(os.getpid()) - used) / clips


def _plan(number: int, way: str) -> dict[str, Any]:
    return {}


def _decode(number: int, step: int, planned: dict[str, Any], way: str) -> Any:
    from pipelines import units

    out = np.empty(_shape(way), np.uint8)
    out.fill(number % 251)
    return units.block(number, step, 0, np.array([number]), {"clips": out})


def _tensors(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = np.empty(_shape(TENSORS), np.uint8)
    out.fill(int(batch["id"][0]) % 251)
    return {"clip": out}


if __name__ == "__main__":
    main()
