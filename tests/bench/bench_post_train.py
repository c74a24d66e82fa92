"""Steps a second of post-training on cached tokens beside online encoding, both through the whole loop, run in turn.

    python tests/bench/bench_post_train.py --steps 100 --rounds 3

Records episodes of the simulated robot, takes the encoder of configs/pretrain/demo.yaml with random weights (the speed is
the same) and trains configs/post-train/demo.yaml in both ways; the first interval of each run is left out. Other episodes and
another encoder can be given.
"""

import argparse
import os
import secrets
import statistics
import tempfile
import time

os.environ["RAY_AUTH_MODE"] = "token"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import torch

from jepa_core.encoder import VisionTransformer
from jepa_core.weights import ENCODER, ModelConfig
from pipelines import model_folder, post_train, ray_session, run_folder, storage
from pipelines.config import PostTrainConfig, PretrainConfig, RayConfig, RecordConfig
from pipelines.presets import load
from pipelines.progress import Reporter
from pipelines.robot.record import record

INTERVALS = 5
WAYS = ("online", "cached")


def main() -> None:
    """Print a line for each run, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--trajectories")
    parser.add_argument("--encoder")
    parser.add_argument("options", nargs="*", help="of post-train, key=value")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-post-train-") as folder, ray_session.session(RayConfig()):
        trajectories = given.trajectories or _recorded(f"{folder}/trajectories", given.episodes)
        encoder = given.encoder or _random_encoder(f"{folder}/encoder")
        rates = {way: [] for way in WAYS}
        for number in range(given.rounds):
            for way in WAYS:
                words = [f"latents={way}", *([f"latents_dir={folder}/latents"] if way == "cached" else []), *given.options]
                run_dir = f"{folder}/{way}-{number}"
                began = time.monotonic()
                rates[way].append(_rate(trajectories, encoder, run_dir, given.steps, words))
                took = time.monotonic() - began
                print(f"round {number} {way}: {rates[way][-1]:.1f} steps/s, {took:.0f} s with start and end", flush=True)
        size = sum(info.size for info in storage.list_files(f"{folder}/latents"))
        online, cached = (statistics.median(rates[way]) for way in WAYS)
        print(f"online {online:.1f} steps/s, cached {cached:.1f} steps/s: {cached / online:.1f} times; cache {size / 1e6:.1f} MB")


def _recorded(root: str, episodes: int) -> str:
    config = load(RecordConfig, "record", ["preset=demo", f"out={root}"])
    record(root, episodes=episodes, seconds=config.seconds, seed=0, config=config.sim, header_fps=None)
    return root


def _random_encoder(uri: str) -> str:
    source = load(PretrainConfig, "pretrain", ["preset=demo", "catalog=none", f"run.dir={uri}"])
    torch.manual_seed(0)
    parts = {ENCODER: VisionTransformer(source.model.encoder).state_dict()}
    clip = model_folder.ClipFormat(source.clip.num_frames, source.clip.crop_size, source.clip.fps)
    model_folder.write(model_folder.ModelFolder(ModelConfig(encoder=source.model.encoder), parts, clip=clip), uri)
    return uri


def _rate(trajectories: str, encoder: str, run_dir: str, steps: int, words: list[str]) -> float:
    every = max(1, steps // INTERVALS)
    given = ["preset=demo", f"trajectories={trajectories}", f"encoder={encoder}", f"run.dir={run_dir}", f"train.steps={steps}",
             f"train.log_every={every}", f"train.checkpoint_every={10 * steps}", "optim.decay_steps=0"]  # fmt: skip
    post_train.run(load(PostTrainConfig, "post-train", [*given, *words]), Reporter(open(os.devnull, "w")))  # noqa: SIM115
    lines = run_folder.read_parts(run_dir, run_folder.METRICS)[1:]
    return 1 / statistics.median(line["step_s"] for line in lines)


if __name__ == "__main__":
    main()
