"""Operations of a step against torch's own counter, and the peak of devices."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jepa_core import attention
from jepa_core.config import EncoderConfig, LossConfig, MaskConfig, PredictorConfig, PretrainModelConfig
from jepa_core.flops import peak_tflops, pretraining_flops, pretraining_products
from jepa_core.masks import draw_masks
from jepa_core.positions import Grid
from jepa_core.pretraining import MaskIds, Pretraining

BATCH = 3
ENCODER = {"dim": 48, "depth": 3, "heads": 2}
PREDICTOR = {"dim": 24, "depth": 2, "heads": 2}
VIDEO = [MaskConfig(4, (0.15, 0.15)), MaskConfig(1, (0.6, 0.6))]
IMAGE = [MaskConfig(4, (0.15, 0.2), kind="separate", min_tokens=2)]
CASES = {
    "plain": (Grid(2, 6, 6), VIDEO, {}, {}, {}),
    "long": (Grid(4, 8, 8), VIDEO, {}, {}, {}),
    "wide": (Grid(2, 6, 6), VIDEO, {"dim": 96, "heads": 4, "mlp_ratio": 3.0}, {"dim": 48, "heads": 4, "depth": 4}, {}),
    "levels": (Grid(2, 6, 6), VIDEO, {"levels": 3}, {"levels": 3}, {}),
    "dense": (Grid(2, 6, 6), VIDEO, {}, {"predict_context": True}, {"context_weight": 0.5}),
    "image": (Grid(1, 8, 8), IMAGE, {"tubelet_size": 1, "position": "sincos_image", "native_grid": (1, 8, 8)}, {}, {}),
}


def counted(config: PretrainModelConfig, grid: Grid) -> tuple[int, list[tuple[int, int]]]:
    """Operations of one step on BATCH samples that torch saw, and the lengths of its masks."""
    drawn = [draw_masks(mask, index, grid, 0, 0, range(BATCH)) for index, mask in enumerate(config.masks)]
    ids = [MaskIds(torch.from_numpy(mask.context), torch.from_numpy(mask.target)) for mask in drawn]
    values = config.encoder.tubelet_size * 16 * 16 * 3
    clip = torch.randint(0, 256, (BATCH, grid.num_tokens, values), dtype=torch.uint8)
    model = Pretraining(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(clip, grid, ids, config.loss.context_weight)[0].backward()
    return counter.get_total_flops(), [(mask.context.shape[1], mask.target.shape[2]) for mask in ids]


@pytest.fixture(autouse=True)
def plain_products(monkeypatch):
    """torch's counter sees into neither our own operator nor all fused kernels."""
    monkeypatch.setattr(attention, "in_pieces_is_faster", lambda qkv: False)


def model_config(case: str, **encoder) -> tuple[PretrainModelConfig, Grid]:
    grid, masks, more, predictor, loss = CASES[case]
    encoder = EncoderConfig(**ENCODER | more | encoder)
    return PretrainModelConfig(encoder, PredictorConfig(**PREDICTOR | predictor), masks, loss=LossConfig(**loss)), grid


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_the_operations_that_torch_counts(case):
    config, grid = model_config(case)
    seen, lengths = counted(config, grid)
    assert pretraining_flops(config, grid, lengths, BATCH) == pytest.approx(seen, rel=0.02)


def test_computing_blocks_again_is_no_progress():
    config, grid = model_config("plain", activation_checkpointing=True)
    seen, lengths = counted(config, grid)
    told = pretraining_flops(config, grid, lengths, BATCH)
    assert told == pretraining_flops(model_config("plain")[0], grid, lengths, BATCH)
    assert seen > 1.05 * told


def test_attention_grows_with_the_square_of_the_tokens():
    config = PretrainModelConfig()
    one = pretraining_products(config, Grid(8, 16, 16), [(500, 1500), (300, 1700)])
    two = pretraining_products(config, Grid(16, 16, 16), [(1000, 3000), (600, 3400)])
    assert two.linear == 2 * one.linear
    assert two.attention == 4 * one.attention


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10G", 70),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce GTX 1080 Ti", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_the_name_that_torch_tells(name, peak):
    assert peak_tflops(name) == peak
