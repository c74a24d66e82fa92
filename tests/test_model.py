"""The models against the reference's formulas, written out plainly here (vjepa2 modules.py, read and restated)."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jepa_core.config import ActionPredictorConfig, EncoderConfig, PredictorConfig
from jepa_core.encoder import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer
from jepa_core.predictor import ActionPredictor, MaskedPredictor, block_causal_mask
from jepa_core.rope import Grid, rope_table

GRID = Grid(2, 3, 4)


def rotate(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The reference's rotation of one part of a head: tiled angles on adjacent pairs (its quirk, kept for its weights)."""
    size = x.shape[-1]
    omega = 1.0 / 10000 ** (torch.arange(size // 2, dtype=torch.float64) / (size / 2))
    angle = (position[:, None].double() * omega).repeat(1, 2)
    pairs = x.unflatten(-1, (-1, 2))
    partner = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * angle.cos() + partner * angle.sin()


def reference_block(block: nn.Module, x: torch.Tensor, ids: torch.Tensor, grid: Grid, heads: int) -> torch.Tensor:
    dim = x.shape[-1]
    head = dim // heads
    part = 2 * ((head // 3) // 2)
    qkv = block.attn.qkv(block.norm1(x)).reshape(*x.shape[:2], 3, heads, head).permute(2, 0, 3, 1, 4)
    axes = (ids // (grid.h * grid.w), ids % (grid.h * grid.w) // grid.w, ids % grid.w)

    def positioned(q: torch.Tensor) -> torch.Tensor:
        parts = [rotate(q[..., i * part : (i + 1) * part], axis) for i, axis in enumerate(axes)]
        return torch.cat([*parts, q[..., 3 * part :]], dim=-1)

    q, k, v = positioned(qkv[0]), positioned(qkv[1]), qkv[2]
    weights = (q @ k.transpose(-1, -2) / math.sqrt(head)).softmax(-1)
    x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


@pytest.mark.parametrize(("dim", "heads"), [(64, 1), (160, 2), (64, 2)])  # heads of 64, 80 and 32 channels
@pytest.mark.parametrize("kept", [None, [0, 3, 7, 11, 20]])
def test_the_encoder_equals_the_reference_formula(dim, heads, kept):
    torch.manual_seed(0)
    encoder = VisionTransformer(EncoderConfig(dim=dim, depth=2, heads=heads)).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    tubelets = torch.randint(0, 256, (2, GRID.num_tokens, 1536), dtype=torch.uint8)
    encoder.patch_embed.forward = lambda x, embed=encoder.patch_embed: F.linear(
        (x.double() - embed.mean) / embed.std, embed.proj.weight.permute(0, 2, 3, 4, 1).flatten(1), embed.proj.bias
    )
    ids = torch.arange(GRID.num_tokens) if kept is None else torch.tensor(kept)
    actual = encoder(tubelets, GRID, None if kept is None else ids.expand(2, -1))
    x = encoder.patch_embed(tubelets)[:, ids]
    for block in encoder.blocks:
        x = reference_block(block, x, ids, GRID, heads)
    torch.testing.assert_close(actual, encoder.norm(x), rtol=1e-5, atol=1e-5)


def test_embedding_tubelets_equals_the_references_convolution():
    torch.manual_seed(0)
    encoder = VisionTransformer(EncoderConfig(dim=48, depth=1, heads=2))
    clip = torch.randint(0, 256, (2, 4, 48, 64, 3), dtype=torch.uint8)
    tubelets = clip.reshape(2, 2, 2, 3, 16, 4, 16, 3).permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(2, 24, 1536)
    pixels = (clip / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    expected = encoder.patch_embed.proj(pixels.permute(0, 4, 1, 2, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch_embed(tubelets), expected, rtol=1e-4, atol=1e-4)
    still = clip[:, :1].reshape(2, 1, 3, 16, 4, 16, 3).permute(0, 1, 2, 4, 3, 5, 6).reshape(2, 12, 768)
    doubled = pixels[:, :1].expand(-1, 2, -1, -1, -1)
    expected = encoder.patch_embed.proj(doubled.permute(0, 4, 1, 2, 3)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.patch_embed(still), expected, rtol=1e-4, atol=1e-4)


def test_the_encoder_has_the_official_names():
    keys = set(VisionTransformer(EncoderConfig(dim=48, depth=1, heads=2)).state_dict())
    block = {f"blocks.0.{name}.{kind}" for kind in ("weight", "bias")
             for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    assert keys == block | {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}


def test_official_parameter_counts():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(VisionTransformer(EncoderConfig(192, 12, 3))) == 5_633_856
    assert count(VisionTransformer(EncoderConfig(384, 12, 6))) == 21_884_544
    assert count(MaskedPredictor(PredictorConfig(), encoder_dim=192, num_mask_tokens=10)) == 21_446_208
    assert count(ActionPredictor(ActionPredictorConfig(), 1408)) == 305_220_992 - 7 * 1024  # no extrinsics encoder (6 + 1 rows)


def test_the_predictor_does_not_depend_on_token_order_and_gives_the_targets_order():
    torch.manual_seed(0)
    predictor = MaskedPredictor(PredictorConfig(dim=48, depth=2, heads=2), 32, 2)
    nn.init.normal_(predictor.mask_tokens[0])
    context, context_ids, target_ids = torch.randn(1, 3, 32), torch.tensor([[0, 5, 9]]), torch.tensor([[2, 14, 23]])
    one = predictor(context, context_ids, target_ids, GRID, 0)
    order = torch.tensor([2, 0, 1])
    two = predictor(context[:, order], context_ids[:, order], target_ids.flip(1), GRID, 0)
    torch.testing.assert_close(one, two.flip(1), rtol=1e-4, atol=1e-5)


def test_each_mask_type_has_its_own_token():
    torch.manual_seed(0)
    predictor = MaskedPredictor(PredictorConfig(dim=48, depth=1, heads=2), 32, 2)
    for token in predictor.mask_tokens:
        nn.init.normal_(token)
    arguments = (torch.randn(1, 2, 32), torch.tensor([[0, 5]]), torch.tensor([[2, 14]]), GRID)
    assert not torch.allclose(predictor(*arguments, 0), predictor(*arguments, 1))


def test_the_action_predictor_is_causal_by_step_and_sees_its_own_action():
    torch.manual_seed(0)
    model = ActionPredictor(ActionPredictorConfig(dim=48, depth=2, heads=2), 32)
    z, actions, states = torch.randn(1, 3, 12, 32), torch.randn(1, 3, 7), torch.randn(1, 3, 7)
    before = model(z, actions, states, (3, 4))
    changed = actions.clone()
    changed[:, 1] += 1
    after = model(z, changed, states, (3, 4))
    torch.testing.assert_close(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])
    assert not torch.allclose(before[:, 2], after[:, 2])
    short = model(z[:, :1], actions[:, :1], states[:, :1], (3, 4))
    torch.testing.assert_close(short[:, 0], before[:, 0], rtol=1e-4, atol=1e-5)


def test_the_causal_mask_is_built_for_the_steps_in_use():
    assert block_causal_mask(1, 5, torch.device("cpu")) is None
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(block_causal_mask(2, 2, torch.device("cpu")), expected)


def test_wrong_shapes_are_refused_with_the_numbers():
    encoder = VisionTransformer(EncoderConfig(dim=48, depth=1, heads=2))
    with pytest.raises(ValueError, match="23 tubelets do not fill a grid of \\(2, 3, 4\\) = 24"):
        encoder(torch.zeros(1, 23, 1536, dtype=torch.uint8), GRID)
    with pytest.raises(ValueError, match="1536 values"):
        encoder(torch.zeros(1, 24, 100, dtype=torch.uint8), GRID)
    with pytest.raises(ValueError, match="48 does not divide into 5"):
        VisionTransformer(EncoderConfig(dim=48, depth=1, heads=5))


def test_rope_tables_are_computed_once():
    device = torch.device("cpu")
    assert rope_table(GRID, 32, device) is rope_table(Grid(2, 3, 4), 32, device)
