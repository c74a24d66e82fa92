"""`make bench-core`: one pretraining step of ours against `transformers`' V-JEPA 2 layers and a reference checkout.

The same masks, the same batch, bf16 autocast, AdamW and the EMA of the target encoder. Steps of all variants are interleaved in
one process, and the ratio is taken round by round, so that a machine whose speed drifts does not decide; peak memory is that of a
process of its own for each variant. Only torch, timm, numpy and (optional) transformers are needed, no Ray.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from jepa_core.config import MaskConfig, OptimConfig, PredictorConfig, PretrainModelConfig, encoder_config
from jepa_core.encoder import IMAGENET_MEAN, IMAGENET_STD, cut_tubelets
from jepa_core.flops import Flops, pretraining_products
from jepa_core.masks import draw_masks
from jepa_core.optimization import autocast, compile_blocks, ema_update, make_optimizer
from jepa_core.positions import Grid
from jepa_core.pretraining import MaskIds, Pretraining

GOAL = 0.55
"""Largest share of the reference's time (issue 3); 0.5 on a GPU."""
MASKS = [MaskConfig(8, (0.15, 0.15)), MaskConfig(2, (0.7, 0.7))]
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
Step = Callable[[], Tensor]


class Case(NamedTuple):
    """What a step is made of."""

    size: str
    crop: int
    frames: int
    batch: int
    device: str
    checkpointing: bool = False

    @property
    def grid(self) -> Grid:
        return Grid(self.frames // 2, self.crop // 16, self.crop // 16)


class Inputs(NamedTuple):
    """Bytes as our data plane delivers them, the same clip normalised as the others take it, and ids of both masks."""

    tubelets: Tensor
    pixels: Tensor
    masks: list[MaskIds]


def make_inputs(case: Case) -> Inputs:
    torch.manual_seed(1)
    clip = torch.randint(0, 256, (case.batch, 3, case.frames, case.crop, case.crop), dtype=torch.uint8)
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    drawn = [draw_masks(mask, index, case.grid, 0, 0, range(case.batch), "first") for index, mask in enumerate(MASKS)]
    masks = [MaskIds(torch.from_numpy(m.context).to(case.device), torch.from_numpy(m.target).to(case.device)) for m in drawn]
    tubelets, _ = cut_tubelets(clip, 2, 16)
    return Inputs(tubelets.to(case.device), ((clip / 255 - mean) / std).to(case.device), masks)


def ours(case: Case, inputs: Inputs, *, compiled: bool = False, update: bool = True) -> Step:
    torch.manual_seed(0)
    encoder = encoder_config(case.size, activation_checkpointing=case.checkpointing)
    model = Pretraining(PretrainModelConfig(encoder, PredictorConfig(), MASKS)).to(case.device)
    if compiled:
        compile_blocks(model)
    optimizer = make_optimizer([model.encoder, model.predictor], OptimConfig())

    def step() -> Tensor:
        with autocast(torch.device(case.device), torch.bfloat16):
            loss, _ = model(inputs.tubelets, case.grid, inputs.masks)
        loss.backward()
        if update:
            optimizer.step()
            ema_update(model.target_encoder, model.encoder, 0.999)
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def plain_step(case: Case, inputs: Inputs, encoder: torch.nn.Module, predictor: torch.nn.Module, forward: Callable) -> Step:
    """The reference's training step (train.py) around `forward(encoder, predictor, target_encoder) -> [(prediction, target)]`."""
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    for module in (encoder, predictor, target_encoder):
        module.to(case.device)
    named = [*encoder.named_parameters(), *predictor.named_parameters()]
    groups = [
        {"params": [p for n, p in named if p.ndim != 1 and "bias" not in n]},
        {"params": [p for n, p in named if p.ndim == 1 or "bias" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5.25e-4, weight_decay=0.04)

    def step() -> Tensor:
        with torch.autocast(case.device, torch.bfloat16):
            pairs = forward(encoder, predictor, target_encoder)
            loss = sum((prediction - target).abs().mean() for prediction, target in pairs) / len(pairs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            slow, fast = list(target_encoder.parameters()), list(encoder.parameters())
            torch._foreach_mul_(slow, 0.999)
            torch._foreach_add_(slow, fast, alpha=0.001)
        return loss.detach()

    return step


def gathered(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def with_transformers(case: Case, inputs: Inputs) -> Step:
    """Their layers, fed with masks by hand, since their model's forward cannot leave tokens out."""
    from transformers import VJEPA2Config, VJEPA2Model

    size = encoder_config(case.size)
    torch.manual_seed(0)
    model = VJEPA2Model(
        VJEPA2Config(
            hidden_size=size.dim, num_hidden_layers=size.depth, num_attention_heads=size.heads, mlp_ratio=size.mlp_ratio,
            crop_size=case.crop, frames_per_clip=case.frames, pred_num_mask_tokens=2,
        )
    ).train()  # fmt: skip
    clips = inputs.pixels.transpose(1, 2)
    if case.checkpointing:
        model.gradient_checkpointing_enable()

    def layers(module: torch.nn.Module, x: Tensor, ids: Tensor | None) -> Tensor:
        for layer in module.layer:
            x = layer(x, ids)[0]
        return module.layernorm(x)

    def forward(encoder: torch.nn.Module, predictor: torch.nn.Module, target_encoder: torch.nn.Module) -> list:
        with torch.no_grad():
            target = layers(target_encoder, target_encoder.embeddings(clips), None)
            target = F.layer_norm(target, target.shape[-1:])
        pairs = []
        for index, mask in enumerate(inputs.masks):
            context = layers(encoder, gathered(encoder.embeddings(clips), mask.context), mask.context)
            x, ids = predictor.embeddings(context, [mask.context], [mask.target[0]], index)
            x = predictor.proj(layers(predictor, x, ids)[:, mask.context.shape[1] :])
            pairs.append((x, gathered(target, mask.target[0])))
        return pairs

    return plain_step(case, inputs, model.encoder, model.predictor, forward)


def with_reference(case: Case, inputs: Inputs, checkout: str) -> Step:
    """The public reference from a checkout (needs einops installed)."""
    sys.path.insert(0, checkout)
    from src.models import predictor as predictors
    from src.models import vision_transformer as encoders

    torch.manual_seed(0)
    options = {"img_size": case.crop, "num_frames": case.frames, "tubelet_size": 2, "use_rope": True, "use_sdpa": True}
    options["use_activation_checkpointing"] = case.checkpointing
    name = {"vit_giant": "vit_giant_xformers"}.get(case.size, case.size)
    encoder = getattr(encoders, name)(**options)
    predictor = predictors.vit_predictor(
        **options,
        embed_dim=encoder.embed_dim,
        predictor_embed_dim=384,
        depth=12,
        num_heads=12,
        use_mask_tokens=True,
        num_mask_tokens=2,
    )

    def forward(encoder: torch.nn.Module, predictor: torch.nn.Module, target_encoder: torch.nn.Module) -> list:
        with torch.no_grad():
            target = target_encoder(inputs.pixels)
            target = F.layer_norm(target, target.shape[-1:])
        pairs = []
        for mask in inputs.masks:
            context = encoder(inputs.pixels, [mask.context])
            prediction = predictor(context, [mask.context], [mask.target[0]], mask_index=0)
            pairs.append((prediction, gathered(target, mask.target[0])))
        return pairs

    return plain_step(case, inputs, encoder, predictor, forward)


def step_flops(case: Case, inputs: Inputs) -> Flops:
    config = PretrainModelConfig(encoder_config(case.size), PredictorConfig(), MASKS)
    lengths = [(mask.context.shape[1], mask.target.shape[2]) for mask in inputs.masks]
    return pretraining_products(config, case.grid, lengths, case.batch)


def timed(step: Step, device: str) -> tuple[float, float]:
    """(CPU seconds of the process, wall seconds) of one step."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def make_step(name: str, case: Case, reference: str | None) -> Step:
    inputs = make_inputs(case)
    if name == "transformers":
        return with_transformers(case, inputs)
    if name == "reference":
        return with_reference(case, inputs, str(reference))
    return ours(case, inputs, compiled=name == "ours compiled")


def peak_memory_mb(name: str, case: Case, options: argparse.Namespace) -> float:
    """Most memory that two steps of a variant take, in a process of their own; on a GPU, the allocator's."""
    command = [sys.executable, __file__, "--memory-of", name, *("--case", json.dumps(case)), *("--threads", str(options.threads))]
    command += ["--reference", options.reference] if options.reference else []
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_memory(name: str, case: Case, reference: str | None) -> None:
    step = make_step(name, case, reference)
    for _ in range(2):
        step()
    print(peak_mb(case.device))


def peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent that this process was forked from
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def one_step(size: str, options: argparse.Namespace) -> None:
    """Does a large model fit? One step at batch 1 with activation checkpointing, and what it took."""
    case = Case(size, 256, 16, 1, options.device, checkpointing=True)
    step = ours(case, make_inputs(case), update=options.update)
    cpu, wall = timed(step, options.device)
    what = "full optimizer step" if options.update else "forward and backward"
    print(f"{size}, 16 frames of 256 px, batch 1, bf16, checkpointing, {what}: {wall:.0f} s wall, {cpu:.0f} s CPU, "
          f"peak {peak_mb(options.device) / 1024:.1f} GiB")  # fmt: skip


def share_of_products(step: Step, device: str) -> float:
    """Share of our step's operator time in matrix products: what no other arrangement of the rest can save."""
    from torch.profiler import profile

    with profile() as profiler:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = profiler.key_averages()
    total = sum(getattr(event, kind) for event in events)
    return sum(getattr(event, kind) for event in events if event.key in PRODUCTS) / total


def profile_table(step: Step, device: str) -> str:
    """What is left: the operators that take most of a step."""
    from torch.profiler import profile

    with profile() as profiler:
        step()
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=16, max_name_column_width=50)


def run_case(case: Case, options: argparse.Namespace) -> None:
    """Prints one table."""
    names = [*(["reference"] if options.reference else []), *(["transformers"] if options.transformers else []), "ours"]
    names += ["ours compiled"] if options.compile else []
    inputs = make_inputs(case)
    kept = ", ".join(f"{m.context.shape[1]}+{m.target.shape[2]}" for m in inputs.masks)
    flops = step_flops(case, inputs)
    print(f"\n{case.size}, {case.frames} frames of {case.crop} px, batch {case.batch}, bf16, {case.device}")
    print(f"  {case.grid.num_tokens} tokens, context+target {kept}; {flops.linear / 1e12:.3f} TFLOP in linear layers, "
          f"{flops.attention / 1e12:.3f} in attention", flush=True)  # fmt: skip
    steps = {name: make_step(name, case, options.reference) for name in names}
    for step in steps.values():  # the first steps allocate and compile
        step()
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(timed(step, case.device))
    which = 1 if case.device == "cuda" else 0
    base = names[0]
    print(f"  {'':16} {'CPU s':>8} {'wall s':>8} {'of ' + base:>16} {'peak MB':>9}")
    for name in names:
        cpu, wall = (statistics.median(column) for column in zip(*times[name], strict=True))
        ratio = statistics.median(a[which] / b[which] for a, b in zip(times[name], times[base], strict=True))
        memory = peak_memory_mb(name, case, options) if options.memory else float("nan")
        print(f"  {name:16} {cpu:8.3f} {wall:8.3f} {ratio:16.2f} {memory:9.0f}", flush=True)
        if name == "ours" and base != "ours":
            verdict = "met" if ratio <= options.goal else "not met"
            share = share_of_products(steps["ours"], case.device) * ratio
            print(f"  {'':16} goal {options.goal}: {verdict}; its matrix products alone: {share:.2f} of a {base} step")
        if case.device == "cuda":
            print(f"  {'':16} model FLOPs utilisation {sum(flops) / wall / options.peak_tflops / 1e12:.1%} "
                  f"of {options.peak_tflops} TFLOP/s")  # fmt: skip
    if options.profile:
        print(profile_table(steps["ours"], case.device))


def masks_table(reference: str | None) -> None:
    """Time of both masks of a batch of 24 clips, 16 frames of 256 px, by policy; and of the reference's collator."""
    grid, batch = Grid(8, 16, 16), 24

    def ours_drawn(policy: str) -> Callable[[int], object]:
        rows = range(batch)
        return lambda step: [
            draw_masks(m, i, grid, 0, step, [step * batch + n for n in rows], policy) for i, m in enumerate(MASKS)
        ]

    draws = {policy: ours_drawn(policy) for policy in ("first", "random", "exact")}
    if reference:
        sys.path.insert(0, reference)
        from src.masks.multiseq_multiblock3d import _MaskGenerator

        options = {"crop_size": 256, "num_frames": 16, "temporal_pred_mask_scale": (1.0, 1.0), "aspect_ratio": (0.75, 1.5)}
        made = [_MaskGenerator(**options, spatial_pred_mask_scale=m.spatial_scale, npred=m.num_blocks) for m in MASKS]
        draws["reference"] = lambda step: [generator(batch) for generator in made]
    best = dict.fromkeys(draws, float("inf"))
    for _ in range(30):
        for name, draw in draws.items():
            begin = time.process_time()
            for step in range(5):
                draw(step)
            best[name] = min(best[name], (time.process_time() - begin) / 5)
    ratio = lambda name: f" ({best['reference'] / best[name]:.1f} times faster)" if reference and name != "reference" else ""  # noqa: E731
    print("masks of 24 clips, both types, best of 30 rounds: "
          + ", ".join(f"{name} {seconds * 1e3:.2f} ms{ratio(name)}" for name, seconds in best.items()), flush=True)  # fmt: skip


def processor() -> str:
    """The processor by name, with its bf16 instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in values.get("flags", "")]
    return f"{values.get('model name', 'unknown processor')} ({', '.join(flags) or 'no bf16 instructions'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="path of a checkout of facebookresearch/vjepa2")
    parser.add_argument("--sizes", default="vit_small,vit_base")
    parser.add_argument("--crops", default="128,224")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--goal", type=float, default=GOAL)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the device (H100, H200: 989)")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in all variants")
    parser.add_argument("--compile", action="store_true", help="also ours with compiled blocks")
    parser.add_argument("--profile", action="store_true", help="print where the time of our step goes")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--one-step", metavar="SIZE", help="instead: time and memory of one step of a large model, e.g. vit_huge")
    parser.add_argument("--no-update", dest="update", action="store_false", help="with --one-step: forward and backward only")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print_memory(options.memory_of, Case(*json.loads(options.case)), options.reference)
        return
    if options.one_step:
        one_step(options.one_step, options)
        return
    print(f"{processor()}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"torch {torch.__version__}, {options.threads} threads, {options.rounds} interleaved rounds, medians", flush=True)
    masks_table(options.reference)
    for size in options.sizes.split(","):
        for crop in options.crops.split(","):
            run_case(Case(size, int(crop), options.frames, options.batch, options.device, options.checkpointing), options)


if __name__ == "__main__":
    main()
