"""What the bundled benchmark reads out of clips: tokens of an encoder, of pixels and of frame differences, under the same probes.

Legend: R clips, N tokens, D width, P values of a tubelet.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from jepa_core.config import AttentiveConfig, EncoderConfig, HeadGrid
from jepa_core.encoder import VisionTransformer
from jepa_core.health import rank_me
from jepa_core.positions import Grid
from jepa_core.probe import standardise
from jepa_core.readout import Rows, Splits, attentive_probe, few_labels, knn_probe, linear_probe
from pipelines.moving_digits import DIRECTIONS

LABELS = {"direction": DIRECTIONS, "digit": 10}
"""What is probed, and its number of classes."""
SPLITS = ("train", "validation", "test")
FEW = 256
"""Labels of the low-label column."""
WEAKEST = 1e-6
"""Variances below this share of the largest are rounding, and are not blown up."""
ATTENTIVE = HeadGrid((3e-3, 1e-3), (0.01,), epochs=15)
ATTENTIVE_MODEL = AttentiveConfig(depth=1, heads=4)
"""The cross-attention alone."""
BATCH = 250
SUPERVISED_EPOCHS, SUPERVISED_BATCH, SUPERVISED_LR = 30, 64, 1e-3


class ProbeClips(NamedTuple):
    """The labelled clips as tubelets, and their labels."""

    tubelets: dict[str, np.ndarray]
    """By part: uint8 [R, N, P]."""
    labels: dict[str, np.ndarray]
    """By part: int64 [R, labels], in the order of LABELS."""
    grid: Grid


def encoded(encoder: VisionTransformer, clips: ProbeClips) -> dict[str, Tensor]:
    """Tokens of every clip by part: float32 [R, N, D]."""
    found = {}
    with torch.no_grad():  # not inference_mode: the attentive probe trains on these
        for split, tubelets in clips.tubelets.items():
            parts = (torch.tensor(tubelets[start : start + BATCH]) for start in range(0, len(tubelets), BATCH))
            found[split] = torch.cat([encoder(part, clips.grid).float() for part in parts])
    return found


def pixels(clips: ProbeClips) -> dict[str, Tensor]:
    """The same probes' input without an encoder: tubelets, float32 [R, N, P] in 0..1."""
    return {split: torch.tensor(tubelets).float() / 255 for split, tubelets in clips.tubelets.items()}


def frame_difference(clips: ProbeClips) -> dict[str, Tensor]:
    """Last less first frame of every tubelet, float32 [R, N, P / 2]."""
    cut = {split: x.unflatten(-1, (2, -1)) for split, x in pixels(clips).items()}
    return {split: frames[:, :, 1] - frames[:, :, 0] for split, frames in cut.items()}


def probe(tokens: dict[str, Tensor], clips: ProbeClips, seed: int) -> dict[str, float]:
    """Test accuracy in % of every probe, and the RankMe of the test clips. `tokens` float32 [R, N, D] by part.

    `direction` and `digit` are linear, from the whitened mean token of a clip; `direction_raw` is that without whitening,
    `direction_few` with FEW labels, `direction_knn` by neighbours, `direction_attentive` from all tokens. The validation part
    chooses each probe's settings.
    """
    mean = {split: x.mean(dim=1) for split, x in tokens.items()}
    white = whitened(mean)
    readouts = {name: linear_probe(_splits(white, clips, name), seed=seed) for name in LABELS}
    direction = _splits(white, clips, "direction")
    few = few_labels(direction, min(FEW, len(direction.train.labels)), seed)
    readouts["direction_raw"] = linear_probe(_splits(mean, clips, "direction"), seed=seed)
    readouts["direction_few"] = linear_probe(few, seed=seed)
    scaled = _standardised(mean)
    readouts["direction_knn"] = knn_probe(_splits(scaled, clips, "direction"))
    scaled = _standardised(tokens)
    readouts["direction_attentive"], _ = attentive_probe(_splits(scaled, clips, "direction"), ATTENTIVE_MODEL, ATTENTIVE, seed)
    return {name: 100 * readout.test for name, readout in readouts.items()} | {"rank_me": rank_me(mean["test"])}


def whitened(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Features [R, D] by part -> [R, D] of which no two channels of the training part are correlated, each of deviation 1.

    A head that is trained for so many steps reads strong directions first. Unless they are equally strong, a regulariser that
    decorrelates channels, and reveals nothing that was not there, would seem to teach: see docs/bench-probe.md.
    """
    train = x["train"].double()
    mean = train.mean(dim=0)
    variances, axes = torch.linalg.eigh(torch.cov((train - mean).T))
    scale = axes * variances.clamp_min(max(WEAKEST * variances[-1].item(), 1e-12)).rsqrt()  # a collapsed encoder has none
    return {split: ((rows.double() - mean) @ scale).float() for split, rows in x.items()}


def supervised(config: EncoderConfig, clips: ProbeClips, seed: int) -> VisionTransformer:
    """An encoder trained from scratch on both labels of the training part, through linear heads on the mean token.

    What so few labels give without pretraining, not the best that they could give: nothing is tuned.
    """
    torch.manual_seed(seed)
    encoder, heads = VisionTransformer(config), torch.nn.Linear(config.dim, sum(LABELS.values()))
    rows, labels = clips.tubelets["train"], torch.tensor(clips.labels["train"])
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], SUPERVISED_LR, weight_decay=0.05)
    steps = SUPERVISED_EPOCHS * -(-len(rows) // SUPERVISED_BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(SUPERVISED_EPOCHS):
        for chosen in torch.randperm(len(rows)).split(SUPERVISED_BATCH):
            logits = heads(encoder(torch.from_numpy(rows[chosen.numpy()]), clips.grid).mean(dim=1))
            parts = logits.split(list(LABELS.values()), dim=1)
            loss = sum(F.cross_entropy(part, labels[chosen, number]) for number, part in enumerate(parts))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder.eval()


def _standardised(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(SPLITS, standardise(*(x[split] for split in SPLITS)), strict=True))


def _splits(x: dict[str, Tensor], clips: ProbeClips, label: str) -> Splits:
    number = list(LABELS).index(label)
    rows = (Rows(x[split], torch.tensor(clips.labels[split][:, number])) for split in SPLITS)
    return Splits(*rows, [f"{label} {value}" for value in range(LABELS[label])])
