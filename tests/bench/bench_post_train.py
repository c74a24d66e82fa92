"""Steps a second of post-training on cached tokens beside online encoding, both through the whole loop, run in turn.

    python tests/bench/bench_post_train.py --steps 100 --rounds 3
    python tests/bench/bench_post_train.py --compute --pretrain vits16_128_16f --rounds 2

Records episodes of the simulated robot, takes the encoder of a pretraining preset with random weights (the speed is the same) and
trains configs/post-train/demo.yaml in both ways; the first interval of each run is left out. --compute times what a worker
computes in a step, without Ray, decoding and storage: processor seconds of one thread, variants in turn, the median round.
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
from jepa_core.objective import normalize_targets
from jepa_core.optimization import autocast, make_optimizer
from jepa_core.weights import ENCODER, ModelConfig
from pipelines import model_folder, post_train, ray_session, run_folder, storage
from pipelines.config import PostTrainConfig, PretrainConfig, RayConfig, RecordConfig
from pipelines.presets import load
from pipelines.progress import Reporter
from pipelines.robot.record import record
from pipelines.train_worker import PRECISIONS

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
    parser.add_argument("--pretrain", default="demo", help="preset of `jepa pretrain` whose encoder is taken")
    parser.add_argument("--compute", action="store_true")
    parser.add_argument("options", nargs="*", help="of post-train, key=value")
    given = parser.parse_args()
    if given.compute:
        compute(given.pretrain, given.rounds)
        return
    with tempfile.TemporaryDirectory(prefix="bench-post-train-") as folder, ray_session.session(RayConfig()):
        trajectories = given.trajectories or _recorded(f"{folder}/trajectories", given.episodes)
        encoder = given.encoder or _random_encoder(f"{folder}/encoder", given.pretrain)
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


def compute(preset: str, rounds: int) -> None:
    """Print processor seconds of encoding a step's frames, and of training the predictor on their tokens."""
    torch.set_num_threads(1)
    source = load(PretrainConfig, "pretrain", [f"preset={preset}", "catalog=none", "run.dir=none"])
    config = load(PostTrainConfig, "post-train", ["preset=demo", "trajectories=none", "encoder=none", "run.dir=none"])
    shape, side = source.model.encoder, source.clip.crop_size // source.model.encoder.patch_size
    torch.manual_seed(0)
    encoder = VisionTransformer(shape).eval().requires_grad_(False)
    module = post_train.PostTraining(config, shape.dim, side)
    optimizer = make_optimizer([module], config.optim)
    clips, frames = config.train.batch_size, config.num_frames
    patches = torch.randint(0, 256, (clips, frames * side**2, 3 * shape.patch_size**2), dtype=torch.uint8)
    states, stored = 0.1 * torch.randn(clips, frames, 7), torch.randn(clips, frames, side**2, shape.dim).half()

    def train() -> None:
        with autocast(torch.device("cpu"), PRECISIONS[config.train.precision]):
            loss, _ = module(normalize_targets(stored), states, None, False)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    variants = {"encode": lambda: post_train.encode_patches(encoder, patches, side), "train": train}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    train()
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    encode, trained = (statistics.median(seconds[name]) for name in variants)
    ratio = f"cached over online {1 + encode / trained:.1f} times"
    print(f"{preset} encoder: encode {encode:.3f} s, train {trained:.3f} s a step; {ratio}")


def _random_encoder(uri: str, preset: str) -> str:
    source = load(PretrainConfig, "pretrain", [f"preset={preset}", "catalog=none", f"run.dir={uri}"])
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
