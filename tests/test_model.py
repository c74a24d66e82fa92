"""What the models promise beside the reference's numbers (those are in tests/parity)."""

import pytest
import torch
from torch import nn

from jepa_core import attention
from jepa_core.action_predictor import ActionPredictor, block_causal_mask
from jepa_core.config import SIZES, ActionPredictorConfig, ClipConfig, EncoderConfig, PredictorConfig, encoder_config
from jepa_core.encoder import IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, clip_grid, cut_tubelets, level_blocks
from jepa_core.positions import Grid, rope_table
from jepa_core.predictor import MaskedPredictor

GRID = Grid(2, 3, 4)
SMALL = EncoderConfig(dim=32, depth=1, heads=2)


def normalized(clip: torch.Tensor) -> torch.Tensor:
    """Bytes [B, 3, T, H, W] as the reference's transforms give them to the model."""
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (clip / 255 - mean) / std


def test_bytes_in_tubelets_equal_normalised_pixels_through_the_convolution():
    torch.manual_seed(0)
    embed = VisionTransformer(EncoderConfig(dim=48, depth=1, heads=2)).patch_embed
    clip = torch.randint(0, 256, (2, 3, 4, 48, 64), dtype=torch.uint8)
    tubelets, grid = cut_tubelets(clip, 2, 16)
    assert tubelets.shape == (2, 24, 1536)
    assert grid == (2, 3, 4)
    pixels = normalized(clip)
    torch.testing.assert_close(embed(tubelets), embed.proj(pixels).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    still, _ = cut_tubelets(clip[:, :, :1], 2, 16)
    assert still.shape == (2, 12, 768)
    doubled = pixels[:, :, :1].expand(-1, -1, 2, -1, -1)
    torch.testing.assert_close(embed(still), embed.proj(doubled).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_in_bf16_folded_bytes_are_no_less_exact_than_the_convolution():
    torch.manual_seed(0)
    embed = VisionTransformer(EncoderConfig(dim=96, depth=1, heads=2)).patch_embed
    clip = torch.randint(0, 256, (2, 3, 4, 48, 64), dtype=torch.uint8)
    exact = embed.proj(normalized(clip)).flatten(2).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        ours = embed(cut_tubelets(clip, 2, 16)[0])
        convolved = embed.proj(normalized(clip)).flatten(2).transpose(1, 2)
    assert (ours - exact).abs().mean() <= 1.1 * (convolved - exact).abs().mean()


def test_pixels_and_tubelets_give_the_same_features_and_gradients():
    torch.manual_seed(0)
    model = VisionTransformer(SMALL)
    clip = torch.randint(0, 256, (2, 3, 4, 48, 64), dtype=torch.uint8)
    outputs, gradients = [], []
    for arguments in ((normalized(clip),), cut_tubelets(clip, 2, 16)):
        out = model(*arguments)
        outputs.append(out)
        model.zero_grad()
        out.square().sum().backward()
        gradients.append(model.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_only_kept_tubelets_are_embedded(monkeypatch):
    model = VisionTransformer(SMALL)
    seen = []
    embed = model.patch_embed.forward
    monkeypatch.setattr(model.patch_embed, "forward", lambda x: seen.append(x.shape) or embed(x))
    ids = torch.tensor([[1, 5, 7]])
    kept = model(torch.zeros(1, 24, 1536, dtype=torch.uint8), GRID, ids)
    assert seen == [(1, 3, 1536)]
    assert kept.shape == (1, 3, 32)


def test_padding_changes_nothing_for_real_tokens():
    torch.manual_seed(0)
    model = VisionTransformer(EncoderConfig(dim=32, depth=2, heads=2))
    clip = torch.randint(0, 256, (1, 24, 1536), dtype=torch.uint8)
    ids = torch.tensor([[1, 5, 7]])
    padded, valid = torch.tensor([[1, 5, 7, 1, 1]]), torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(model(clip, GRID, padded, valid)[:, :3], model(clip, GRID, ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("tokens", [37, attention.KEPT_TOKENS + 1])
@pytest.mark.parametrize("turned", [False, True])
def test_attention_in_pieces_equals_the_fused_kernel(monkeypatch, dtype, tolerance, tokens, turned):
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "CHUNK_BYTES", 3 * tokens * tokens * 4)  # several pieces, the last one short
    monkeypatch.setattr(attention, "in_pieces_is_faster", lambda qkv: pieces)
    grid = Grid(1, 1, tokens)
    rope = rope_table(grid, grid, 16, "rope", 0, torch.device("cpu"), dtype) if turned else None
    layer = VisionTransformer(SMALL).blocks[0].attn.to(dtype)
    x = torch.randn(2, tokens, 32, dtype=dtype)
    results = []
    for pieces in (False, True):  # noqa: B007, read by the replaced choice
        y = x.clone().requires_grad_()
        out = layer(y, rope)
        layer.zero_grad()
        out.backward(torch.ones_like(out) * torch.linspace(-1, 1, 32, dtype=dtype))
        results.append((out, y.grad, layer.qkv.weight.grad.clone(), layer.qkv.bias.grad.clone()))
    for fused, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, fused, rtol=tolerance, atol=tolerance * max(1.0, fused.abs().max().item()))


def test_the_attention_operators_keep_pytorchs_rules():
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    rope = rope_table(Grid(1, 1, 5), Grid(1, 1, 5), 8, "rope", 0, torch.device("cpu"), torch.float64)
    assert torch.autograd.gradcheck(lambda x: torch.ops.jepa_core.attention_in_pieces(x, rope)[0], (qkv,))
    torch.library.opcheck(torch.ops.jepa_core.attention_in_pieces, (qkv.detach(), rope))


def test_the_encoder_has_the_official_names():
    keys = set(VisionTransformer(EncoderConfig(dim=48, depth=1, heads=2)).state_dict())
    block = {f"blocks.0.{name}.{kind}" for kind in ("weight", "bias")
             for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}  # fmt: skip
    assert keys == block | {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}


def test_official_parameter_counts():
    encoders = dict(zip(SIZES, (5_633_856, 21_884_544, 86_236_416, 303_885_312, 631_648_000, 1_012_173_952), strict=False))
    predictors = {"vit_tiny": 21_446_208, "vit_base": 21_889_152, "vit_giant": 22_381_312}
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    with torch.device("meta"):
        for size, number in encoders.items():
            assert count(VisionTransformer(encoder_config(size))) == number
        assert VisionTransformer(encoder_config("vit_gigantic")).blocks[0].mlp.fc1.out_features == 8192
        for size, number in predictors.items():
            assert count(MaskedPredictor(PredictorConfig(num_mask_tokens=10), encoder_config(size), 2)) == number
        assert count(ActionPredictor(ActionPredictorConfig(use_extrinsics=True), 1408)) == 305_220_992


def test_levels_end_with_the_last_block():
    assert level_blocks(12, 4) == (2, 5, 8, 11)
    assert level_blocks(24, 4) == (5, 11, 17, 23)
    assert level_blocks(40, 4) == (9, 19, 29, 39)
    assert level_blocks(48, 4) == (11, 23, 37, 47)
    assert level_blocks(12, 1) == (11,)


def test_the_predictor_does_not_depend_on_token_order_and_gives_the_targets_order():
    torch.manual_seed(0)
    predictor = MaskedPredictor(PredictorConfig(dim=48, depth=2, heads=2), SMALL, 2)
    nn.init.normal_(predictor.mask_tokens[0])
    context, context_ids, target_ids = torch.randn(1, 3, 32), torch.tensor([[0, 5, 9]]), torch.tensor([[2, 14, 23]])
    one, _ = predictor(context, context_ids, target_ids, GRID, 0)
    order = torch.tensor([2, 0, 1])
    two, _ = predictor(context[:, order], context_ids[:, order], target_ids.flip(1), GRID, 0)
    torch.testing.assert_close(one, two.flip(1), rtol=1e-4, atol=1e-5)


def test_each_mask_type_has_its_own_token():
    torch.manual_seed(0)
    predictor = MaskedPredictor(PredictorConfig(dim=48, depth=1, heads=2), SMALL, 2)
    for token in predictor.mask_tokens:
        nn.init.normal_(token)
    arguments = (torch.randn(1, 2, 32), torch.tensor([[0, 5]]), torch.tensor([[2, 14]]), GRID)
    assert not torch.allclose(predictor(*arguments, 0)[0], predictor(*arguments, 1)[0])


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
    model = VisionTransformer(SMALL)
    with pytest.raises(ValueError, match="23 tubelets do not fill a grid of \\(2, 3, 4\\) = 24"):
        model(torch.zeros(1, 23, 1536, dtype=torch.uint8), GRID)
    with pytest.raises(ValueError, match="1536 values \\(2x16x16x3\\), a still frame 768, got 100"):
        model(torch.zeros(1, 24, 100, dtype=torch.uint8), GRID)
    with pytest.raises(ValueError, match="multiples of 16, got \\(1, 3, 4, 40, 64\\)"):
        model(torch.zeros(1, 3, 4, 40, 64))
    with pytest.raises(ValueError, match="48 does not divide into 5"):
        VisionTransformer(EncoderConfig(dim=48, depth=1, heads=5))
    with pytest.raises(ValueError, match="45 / 5 heads = 9 channels a head"):
        VisionTransformer(EncoderConfig(dim=45, depth=1, heads=5))
    with pytest.raises(ValueError, match="16 frames of 100x100 do not divide into tubelets of 2x16x16"):
        clip_grid(ClipConfig(num_frames=16, crop_size=100), SMALL)
    with pytest.raises(ValueError, match="extrinsics are given"):
        ActionPredictor(ActionPredictorConfig(dim=48, depth=1, heads=2), 32)(
            torch.zeros(1, 2, 12, 32), torch.zeros(1, 2, 7), torch.zeros(1, 2, 7), (3, 4), torch.zeros(1, 2, 6)
        )
    with pytest.raises(ValueError, match="choose from vit_tiny"):
        encoder_config("vit_enormous")


def test_a_table_is_computed_once_and_one_made_for_inference_serves_training():
    rope_table.cache_clear()
    model = VisionTransformer(SMALL)
    clip = torch.zeros(1, 24, 1536, dtype=torch.uint8)
    with torch.inference_mode():
        model(clip, GRID)
    model(clip, GRID).sum().backward()
    assert rope_table.cache_info().misses == 1
    assert rope_table.cache_info().hits == 1


def test_images_and_videos_of_any_size_go_through_one_model():
    torch.manual_seed(0)
    model = VisionTransformer(SMALL)
    assert model(torch.randn(1, 3, 64, 32)).shape == (1, 8, 32)
    assert model(torch.randn(1, 3, 10, 48, 80)).shape == (1, 75, 32)
    image = torch.randn(1, 3, 32, 32)
    doubled = model(image.unsqueeze(2).expand(-1, -1, 2, -1, -1))
    torch.testing.assert_close(model(image), doubled, rtol=1e-5, atol=1e-5)
