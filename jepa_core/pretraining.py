"""Masked latent prediction: encoder, target encoder and predictor with the loss as forward, for the whole family.

Legend: B batch, N tokens, D width, L levels, P values of a tubelet, K context tokens, G targets of a sample (1 but in I-JEPA),
M tokens of a target.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jepa_core.config import PretrainModelConfig
from jepa_core.encoder import VisionTransformer, gather_tokens
from jepa_core.health import (
    CLIPS,
    FEATURES,
    HEALTH_TOKENS,
    SAMPLE_LOSS,
    mean_cosine,
    mean_predictor_l1,
    position_mean_l1,
    sample_l1,
)
from jepa_core.objective import context_distance_weight, latent_loss, normalize_targets
from jepa_core.positions import Grid
from jepa_core.predictor import MaskedPredictor
from jepa_core.regularisation import covariance_penalty, standardize_targets, variance_hinge


class MaskIds(NamedTuple):
    """One mask type of a batch on the device: see jepa_core.masks.Masks."""

    context: Tensor
    """int64 [B, K]"""
    target: Tensor
    """int64 [G, B, M]"""
    context_valid: Tensor | None = None
    """bool [B, K]; None when every entry is real."""
    target_valid: Tensor | None = None
    """bool [G, B, M]"""


class _Part(NamedTuple):
    """What became of one mask type; R is G*B."""

    loss: Tensor
    """Of prediction."""
    regularisation: Tensor | None
    prediction: Tensor
    """[R, M, L*D]"""
    hidden: Tensor
    """[R, M, L*D], what it had to be"""
    ids: Tensor
    """int64 [R, M]"""
    valid: Tensor | None
    """bool [R, M]"""
    context: Tensor
    """[B, K, D], what the encoder made of the visible tokens"""

    @torch.no_grad()
    def health(self, groups: int, context_valid: Tensor | None, by_position: Tensor | None) -> dict[str, Tensor]:
        """Scalars, and SAMPLE_LOSS [B]. `by_position` float32 [B, N] is the L1 of the mean target at each position."""
        real = self.hidden if self.valid is None else self.hidden[self.valid].unsqueeze(0)
        context = normalize_targets(self.context)
        context = context.flatten(0, 1) if context_valid is None else context[context_valid]
        numbers = {
            SAMPLE_LOSS: sample_l1(self.prediction, self.hidden, groups, self.valid),
            "trivial": mean_predictor_l1(real),
            "context_std": context.std(dim=0).mean(),
        }
        if by_position is not None:
            there = by_position.repeat(groups, 1).gather(1, self.ids)
            numbers["position_mean"] = there.mean() if self.valid is None else there[self.valid].mean()
        return numbers


class Pretraining(nn.Module):
    """The student (encoder), its moving average (target encoder) and the predictor."""

    def __init__(self, config: PretrainModelConfig, *, every_parameter: bool = False) -> None:
        """Raises ValueError for levels or losses that do not fit each other.

        `every_parameter`: each forward gives all trained parameters a gradient, if of zeros. For runs that mix clip lengths and
        images, where microbatches on different workers use different embeddings and tokens.
        """
        super().__init__()
        config.check()
        encoder, predictor = config.encoder, config.predictor
        self.config = config
        self.encoder = VisionTransformer(encoder)
        self.predictor = MaskedPredictor(predictor, encoder, len(config.masks))
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.encoder.every_parameter = self.predictor.every_parameter = every_parameter
        self.levels = self.encoder.level_blocks[-predictor.levels :] if encoder.levels > 1 else ()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights, the same in student and teacher; for a model that was built on the meta device and then `to_empty`."""
        self.encoder.reset_parameters()
        self.predictor.reset_parameters()
        self.target_encoder.load_state_dict(self.encoder.state_dict())

    def forward(
        self,
        clip: Tensor,
        grid: Grid,
        masks: Sequence[MaskIds],
        context_weight: float = 0.0,
        clip_group: int = 0,
        measure: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Tubelets [B, N, P] of a grid and one MaskIds per mask type -> (loss, numbers to log).

        `context_weight` is the present weight of the loss on visible tokens. `clip_group` counts the clip lengths of a mixed
        batch and chooses the mask token where predictor.mask_token_by is "clip". `measure` adds the numbers of jepa_core.health,
        for steps that are logged; they change nothing about the loss.
        """
        with torch.no_grad():
            features = self.target_encoder(clip, grid, levels=self.levels)
            if self.config.loss.target_norm == "layer":
                target = normalize_targets(features, max(1, len(self.levels)))
            else:
                target = standardize_targets(features)
        image = clip.shape[-1] == self.config.encoder.patch_size**2 * 3
        tokens = features[..., -self.config.encoder.dim :]
        numbers: dict[str, Any] = {CLIPS: tokens.float().mean(dim=1)}
        losses, measured, extras = [], [], []
        by_position = position_mean_l1(target) if measure else None
        for index, mask in enumerate(masks):
            token = index if self.config.predictor.mask_token_by == "mask" else clip_group  # noqa: S105
            part = self._mask_loss(clip, grid, mask, target, token, image, context_weight)
            losses.append(part.loss)
            if part.regularisation is not None:
                extras.append(part.regularisation)
            if measure:
                measured.append(part.health(len(mask.target), mask.context_valid, by_position))
            numbers[f"context_ratio_{index}"] = _mean_length(mask.context, mask.context_valid) / grid.num_tokens
            numbers[f"target_ratio_{index}"] = _mean_length(mask.target, mask.target_valid) / grid.num_tokens
        if measure:
            numbers |= {key: torch.stack([each[key] for each in measured]).mean(dim=0) for key in measured[0]}
            error = numbers[SAMPLE_LOSS].mean()
            for key in numbers.keys() & {"trivial", "position_mean"}:
                numbers[f"loss_over_{key.removesuffix('_mean')}"] = error / numbers[key].clamp_min(1e-6)
            chosen = slice(None, None, max(1, len(tokens) * grid.num_tokens // HEALTH_TOKENS))
            targets = target[..., -self.config.encoder.dim :].flatten(0, 1)
            numbers |= {"target_std": targets.std(dim=0).mean(), "target_cosine": mean_cosine(targets[chosen])}
            numbers[FEATURES] = tokens.flatten(0, 1)[chosen]
        loss = torch.stack(losses).mean()
        if extras:
            regularisation = torch.stack(extras).mean()
            loss = loss + regularisation
            numbers["regularisation"] = regularisation.detach()
        return loss, numbers

    def _mask_loss(
        self, clip: Tensor, grid: Grid, mask: MaskIds, target: Tensor, token: int, image: bool, context_weight: float
    ) -> "_Part":
        seen_by_encoder = context = self.encoder(clip, grid, mask.context, mask.context_valid, self.levels)
        groups = len(mask.target)
        context_ids, context_valid = mask.context, mask.context_valid
        target_ids = mask.target.flatten(0, 1)
        target_valid = None if mask.target_valid is None else mask.target_valid.flatten(0, 1)
        if groups > 1:  # I-JEPA: every target block is predicted alone, from the same context
            context, target = context.repeat(groups, 1, 1), target.repeat(groups, 1, 1)
            context_ids = context_ids.repeat(groups, 1)
            context_valid = None if context_valid is None else context_valid.repeat(groups, 1)
        valid = None
        if context_valid is not None or target_valid is not None:
            parts = ((context_ids, context_valid), (target_ids, target_valid))
            valid = torch.cat([torch.ones_like(ids, dtype=torch.bool) if v is None else v for ids, v in parts], dim=1)
        prediction, seen = self.predictor(context, context_ids, target_ids, grid, token, valid, image)
        hidden = gather_tokens(target, target_ids)
        loss = latent_loss(prediction, hidden, self.config.loss.kind, target_valid)
        if seen is not None:
            weight = None
            if self.config.loss.context_by_distance:
                weight = context_distance_weight(context_ids, target_ids, grid, target_valid)
            visible = gather_tokens(target, context_ids)
            # Multiplied even by 0, so that DDP finds a gradient for the context projection in every step.
            loss = loss + context_weight * latent_loss(seen, visible, self.config.loss.kind, context_valid, weight)
        if self.config.loss.prediction_weight != 1:
            # Multiplied even by 0, so that DDP finds a gradient for the predictor in every step.
            loss = self.config.loss.prediction_weight * loss
        own = seen_by_encoder[..., -self.config.encoder.dim :].detach()
        regularisation = self._regularisation(seen_by_encoder, mask.context_valid)
        return _Part(loss, regularisation, prediction.detach(), hidden, target_ids, target_valid, own)

    def _regularisation(self, context: Tensor, valid: Tensor | None) -> Tensor | None:
        """VICReg's weighted terms of visible tokens [B, K, L*D], mean over levels; None where both are off."""
        loss = self.config.loss
        if not loss.regularised:
            return None
        rows = context.flatten(0, 1) if valid is None else context[valid]
        levels = rows.chunk(max(1, len(self.levels)), dim=-1)
        terms = [loss.variance_weight * variance_hinge(x) + loss.covariance_weight * covariance_penalty(x) for x in levels]
        return torch.stack(terms).mean()


def _mean_length(ids: Tensor, valid: Tensor | None) -> float | Tensor:
    """Mean number of real entries of rows [..., K]."""
    return ids.shape[-1] if valid is None else valid.sum(dim=-1, dtype=torch.float32).mean()
