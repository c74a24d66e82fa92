"""jepa_core against implementations of somebody else's with the same random weights, in float32: transformers, timm.

Weights go through jepa_core.weights, so the maps of `jepa convert` are tested by numbers too.
"""

import pytest
import timm
import torch
from torch import nn

from jepa_core.config import AttentiveConfig, EncoderConfig, PredictorConfig
from jepa_core.encoder import VisionTransformer
from jepa_core.positions import Grid
from jepa_core.weights import ENCODER, PREDICTOR, PROBE, ModelConfig, build, from_transformers

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
HEADS = [(128, 2), (160, 2), (64, 2)]
"""Widths and heads: heads of 64, of 80 (13 frequencies a part, odd) and of 32 channels (5, odd)."""


def pair(dim: int, heads: int, *, crop: int = 64, classes: int = 0) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Their model with random weights, and our parts with the same."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.VJEPA2Config(
        hidden_size=dim, num_attention_heads=heads, num_hidden_layers=3, crop_size=crop, frames_per_clip=8, mlp_ratio=4.0,
        pred_hidden_size=dim, pred_num_attention_heads=heads, pred_num_hidden_layers=2, pred_num_mask_tokens=3,
        num_pooler_layers=2, num_labels=max(2, classes),
    )  # fmt: skip
    kind = transformers.VJEPA2ForVideoClassification if classes else transformers.VJEPA2Model
    model = kind(theirs).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05 if parameter.ndim > 1 else 0.3)
    config = ModelConfig(
        encoder=EncoderConfig(dim, 3, heads),
        predictor=PredictorConfig(dim, 2, heads, num_mask_tokens=3),
        probe=AttentiveConfig(3, heads, num_classes=classes, norm_eps=1e-6) if classes else None,
    )
    ours = {}
    for part, state in from_transformers(model.state_dict(), config).items():
        ours[part] = build(part, config, state).eval()
        ours[part].load_state_dict(state)
    return model, ours


@pytest.mark.parametrize(("dim", "heads"), HEADS)
@pytest.mark.parametrize("frames", [8, 4])
def test_the_encoder_sees_a_whole_clip_alike(dim, heads, frames):
    theirs, ours = pair(dim, heads)
    clip = torch.randn(2, frames, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(clip, skip_predictor=True).last_hidden_state
        torch.testing.assert_close(ours[ENCODER](clip.transpose(1, 2)), expected, **TOLERANCE)


@pytest.mark.parametrize(("dim", "heads"), HEADS)
def test_the_encoder_sees_kept_tokens_alike(dim, heads):
    """Their layers take positions, though their model's forward never leaves a token out."""
    theirs, ours = pair(dim, heads)
    clip = torch.randn(2, 8, 3, 64, 64)
    ids = torch.stack([torch.randperm(64)[:20] for _ in range(2)])
    with torch.no_grad():
        x = theirs.encoder.embeddings(clip).gather(1, ids.unsqueeze(-1).expand(-1, -1, dim))
        for layer in theirs.encoder.layer:
            x = layer(x, ids)[0]
        expected = theirs.encoder.layernorm(x)
        torch.testing.assert_close(ours[ENCODER](clip.transpose(1, 2), keep_ids=ids), expected, **TOLERANCE)


@pytest.mark.parametrize(("dim", "heads"), HEADS)
def test_the_predictor_answers_alike(dim, heads):
    theirs, ours = pair(dim, heads)
    clip = torch.randn(2, 8, 3, 64, 64)
    order = torch.stack([torch.randperm(64) for _ in range(2)])
    context_ids, target_ids = order[:, :20].sort(dim=1).values, order[:, 20:50].sort(dim=1).values
    with torch.no_grad():
        expected = theirs(clip, context_mask=[context_ids], target_mask=[target_ids])
        context = expected.masked_hidden_state
        grid = Grid(4, 4, 4)
        prediction, _ = ours[PREDICTOR](context, context_ids, target_ids, grid, 1)  # their default mask token
        torch.testing.assert_close(prediction, expected.predictor_output.last_hidden_state, **TOLERANCE)


@pytest.mark.parametrize(("dim", "heads"), HEADS)
def test_the_classifier_answers_alike(dim, heads):
    theirs, ours = pair(dim, heads, classes=7)
    clip = torch.randn(2, 8, 3, 64, 64)
    with torch.no_grad():
        logits = ours[PROBE](ours[ENCODER](clip.transpose(1, 2)))
        torch.testing.assert_close(logits, theirs(clip).logits, **TOLERANCE)


def test_images_are_doubled_alike():
    theirs, ours = pair(64, 2)
    image = torch.randn(2, 1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(image, skip_predictor=True).last_hidden_state
        torch.testing.assert_close(ours[ENCODER](image[:, 0]), expected, **TOLERANCE)


def test_timms_i_jepa_checkpoints_load_as_they_are():
    """The layout of vit_huge_patch14_gap_224.in1k_ijepa, made small: flat convolution, stored table, no class token."""
    torch.manual_seed(0)
    options = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 56, "num_classes": 0}
    theirs = timm.create_model("vit_huge_patch14_gap_224", pretrained=False, **options).eval()
    config = EncoderConfig(64, 2, 2, position="sincos_image", tubelet_size=1, patch_size=14, native_grid=(1, 4, 4))
    ours = VisionTransformer(config).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs.forward_features(images), **TOLERANCE)
